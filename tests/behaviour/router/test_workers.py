"""Several processes behind one port."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import aiohttp
import msgspec

from router.build import is_compiled
from tests.behaviour.router.harness import (
    CHAT,
    KEY,
    SSE_HEAD,
    STREAM,
    chunk,
    fake_engine,
    function,
    post,
    program,
    raw,
    routing_table,
)
from tests.support import eventually


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def routes(folder, url: str) -> str:
    path = folder / "routes"
    path.write_bytes(msgspec.msgpack.encode(routing_table(function(url))))
    return str(path)


def children(pid: int) -> set[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return {int(child) for child in text.split()}


def workers(path: str):
    return program(
        "router", "--port", "0", "--admin-port", "0", "--routes", path, "--workers", "2",
        "--id", "edge",
    )  # fmt: skip


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def test_workers_share_a_port_and_their_metrics_add_up(tmp_path):
    async with fake_engine() as engine, workers(routes(tmp_path, engine.url)) as router:
        for _ in range(40):
            assert b" 200 " in await raw(port_of(router.url), post(CHAT))
        admin = router.ready["admin_url"]
        _, text = await get(f"{admin}/metrics")
        counted = [
            line for line in text.splitlines() if line.startswith("detoserve_router_requests_total")
        ]
        assert [line.rpartition(" ")[2] for line in counted] == ["40.0"]
        assert 'gen_ai_server_request_duration_seconds_count{gen_ai_operation_name="chat",gen_ai_request_model="sim"} 40.0' in text  # fmt: skip
        status = json.loads((await get(f"{admin}/status"))[1])
        assert sorted(worker["id"] for worker in status["workers"]) == ["edge-w0", "edge-w1"]
        # All of them as what is installed here: the sources, or compiled.
        assert {worker["compiled"] for worker in status["workers"]} == {is_compiled()}
        assert (await get(f"{admin}/ready"))[0] == 200
        router.signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            assert await router.process.wait() == 0


async def test_a_rolling_restart_under_load_fails_no_request(tmp_path):
    async def stream(_, writer):
        writer.write(SSE_HEAD)
        for _ in range(10):
            writer.write(chunk(b"data: 1\n\n"))
            await asyncio.sleep(0.01)
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    async with fake_engine(stream) as engine, workers(routes(tmp_path, engine.url)) as router:
        before = children(router.process.pid)
        assert len(before) == 2
        done = 0
        failed: list[object] = []
        ending = asyncio.Event()

        async def ask_on_new_connections() -> None:
            nonlocal done
            while not ending.is_set():
                answer = await raw(port_of(router.url), post(STREAM))
                if b"[DONE]" not in answer:
                    failed.append(answer)
                done += 1

        async def ask_on_kept_connections() -> None:
            nonlocal done
            headers = {"Authorization": f"Bearer {KEY.text}"}
            async with aiohttp.ClientSession() as session:
                while not ending.is_set():
                    url = f"{router.url}/v1/chat/completions"
                    async with session.post(url, data=STREAM, headers=headers) as response:
                        if b"[DONE]" not in await response.read():
                            failed.append(response.status)
                    done += 1

        clients = asyncio.gather(
            *(ask_on_new_connections() for _ in range(8)),
            *(ask_on_kept_connections() for _ in range(8)),
        )
        await eventually(lambda: done > 50)
        router.signal(signal.SIGHUP)
        await eventually(lambda: not (children(router.process.pid) & before), timeout_s=20)
        seen = done
        await eventually(lambda: done > seen + 50)
        ending.set()
        await clients
        assert failed == []
        assert len(children(router.process.pid)) == 2


async def test_a_worker_that_dies_is_started_again_and_none_outlives_the_supervisor(tmp_path):
    async with fake_engine() as engine, workers(routes(tmp_path, engine.url)) as router:
        before = children(router.process.pid)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda: len(children(router.process.pid) - {victim}) == 2, timeout_s=40)
        for _ in range(10):
            assert b" 200 " in await raw(port_of(router.url), post(CHAT), timeout_s=40)
        now = children(router.process.pid)
        router.signal(signal.SIGKILL)
        await eventually(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in now), timeout_s=40
        )


async def test_a_taken_port_is_said_and_not_shared(tmp_path):
    async with fake_engine() as engine:
        path = routes(tmp_path, engine.url)
        async with workers(path) as router:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "router", "--port", str(port_of(router.url)),
                "--admin-port", "0", "--routes", path, "--workers", "2",
                stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            _, err = await process.communicate()
            assert process.returncode == 1
            assert b"use" in err
            assert b"Traceback" not in err
