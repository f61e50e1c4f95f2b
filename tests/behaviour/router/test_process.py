"""The router as a program: its ready line, its signals, its files."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

import aiohttp
import msgspec
import pytest

from tests.behaviour.router.harness import (
    CHAT,
    KEY,
    SSE_HEAD,
    STREAM,
    chunk,
    fake_engine,
    function,
    http,
    post,
    program,
    raw,
    routing_table,
)
from tests.support import eventually


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def write(path, table):
    path.write_bytes(msgspec.msgpack.encode(table))
    return str(path)


async def test_sigterm_finishes_streams_and_takes_nothing_new(tmp_path):
    release = asyncio.Event()

    async def held(_, writer):
        writer.write(SSE_HEAD + chunk(b"data: 1\n\n"))
        await release.wait()
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    async with fake_engine(held) as engine:
        routes = write(tmp_path / "routes", routing_table(function(engine.url)))
        async with program(
            "router", "--port", "0", "--admin-port", "0", "--routes", routes
        ) as router:
            stream = asyncio.create_task(raw(port_of(router.url), post(STREAM), timeout_s=20))
            await eventually(lambda: engine.received)
            router.signal(signal.SIGTERM)
            admin = port_of(router.ready["admin_url"])

            async def not_ready() -> bool:
                return b" 503 " in await raw(admin, b"GET /ready HTTP/1.0\r\n\r\n")

            await eventually(not_ready)

            async def refused() -> bool:
                try:
                    await raw(port_of(router.url), post(CHAT))
                except ConnectionRefusedError:
                    return True
                return False

            await eventually(refused)
            assert router.process.returncode is None
            release.set()
            assert b"[DONE]" in await stream
            async with asyncio.timeout(5):
                assert await router.process.wait() == 0


@pytest.mark.parametrize("second", [True, False], ids=["second-signal", "deadline"])
async def test_a_drain_that_cannot_end_is_ended(tmp_path, second):
    async def hang(_, __):
        await asyncio.Event().wait()

    async with fake_engine(hang) as engine:
        routes = write(tmp_path / "routes", routing_table(function(engine.url)))
        timeout = "60" if second else "0.5"
        async with program(
            "router", "--port", "0", "--admin-port", "0", "--routes", routes,
            "--drain-timeout-s", timeout,
        ) as router:  # fmt: skip
            stream = asyncio.create_task(raw(port_of(router.url), post(STREAM), timeout_s=20))
            await eventually(lambda: engine.received)
            router.signal(signal.SIGTERM)
            if second:
                admin = port_of(router.ready["admin_url"])

                async def draining() -> bool:
                    return b"draining" in await raw(admin, b"GET /ready HTTP/1.0\r\n\r\n")

                await eventually(draining)
                router.signal(signal.SIGTERM)
            async with asyncio.timeout(5):
                assert await router.process.wait() == 0
            assert await stream == b""
            async with asyncio.timeout(2):
                await engine.gone.wait()


async def test_a_table_file_is_followed_and_a_broken_one_changes_nothing(tmp_path):
    async with fake_engine() as first, fake_engine() as second:
        path = tmp_path / "routes.json"

        def as_json(url: str, generation: int) -> None:
            table = {
                "generation": generation,
                "functions": [
                    {
                        "name": "sim",
                        "served_name": "sim",
                        "arms": [
                            {
                                "deployment": "d",
                                "cluster": "c",
                                "replicas": [{"id": f"r{generation}", "url": url}],
                            }
                        ],
                    }
                ],
                "tenants": [
                    {"name": "t", "models": ["*"], "keys": [{"id": "k", "sha256": KEY.sha256}]}
                ],
            }
            fresh = path.with_suffix(".new")
            fresh.write_text(json.dumps(table))
            fresh.replace(path)

        as_json(first.url, 1)
        async with program(
            "router", "--port", "0", "--admin-port", "0", "--routes", str(path),
            "--poll-interval-s", "0.05",
        ) as router:  # fmt: skip
            port = port_of(router.url)
            assert b" 200 " in await raw(port, post(CHAT))
            path.write_text("{ not a table")
            assert b" 200 " in await raw(port, post(CHAT))
            as_json(second.url, 2)

            async def moved() -> bool:
                await raw(port, post(CHAT))
                return bool(second.received)

            await eventually(moved)
            before = len(first.received)
            assert b" 200 " in await raw(port, post(CHAT))
            assert len(first.received) == before


async def test_neither_key_nor_prompt_reaches_log_metrics_or_status(tmp_path):
    canary = "kanarienvogel"
    log = tmp_path / "access.log"
    async with fake_engine(http(b"{}", "500 Internal Server Error")) as engine:
        routes = write(tmp_path / "routes", routing_table(function(engine.url)))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "router", "--port", "0", "--admin-port", "0", "--routes", routes,
            "--access-log", str(log), "--log-level", "debug",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        ready = json.loads(await process.stdout.readline())
        port = port_of(ready["url"])
        said = f'{{"model":"sim","messages":[{{"role":"user","content":"{canary}"}}]}}'.encode()
        for request in (
            post(said),
            post(said[:-1]),
            post(said, key=KEY.text + canary),
            post(said, headers=f"X-Bad: {canary}\0\r\n"),
            post(said.replace(b'"sim"', b'"nope"')),
            post(said, path="/v1/embeddings"),
        ):
            await raw(port, request)
        async with aiohttp.ClientSession() as session:
            shown = ""
            for path in ("metrics", "status"):
                async with session.get(f"{ready['admin_url']}/{path}") as response:
                    assert response.status == 200
                    shown += await response.text()
        process.send_signal(signal.SIGTERM)
        out, err = await process.communicate()
        assert process.returncode == 0
        everything = shown + out.decode() + err.decode() + log.read_text()
        assert "detoserve_router_requests_total" in shown
        assert '"sim-r0"' in log.read_text()
        for secret in (canary, KEY.text, KEY.text[14:]):
            assert secret not in everything
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert {line["key"] for line in lines} == {"", KEY.id}
        assert any(line["outcome"] == "upstream_error" for line in lines)


async def test_wrong_settings_are_said_with_their_source():
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router", "--port", "many",
        env={**os.environ, "DETOSERVE_ROUTER_MAX_BODY_BYTES": "-1"},
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, err = await process.communicate()
    assert process.returncode == 2
    assert b"--port" in err
    assert b"DETOSERVE_ROUTER_MAX_BODY_BYTES" in err
    assert b"Traceback" not in err
