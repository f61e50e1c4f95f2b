"""Traces as a collector receives them, and trace context as an engine does."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time

import msgspec
import pytest

from router.settings import SettingsInvalid
from router.telemetry import tracing
from tests.behaviour.router.harness import (
    CHAT,
    KEY,
    ROUND_ROBIN,
    SSE_HEAD,
    STREAM,
    chunk,
    fake_engine,
    function,
    http,
    post,
    raw,
    routing_table,
    running_router,
    tenant,
)
from tests.behaviour.router.otlp_collector import collector
from tests.support import eventually, free_port

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = f"traceparent: 00-{TRACE}-{PARENT}-01\r\n"
NOT_SAMPLED = f"traceparent: 00-{TRACE}-{PARENT}-00\r\n"


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def sent_context(received):
    """Trace id, parent id and whether it is sampled, as an engine got them."""
    lines = re.findall(rb"(?im)^traceparent: *([^\r]*)", received.head)
    assert len(lines) == 1
    match = re.fullmatch(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})", lines[0])
    assert match
    return match[1].decode(), match[2].decode(), bool(int(match[3], 16) & 1)


def events(*parts):
    """Answers with a stream of these parts, and its end."""

    async def answer(_, writer):
        writer.write(SSE_HEAD)
        for part in parts:
            writer.write(chunk(part))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    return answer


async def test_a_clients_trace_goes_on_through_router_and_attempt_to_the_engine(tmp_path):
    async with collector() as seen, fake_engine() as engine:
        before = time.time_ns()
        async with running_router(
            routing_table(function(engine.url)), tmp_path, otlp_endpoint=seen.url, id="edge-1"
        ) as running:
            answer = await raw(
                running.port, post(CHAT, headers=SAMPLED + "tracestate: vendor=a:1,b=2\r\n")
            )
            assert answer.startswith(b"HTTP/1.1 200")
        after = time.time_ns()
    [server], [client] = seen.servers, seen.clients
    assert set(seen.paths) == {"/v1/traces"}
    assert (server.trace_id, server.parent) == (TRACE, PARENT)
    assert (client.trace_id, client.parent) == (TRACE, server.id)
    assert sent_context(engine.received[0]) == (TRACE, client.id, True)
    assert engine.received[0].headers[b"tracestate"] == b"vendor=a:1,b=2"
    assert server.resource["service.name"] == "detoserve-router"
    assert server.resource["service.instance.id"] == "edge-1"
    assert server.name == "POST /v1/chat/completions"
    decision = re.search(rb"(?i)x-detoserve-route: .*;d=(\w+)", answer)
    assert decision
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "sim",
        "detoserve.replica": "sim-r0",
        "detoserve.outcome": "ok",
        "detoserve.attempts": 1,
        "detoserve.decision": decision[1].decode(),
    }
    assert expected.items() <= server.attributes.items()
    assert client.name == "chat sim"
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "sim",
        "server.address": "127.0.0.1",
        "server.port": int(engine.url.rpartition(":")[2]),
        "detoserve.replica": "sim-r0",
        "detoserve.cluster": "here",
        "detoserve.outcome": "ok",
        "http.response.status_code": 200,
    }
    assert expected.items() <= client.attributes.items()
    assert "http.request.resend_count" not in client.attributes
    assert not server.is_error
    assert not client.is_error
    assert (
        before
        <= server.message.start_time_unix_nano
        <= client.message.start_time_unix_nano
        <= client.events["detoserve.first_token"]
        <= client.message.end_time_unix_nano
        <= server.message.end_time_unix_nano
        <= after
    )


async def test_without_a_trace_the_router_begins_one(tmp_path):
    async with (
        collector() as seen,
        fake_engine() as engine,
        running_router(
            routing_table(function(engine.url)), tmp_path, otlp_endpoint=seen.url
        ) as running,
    ):
        await raw(running.port, post(CHAT))
        await raw(running.port, post(CHAT))
    first, second = seen.servers
    assert first.parent == second.parent == ""
    assert first.trace_id != second.trace_id
    assert {sent_context(r) for r in engine.received} == {
        (span.trace_id, span.id, True) for span in seen.clients
    }


@pytest.mark.parametrize(
    "headers",
    [
        "traceparent: nonsense\r\n",
        f"traceparent: 00-{'0' * 32}-{PARENT}-01\r\n",
        SAMPLED + SAMPLED.upper().replace(TRACE.upper(), "1" * 32),
    ],
)
async def test_a_trace_that_is_none_or_two_is_not_continued(tmp_path, headers):
    async with (
        collector() as seen,
        fake_engine() as engine,
        running_router(
            routing_table(function(engine.url)), tmp_path, otlp_endpoint=seen.url
        ) as running,
    ):
        await raw(running.port, post(CHAT, headers=headers + "tracestate: vendor=1\r\n"))
    [server], [client] = seen.servers, seen.clients
    assert server.parent == ""
    assert server.trace_id not in (TRACE, "0" * 32, "1" * 32)
    assert sent_context(engine.received[0]) == (server.trace_id, client.id, True)
    assert b"tracestate" not in engine.received[0].headers


async def test_every_attempt_is_a_span_of_its_own(tmp_path):
    dead = f"http://127.0.0.1:{free_port()}"
    busy = http(b"{}", "503 Service Unavailable")
    async with collector() as seen, fake_engine(busy) as full, fake_engine() as good:
        urls = (dead, full.url, good.url)
        replicas = function(*urls, policy=ROUND_ROBIN)
        async with running_router(
            routing_table(replicas), tmp_path, otlp_endpoint=seen.url, probe_interval_s=0
        ) as running:
            for _ in range(6):
                await raw(running.port, post(CHAT))
    longest = max(seen.servers, key=lambda span: span.attributes["detoserve.attempts"])
    spans = [span for span in seen.clients if span.parent == longest.id]
    assert longest.attributes["detoserve.attempts"] == len(spans) >= 2
    assert [span.attributes.get("http.request.resend_count", 0) for span in spans] == list(
        range(len(spans))
    )
    assert len({span.attributes["detoserve.replica"] for span in spans}) == len(spans)
    last = spans[-1]
    assert longest.attributes["detoserve.replica"] == last.attributes["detoserve.replica"]
    assert last.attributes["detoserve.outcome"] == "ok"
    by_replica = {span.attributes["detoserve.replica"]: span for span in seen.clients}
    assert set(by_replica) == {"sim-r0", "sim-r1", "sim-r2"}
    refused, rejected = by_replica["sim-r0"], by_replica["sim-r1"]
    assert refused.is_error
    assert refused.attributes["detoserve.outcome"] == "upstream_error"
    assert "http.response.status_code" not in refused.attributes
    assert rejected.is_error
    assert rejected.attributes["http.response.status_code"] == 503
    assert rejected.attributes["error.type"] == "503"
    assert not rejected.events
    received = {sent_context(r)[1] for r in (*full.received, *good.received)}
    assert received == {
        span.id for span in seen.clients if span.attributes["detoserve.replica"] != "sim-r0"
    }


async def test_no_prompt_key_or_answer_leaves_with_a_trace_and_no_tenant_unless_asked(tmp_path):
    canary = "canary-7f3a"
    body = b'{"model":"sim","user":"%b","messages":[{"role":"user","content":"%b"}],"stream":true}'
    body = body.replace(b"%b", canary.encode())
    table = {"tenants": (tenant("acme-corp"),)}
    for shown in (False, True):
        async with (
            collector() as seen,
            fake_engine(events(b'data: {"text":"canary-7f3a"}\n\n', b"data: [DONE]\n\n")) as engine,
            running_router(
                routing_table(function(engine.url), **table),
                tmp_path,
                otlp_endpoint=seen.url,
                tenant_metrics=shown,
            ) as running,
        ):
            port, more = running.port, f"X-Note: {canary}\r\nUser-Agent: {canary}\r\n"
            path = f"/v1/chat/completions?note={canary}"
            assert canary.encode() in await raw(port, post(body, path=path, headers=more))
            await raw(port, post(body[:-1], headers=more))
            await raw(port, post(body.replace(b"sim", canary.encode()), headers=more))
            await raw(port, post(body, key=f"sk-{canary}"))
            await raw(port, post(body, path=f"/{canary}"))
        assert len(seen.servers) == 5
        exported = b"".join(seen.bodies)
        assert canary.encode() not in exported
        assert KEY.text.encode() not in exported
        assert (b"acme-corp" in exported) is shown
        assert seen.servers[0].attributes.get("detoserve.tenant") == (
            "acme-corp" if shown else None
        )


async def test_what_the_router_answers_itself_is_a_span_without_attempts(tmp_path):
    async with (
        collector() as seen,
        running_router(
            routing_table(function(f"http://127.0.0.1:{free_port()}")),
            tmp_path,
            otlp_endpoint=seen.url,
        ) as running,
    ):
        port = running.port
        await raw(port, post(CHAT, key="wrong"))
        await raw(port, b"GET /v1/models/sim HTTP/1.0\r\nApi-Key: %b\r\n\r\n" % KEY.text.encode())
        await raw(port, b"GET /nowhere HTTP/1.0\r\n\r\n")
        await raw(port, b"GET /health HTTP/1.0\r\n\r\n")
        await raw(port, post(CHAT))
    denied, listed, lost, failed = seen.servers
    assert denied.attributes["http.response.status_code"] == 401
    assert denied.attributes["detoserve.outcome"] == "refused"
    assert denied.attributes["detoserve.code"]
    assert not denied.is_error
    assert "gen_ai.request.model" not in denied.attributes
    assert (listed.name, listed.attributes["url.path"]) == (
        "GET /v1/models/{model}",
        "/v1/models/sim",
    )
    assert lost.name == "GET"
    assert lost.attributes["http.response.status_code"] == 404
    assert "url.path" not in lost.attributes
    assert failed.is_error
    assert failed.attributes["error.type"] == failed.attributes["detoserve.code"]
    assert {span.parent for span in seen.clients} == {failed.id}


async def test_a_stream_says_when_its_first_token_came_and_how_it_broke_off(tmp_path):
    proceed = asyncio.Event()

    async def breaks(_, writer):
        writer.write(SSE_HEAD + chunk(b"data: 1\n\n"))
        await writer.drain()
        await proceed.wait()
        writer.write(chunk(b"data: 2\n\n"))
        await writer.drain()
        writer.transport.abort()

    async with (
        collector() as seen,
        fake_engine(breaks) as engine,
        running_router(
            routing_table(function(engine.url)), tmp_path, otlp_endpoint=seen.url
        ) as running,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(post(STREAM))
        await reader.readuntil(b"data: 1\n\n")
        first_by = time.time_ns()
        proceed.set()
        await reader.read()
        writer.close()
    [server], [client] = seen.servers, seen.clients
    for span in (server, client):
        assert span.is_error
        assert span.attributes["detoserve.outcome"] == "interrupted"
        assert span.attributes["error.type"] == "interrupted"
        assert span.message.start_time_unix_nano <= span.events["detoserve.first_token"] <= first_by


async def test_a_client_that_leaves_ends_its_spans(tmp_path):
    async def hangs(_, writer):
        writer.write(SSE_HEAD + chunk(b"data: 1\n\n"))
        await writer.drain()
        await asyncio.Event().wait()

    async with (
        collector() as seen,
        fake_engine(hangs) as engine,
        running_router(
            routing_table(function(engine.url)), tmp_path, otlp_endpoint=seen.url
        ) as running,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(post(STREAM))
        await reader.readuntil(b"data: 1\n\n")
        writer.close()
        await eventually(lambda: running.router.state.in_flight.total == 0)
    [server], [client] = seen.servers, seen.clients
    for span in (server, client):
        assert span.attributes["detoserve.outcome"] == "client_gone"
        assert not span.is_error


async def test_the_ratio_is_for_those_whose_sender_has_not_decided(tmp_path):
    async with collector() as seen, fake_engine() as engine:
        for ratio in (0.0, 1.0):
            async with running_router(
                routing_table(function(engine.url)),
                tmp_path,
                otlp_endpoint=seen.url,
                trace_sample_ratio=ratio,
            ) as running:
                for headers in ("", SAMPLED, NOT_SAMPLED):
                    await raw(running.port, post(CHAT, headers=headers))
    assert [span.parent for span in seen.servers] == [PARENT, "", PARENT]
    assert len(seen.clients) == 3
    none, yes, no, *of_all = (sent_context(received) for received in engine.received)
    assert none[2] is False
    assert (yes[0], yes[2]) == (TRACE, True)
    assert (no[0], no[2]) == (TRACE, False)
    assert [context[2] for context in of_all] == [True, True, False]
    assert PARENT not in {yes[1], no[1]}


async def test_a_ratio_between_traces_some(tmp_path):
    async with (
        collector() as seen,
        fake_engine() as engine,
        running_router(
            routing_table(function(engine.url)),
            tmp_path,
            otlp_endpoint=seen.url,
            trace_sample_ratio=0.5,
        ) as running,
    ):
        await asyncio.gather(*(raw(running.port, post(CHAT)) for _ in range(150)))
    sampled = [context[1] for r in engine.received if (context := sent_context(r))[2]]
    assert 35 < len(seen.servers) < 115  # chances against it: one in 10^10
    assert sorted(sampled) == sorted(span.id for span in seen.clients)


async def test_the_standard_variables_do_what_no_setting_says(tmp_path, monkeypatch):
    async with collector() as seen, fake_engine() as engine:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", seen.url + "/base/")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Basic%20abc")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "edge")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=staging")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        async with running_router(routing_table(function(engine.url)), tmp_path) as running:
            await raw(running.port, post(CHAT, headers=SAMPLED))
            await raw(running.port, post(CHAT))
        async with running_router(
            routing_table(function(engine.url)), tmp_path, trace_service_name="ours"
        ) as running:
            await raw(running.port, post(CHAT, headers=SAMPLED))
    assert set(seen.paths) == {"/base/v1/traces"}
    assert seen.headers[0]["Authorization"] == "Basic abc"
    assert seen.headers[0]["Content-Encoding"] == "gzip"
    first, second = seen.servers
    assert first.resource["service.name"] == "edge"
    assert first.resource["deployment.environment.name"] == "staging"
    assert second.resource["service.name"] == "ours"


async def test_off_means_that_trace_headers_pass_byte_for_byte(tmp_path):
    lines = (
        f"TraceParent: 00-{TRACE}-{PARENT}-01\r\ntracestate: a=1\r\nTRACESTATE:  b=2;x\r\n"
        "traceparent: not one at all\r\nbaggage: k=v\r\n"
    )
    async with (
        fake_engine() as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as running,
    ):
        await raw(running.port, post(CHAT, headers=lines))
    expected = lines.replace("TRACESTATE:  ", "TRACESTATE: ").encode()
    assert expected in engine.received[0].head + b"\r\n"


def test_off_imports_neither_the_sdk_nor_the_exporter(tmp_path):
    path = tmp_path / "routes.msgpack"
    path.write_bytes(msgspec.msgpack.encode(routing_table()))
    code = (
        "import asyncio, sys\n"
        "from router.app import Router\n"
        "from router.settings import Settings\n"
        "async def run():\n"
        f"    async with Router(Settings(routes={str(path)!r}, port=0, admin_port=0)):\n"
        "        pass\n"
        "asyncio.run(run())\n"
        "ours = 'router.telemetry.tracing', 'opentelemetry.sdk.trace', 'opentelemetry.exporter', 'google'\n"
        "print([name for name in sys.modules if name.startswith(ours)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.strip() == "[]"


async def test_switched_on_without_the_package_the_router_does_not_start(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "router.telemetry.tracing")
    monkeypatch.delattr("router.telemetry.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsInvalid, match=r"otlp_endpoint: .*detoserve\[router,otel\]"):
        async with running_router(routing_table(), tmp_path, otlp_endpoint="http://127.0.0.1:4318"):
            pass


async def test_a_collector_that_is_away_costs_no_request_and_holds_up_no_end(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(tracing, "_FLUSH_S", 0.3)
    async with fake_engine() as engine:
        async with running_router(
            routing_table(function(engine.url)),
            tmp_path,
            otlp_endpoint=f"http://127.0.0.1:{free_port()}",
        ) as running:
            for _ in range(3):
                assert (await raw(running.port, post(CHAT))).startswith(b"HTTP/1.1 200")
            began = time.monotonic()
        assert time.monotonic() - began < 2
    assert "the last spans are lost" in caplog.text
