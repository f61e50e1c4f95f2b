"""Clients over TLS, through real Envoy as `deploy/envoy` sets it up, to real routers."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import openai
import pytest
from cryptography import x509
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from tests.behaviour.router.harness import (
    KEY,
    SSE_HEAD,
    FakeEngine,
    Program,
    Received,
    chunk,
    fake_engine,
    function,
    http,
    program,
    routing_table,
)
from tests.e2e.envoy_process import Envoy, running_envoy
from tests.support import eventually

pytestmark = pytest.mark.e2e

MESSAGES = [{"role": "user", "content": "hi"}]
COMPLETION = json.dumps(
    {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "simulated",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "hello"},
            }
        ],
    }
).encode()


def event(text: str) -> bytes:
    """One chunk of a streamed chat, as an engine sends it."""
    data = {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "simulated",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    }
    return chunk(b"data: " + json.dumps(data).encode() + b"\n\n")


END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@asynccontextmanager
async def routers(engine: FakeEngine, folder: Path, count: int = 1, *flags: str):
    """Router processes that all send to this engine."""
    path = folder / "routes.msgpack"
    path.write_bytes(msgspec.msgpack.encode(routing_table(function(engine.url))))
    started: list[Program] = []
    async with AsyncExitStack() as stack:
        for _ in range(count):
            command = ("router", "--port", "0", "--admin-port", "0", "--routes", str(path), *flags)
            started.append(await stack.enter_async_context(program(*command)))
        yield started


@asynccontextmanager
async def connected(envoy: Envoy, *, http2: bool = False) -> AsyncIterator[AsyncOpenAI]:
    """The client that people use, over https; it never tries again by itself."""
    transport = DefaultAsyncHttpxClient(verify=envoy.certificate.trust(), http2=http2)
    async with AsyncOpenAI(
        base_url=f"{envoy.url}/v1", api_key=KEY.text, max_retries=0, http_client=transport
    ) as client:
        yield client


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_tokens_come_as_the_engine_sends_them(tmp_path, http2):
    go_on = asyncio.Event()

    async def one_by_one(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + event("first"))
        await go_on.wait()
        writer.write(event("second"))
        writer.write(END)

    async with (
        fake_engine(one_by_one) as engine,
        routers(engine, tmp_path) as (router,),
        running_envoy(tmp_path, router.url) as envoy,
        connected(envoy, http2=http2) as client,
    ):
        stream = await client.chat.completions.create(model="sim", messages=MESSAGES, stream=True)
        assert stream.response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        tokens = aiter(stream)
        async with asyncio.timeout(2):
            assert (await anext(tokens)).choices[0].delta.content == "first"
        assert not go_on.is_set()
        go_on.set()
        assert [part.choices[0].delta.content async for part in tokens] == ["second"]
        assert "x-detoserve-route" in stream.response.headers
        assert stream.response.headers.get("server") != "envoy"


@pytest.mark.parametrize("when", ["before-the-first-token", "mid-stream"])
@pytest.mark.parametrize("protocol", ["http1", "http2"])
async def test_a_client_that_leaves_frees_the_engine_within_a_second(tmp_path, protocol, when):
    async def never_ends(_: Received, writer: asyncio.StreamWriter) -> None:
        if when == "mid-stream":
            writer.write(SSE_HEAD + event("first"))
        await asyncio.Event().wait()

    async with (
        fake_engine(never_ends) as engine,
        routers(engine, tmp_path, 1, "--probe-interval-s", "0") as (router,),
        running_envoy(tmp_path, router.url) as envoy,
    ):
        engine.gone.clear()
        leave = _leave_http2 if protocol == "http2" else _leave_http1
        async with leave(envoy, engine, mid_stream=when == "mid-stream"):
            async with asyncio.timeout(1):
                await engine.gone.wait()

        async def nothing_runs() -> bool:
            return await in_flight(envoy, router) == 0

        await eventually(nothing_runs, timeout_s=2)


@asynccontextmanager
async def _leave_http1(
    envoy: Envoy, engine: FakeEngine, *, mid_stream: bool
) -> AsyncIterator[None]:
    """The block runs when the client has left; its other connections stay."""
    async with connected(envoy) as client:
        asked = asyncio.create_task(
            client.chat.completions.create(model="sim", messages=MESSAGES, stream=True)
        )
        await eventually(lambda: engine.received)
        if mid_stream:
            stream = await asked
            await anext(aiter(stream))
            await stream.close()
        else:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        yield


@asynccontextmanager
async def _leave_http2(
    envoy: Envoy, engine: FakeEngine, *, mid_stream: bool
) -> AsyncIterator[None]:
    """The same by RST_STREAM. httpx sends none: it lets a stream that it has left run on."""
    context = envoy.certificate.trust()
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection("127.0.0.1", envoy.port, ssl=context)
    http2 = H2Connection()
    http2.initiate_connection()
    body = json.dumps({"model": "sim", "messages": MESSAGES, "stream": True}).encode()
    http2.send_headers(
        1,
        [
            *((":method", "POST"), (":path", "/v1/chat/completions")),
            *((":scheme", "https"), (":authority", "here")),
            *(("authorization", f"Bearer {KEY.text}"), ("content-length", str(len(body)))),
        ],
    )
    http2.send_data(1, body, end_stream=True)
    writer.write(http2.data_to_send())
    await eventually(lambda: engine.received)
    received: list[object] = []
    while mid_stream and not any(isinstance(one, DataReceived) for one in received):
        received += http2.receive_data(await reader.read(65536))
    http2.reset_stream(1, ErrorCodes.CANCEL)
    writer.write(http2.data_to_send())
    yield
    assert not reader.at_eof()  # the connection lives on for other streams
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)


FORBIDDEN = (
    *("x-detoserve-dst", "x-detoserve-route", "x-detoserve-tenant", "x-detoserve-anything"),
    *("x-envoy-original-dst-host", "x-envoy-upstream-rq-timeout-ms", "x-envoy-retry-on"),
    *("x-envoy-max-retries", "x-envoy-internal", "x-envoy-decorator-operation"),
    *("x-user", "x-user-id", "x-tenant", "x-tenant-id", "x-remote-user", "x-auth-request-email"),
    *("x-consumer-username", "x-organization-id", "x-account", "x-identity", "x-goog-iap-jwt"),
    *("x-amzn-oidc-identity", "x-ms-client-principal", "x-ssl-client-verify", "x-real-ip"),
    *("forwarded", "x-forwarded-for", "x-forwarded-user", "x-forwarded-client-cert"),
    *("x-client-cert", "true-client-ip", "cf-connecting-ip", "remote-user", "gcp-project"),
    *("metadata-flavor", "openai-organization", "openai-project"),
    *("x_user", "x_detoserve_dst", "x_envoy_original_dst_host", "remote_user"),
)


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_what_a_client_may_not_say_never_arrives(tmp_path, http2):
    async with (
        fake_engine(http(COMPLETION)) as behind,
        running_envoy(tmp_path, behind.url) as envoy,
        connected(envoy, http2=http2) as client,
    ):
        await client.chat.completions.create(
            model="sim",
            messages=MESSAGES,
            extra_headers={
                **dict.fromkeys(FORBIDDEN, "127.0.0.1:1"),
                "X-Detoserve-Route": "127.0.0.1:1",
                "x-request-id": "mine",
                "x-session-id": "s1",
                "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            },
        )
        (got,) = [one for one in behind.received if one.line.startswith(b"POST ")]
        names = {name.decode() for name in got.headers}
        assert names.isdisjoint(FORBIDDEN)
        assert b"127.0.0.1:1" not in got.headers.values()
        assert got.headers[b"authorization"] == f"Bearer {KEY.text}".encode()
        assert got.headers[b"x-request-id"] == b"mine"
        assert got.headers[b"x-session-id"] == b"s1"
        assert b"traceparent" in got.headers
        assert json.loads(got.body)["messages"] == MESSAGES


async def test_a_router_that_is_not_ready_gets_no_requests(tmp_path):
    refuses = http(b"{}", "503 Service Unavailable")
    async with (
        fake_engine(http(COMPLETION)) as ready,
        fake_engine(refuses) as unready,
        running_envoy(tmp_path, ready.url, unready.url) as envoy,
        connected(envoy) as client,
    ):

        def asked(one: FakeEngine) -> int:
            return sum(r.line.startswith(b"POST ") for r in one.received)

        async def ten_go_to(chosen: FakeEngine, other: FakeEngine) -> bool:
            before = asked(chosen), asked(other)
            for _ in range(10):
                await client.chat.completions.create(model="sim", messages=MESSAGES)
            return (asked(chosen), asked(other)) == (before[0] + 10, before[1])

        await eventually(lambda: ten_go_to(ready, unready))
        assert asked(unready) == 0
        assert any(r.line.startswith(b"GET /ready ") for r in unready.received)
        ready.answer, unready.answer = refuses, http(COMPLETION)
        await eventually(lambda: ten_go_to(unready, ready))


async def test_without_a_ready_router_the_refusal_is_one_that_clients_understand(tmp_path):
    async with (
        fake_engine(http(b"{}", "503 Service Unavailable")) as unready,
        running_envoy(tmp_path, unready.url) as envoy,
        connected(envoy) as client,
    ):
        with pytest.raises(openai.InternalServerError) as refused:
            await client.chat.completions.create(model="sim", messages=MESSAGES)
        assert refused.value.status_code == 503
        assert refused.value.code == "gateway_error"
        assert refused.value.type == "server_error"
        assert refused.value.response.headers["retry-after"] == "1"
        assert not [r for r in unready.received if r.line.startswith(b"POST ")]


async def both_are_known(envoy: Envoy) -> bool:
    return await envoy.stat("cluster.routers.membership_healthy") == 2


async def in_flight(envoy: Envoy, router: Program) -> int:
    """Requests that the router carries, by its own word."""
    async with envoy.session.get(f"{router.ready['admin_url']}/status") as response:
        return int((await response.json())["in_flight"])


async def test_a_router_that_is_killed_loses_no_request_without_a_first_byte(tmp_path):
    go_on = asyncio.Event()
    long = [{"role": "user", "content": "x" * 200_000}]

    async def slow(_: Received, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await http(COMPLETION)(_, writer)

    async with (
        fake_engine(slow) as engine,
        routers(engine, tmp_path, 2, "--probe-interval-s", "0") as (first, second),
        running_envoy(tmp_path, first.url, second.url) as envoy,
        connected(envoy) as client,
    ):
        await eventually(lambda: both_are_known(envoy))
        asked = [
            asyncio.create_task(client.chat.completions.create(model="sim", messages=long))
            for _ in range(10)
        ]
        await eventually(lambda: len(engine.received) == 10)
        carried = {router.url: await in_flight(envoy, router) for router in (first, second)}
        assert sum(carried.values()) == 10
        victim = max((first, second), key=lambda router: carried[router.url])
        victim.signal(signal.SIGKILL)
        await eventually(lambda: len(engine.received) == 10 + carried[victim.url])
        go_on.set()
        for answer in await asyncio.gather(*asked):
            assert answer.choices[0].message.content == "hello"
        for _ in range(10):
            await client.chat.completions.create(model="sim", messages=MESSAGES)


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_a_large_body_arrives_whole(tmp_path, http2):
    async with (
        fake_engine(http(COMPLETION)) as engine,
        routers(engine, tmp_path) as (router,),
        running_envoy(tmp_path, router.url) as envoy,
        connected(envoy, http2=http2) as client,
    ):
        long = "".join(f"{i} " for i in range(500_000))
        await client.chat.completions.create(
            model="sim", messages=[{"role": "user", "content": long}]
        )
        (got,) = [one for one in engine.received if one.line.startswith(b"POST ")]
        assert json.loads(got.body)["messages"][0]["content"] == long


async def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path):
    async with fake_engine() as engine, running_envoy(tmp_path, engine.url) as envoy:

        async def shown() -> int:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            _, writer = await asyncio.open_connection("127.0.0.1", envoy.port, ssl=context)
            try:
                der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
                return x509.load_der_x509_certificate(der).serial_number
            finally:
                writer.close()
                await writer.wait_closed()

        before = envoy.certificate.serial
        assert await shown() == before
        envoy.certificate.renew()

        async def renewed() -> bool:
            return await shown() == envoy.certificate.serial != before

        await eventually(renewed)


async def test_a_drain_takes_nothing_new_and_lets_streams_finish(tmp_path):
    go_on = asyncio.Event()

    async def held(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + event("first"))
        await go_on.wait()
        writer.write(event("second") + END)

    async with (
        fake_engine(held) as engine,
        routers(engine, tmp_path) as (router,),
        running_envoy(tmp_path, router.url) as envoy,
        connected(envoy) as client,
    ):
        stream = await client.chat.completions.create(model="sim", messages=MESSAGES, stream=True)
        await envoy.ask("/drain_listeners", method="POST")

        async def refused() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", envoy.port)
            except ConnectionRefusedError:
                return True
            writer.close()
            return False

        await eventually(refused)
        assert await envoy.stat("http.https.downstream_rq_active") == 1
        go_on.set()
        texts = [part.choices[0].delta.content async for part in stream]
        assert texts == ["first", "second"]

        async def quiet() -> bool:
            return await envoy.stat("http.https.downstream_rq_active") == 0

        await eventually(quiet)


async def test_a_client_without_tls_is_turned_away(tmp_path):
    async with fake_engine() as engine, running_envoy(tmp_path, engine.url) as envoy:
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await envoy.session.get(f"http://127.0.0.1:{envoy.port}/ready")
        assert not [r for r in engine.received if b"/ready" not in r.line]
