"""Bytes that no decent client sends: nothing slips through to an engine, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import zlib
from contextlib import asynccontextmanager

import msgspec
import psutil
import pytest

from schemas import api_keys
from schemas.wire.routing import Key
from tests.behaviour.router.harness import (
    CHAT,
    KEY,
    SSE_HEAD,
    STREAM,
    FakeEngine,
    RunningRouter,
    chunk,
    fake_engine,
    function,
    post,
    program,
    raw,
    routing_table,
    running_router,
    tenant,
)
from tests.support import eventually

LINE = "POST /v1/chat/completions HTTP/1.1\r\n"
AUTH = f"Host: router\r\nAuthorization: Bearer {KEY.text}\r\n"
CLOSE = "Connection: close\r\n"
SMUGGLED = post(b'{"model":"sim","smuggled":true}')
LENGTH = f"Content-Length: {len(CHAT)}\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"


def request(headers: str, body: bytes = b"", *, line: str = LINE) -> bytes:
    return f"{line}{AUTH}{headers}\r\n".encode("latin-1") + body


def answers(data: bytes) -> list[tuple[int, bytes]]:
    """Status and body of every answer on a connection; all of them say their length."""
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        (length,) = (int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        found.append((int(head.split()[1]), rest[:length]))
        data = rest[length:]
    return found


@asynccontextmanager
async def pair(tmp_path, **settings):
    async with (
        fake_engine() as engine,
        running_router(
            routing_table(function(engine.url)), tmp_path, probe_interval_s=0, **settings
        ) as router,
    ):
        yield engine, router


async def refused(
    engine: FakeEngine, router: RunningRouter, data: bytes, *statuses: int
) -> dict[str, object]:
    """Sends it; exactly one refusal comes, in OpenAI's shape, and no engine hears of it."""
    (answer,) = answers(await raw(router.port, data))
    assert answer[0] in statuses, answer
    error = json.loads(answer[1])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert engine.connections == 0
    router.assert_idle()
    return error


FRAMING = {
    "lengths differ": request(f"{LENGTH}Content-Length: 3\r\n", CHAT + SMUGGLED),
    "length twice": request(LENGTH + LENGTH, CHAT + SMUGGLED),
    "length list": request(f"Content-Length: {len(CHAT)}, {len(CHAT)}\r\n", CHAT + SMUGGLED),
    "length with sign": request(f"Content-Length: +{len(CHAT)}\r\n", CHAT + SMUGGLED),
    "length negative": request("Content-Length: -1\r\n", SMUGGLED),
    "length in hex": request("Content-Length: 0x10\r\n", SMUGGLED),
    "length overflows": request(f"Content-Length: {2**64 + 5}\r\n", SMUGGLED),
    "length empty": request("Content-Length:\r\n", SMUGGLED),
    "space before colon": request(f"Content-Length : {len(CHAT)}\r\n", CHAT + SMUGGLED),
    "length and chunked": request(LENGTH + CHUNKED, b"0\r\n\r\n" + SMUGGLED),
    "chunked and length": request(CHUNKED + LENGTH, b"0\r\n\r\n" + SMUGGLED),
    "chunked twice": request(CHUNKED + CHUNKED, b"0\r\n\r\n" + SMUGGLED),
    "chunked not last": request(
        "Transfer-Encoding: chunked, identity\r\n", b"0\r\n\r\n" + SMUGGLED
    ),
    "coding unknown": request("Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n" + SMUGGLED),
    "coding with vertical tab": request(
        "Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n" + SMUGGLED
    ),
    "coding space colon": request("Transfer-Encoding : chunked\r\n", b"0\r\n\r\n" + SMUGGLED),
    "folded": request(f"X-A: b\r\n Content-Length: 3\r\n{LENGTH}", CHAT),
    "folded coding": request("Transfer-Encoding:\r\n chunked\r\n", b"0\r\n\r\n" + SMUGGLED),
    "NUL in a value": request(f"X-A: b\0c\r\n{LENGTH}", CHAT),
    "NUL in a name": request(f"X\0A: b\r\n{LENGTH}", CHAT),
    "CR in a value": request(f"X-A: b\rX-B: c\r\n{LENGTH}", CHAT),
    "no colon": request(f"nonsense\r\n{LENGTH}", CHAT),
    "empty name": request(f": b\r\n{LENGTH}", CHAT),
    "huge value": request(f"X-A: {'a' * 200_000}\r\n{LENGTH}", CHAT),
    "huge name": request(f"{'X' * 200_000}: a\r\n{LENGTH}", CHAT),
    "huge target": request(LENGTH, CHAT, line=f"POST /{'a' * 200_000} HTTP/1.1\r\n"),
    "many headers": request("".join(f"X-{i}: a\r\n" for i in range(20_000)) + LENGTH, CHAT),
    "lower-case method": request(LENGTH, CHAT, line=LINE.replace("POST", "post")),
    "two spaces": request(LENGTH, CHAT, line=LINE.replace("POST ", "POST /x ")),
    "framing in a trailer": request(CHUNKED, chunk(CHAT) + b"0\r\nContent-Length: 3\r\n\r\n"),
    "rest after the last": post(CHAT) + SMUGGLED,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "TLS hello": bytes.fromhex("1603010200010001fc0303") + bytes(500),
}


@pytest.mark.parametrize("data", FRAMING.values(), ids=FRAMING)
async def test_a_request_that_two_readers_could_read_differently_is_refused(tmp_path, data):
    async with pair(tmp_path) as (engine, router):
        error = await refused(engine, router, data, 400)
        assert error["code"] == "invalid_http"


CHUNKS = {
    "no number": b"zz\r\n" + CHAT,
    "negative": b"-1\r\n" + CHAT,
    "prefix": b"0x%x\r\n%b\r\n0\r\n\r\n" % (len(CHAT), CHAT),
    "overflow": b"fffffffffffffffff\r\n" + CHAT,
    "longer than said": b"%x\r\n%b\r\n0\r\n\r\n" % (len(CHAT) - 5, CHAT),
    "line feed alone": b"%x\n%b\n0\n\n" % (len(CHAT), CHAT),
}


@pytest.mark.parametrize("body", CHUNKS.values(), ids=CHUNKS)
async def test_a_body_in_bad_chunks_reaches_no_engine(tmp_path, body):
    async with pair(tmp_path) as (engine, router):
        await refused(engine, router, request(CHUNKED, body + SMUGGLED), 400)


ONE_REQUEST = {
    "body that looks like a request": post(CHAT[:-1] + b' ,"x":"' + b"GET /x HTTP/1.1" + b'"}'),
    "chunks": request(CHUNKED + CLOSE, chunk(CHAT[:9]) + chunk(CHAT[9:]) + b"0\r\n\r\n"),
    "chunk extension": request(CHUNKED + CLOSE, b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(CHAT), CHAT)),
    "trailers": request(
        CHUNKED + CLOSE,
        chunk(CHAT) + b"0\r\nAuthorization: Bearer x\r\nX-Trailer: 1\r\n\r\n",
    ),
    "blanks around values": request(f"X-A: \t b \t\r\n{LENGTH}{CLOSE}", CHAT),
    "a line before": b"\r\n" + post(CHAT),
    "HTTP/1.0": post(CHAT).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "HTTP/1.0 without a host": post(CHAT).replace(b"HTTP/1.1\r\nHost: router", b"HTTP/1.0"),
    "escaped line end in the query": post(CHAT, path="/v1/chat/completions?a=%0d%0aX-B:%20c"),
    "key in lower-case header": post(CHAT).replace(b"Authorization", b"authorization"),
    "hop by hop framing": post(CHAT).replace(b"close", b"close, Content-Length, Host"),
}


@pytest.mark.parametrize("data", ONE_REQUEST.values(), ids=ONE_REQUEST)
async def test_an_engine_gets_exactly_one_request_with_a_length(tmp_path, data):
    async with pair(tmp_path) as (engine, router):
        ((status, _),) = answers(await raw(router.port, data))
        assert status == 200
        (seen,) = engine.received
        assert seen.line.startswith(b"POST /v1/chat/completions")
        assert json.loads(seen.body)["messages"]
        names = [line.partition(b":")[0].lower() for line in seen.head.split(b"\r\n")[1:]]
        assert names.count(b"content-length") == names.count(b"host") == 1
        assert not {b"transfer-encoding", b"authorization", b"x-trailer", b"x-b"} & set(names)
        router.assert_idle()


TARGETS = [
    "http://127.0.0.1/v1/chat/completions",
    "//v1/chat/completions",
    "/v1//chat/completions",
    "/V1/chat/completions",
    "/v1/chat/completions/",
    "/v1/chat/completions/..",
    "/v1/chat/completions%20",
    "/v1/chat/completions%00",
    "/v1/chat/completions;a=b",
    "/v1/chat/%63ompletions",
    "/v1/chat%2fcompletions",
    "/v1/%2e%2e/pause",
    "/v1/../pause",
    "/v1/chat/completions/%2e%2e/%2e%2e/pause",
    "/v1/responses/%2e%2e/%2e%2e/pause",
    "/v1/responses/../../pause",
    "/v1/responses/a/../cancel",
    "/v1/models/..%2f..%2fpause",
    "/pause",
    "/score/../pause",
    "/invocations",
    "/collective_rpc",
    "/metrics",
    "*",
]


async def test_only_the_exact_paths_lead_to_an_engine(tmp_path):
    async with pair(tmp_path) as (engine, router):
        for target in TARGETS:
            for method in ("POST", "GET", "DELETE"):
                line = f"{method} {target} HTTP/1.1\r\n"
                await refused(
                    engine, router, request(LENGTH + CLOSE, CHAT, line=line), 400, 404, 405
                )


@pytest.mark.parametrize("method", ["HEAD", "PUT", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
async def test_other_methods_are_refused(tmp_path, method):
    async with pair(tmp_path) as (engine, router):
        answer = await raw(router.port, post(CHAT).replace(b"POST", method.encode(), 1))
        assert b" 405 " in answer.partition(b"\r\n")[0]
        assert engine.connections == 0


async def test_nobody_becomes_a_tunnel(tmp_path):
    async with pair(tmp_path) as (engine, router):
        port = engine.url.rpartition(":")[2]
        line = f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n"
        answer = await raw(router.port, request(CLOSE, SMUGGLED, line=line))
        assert b" 200 " not in answer.partition(b"\r\n")[0]
        assert engine.connections == 0


async def test_each_of_two_requests_in_one_packet_counts_by_its_own_key(tmp_path):
    other = api_keys.create()
    async with fake_engine() as engine:
        tenants = (
            tenant(models=("sim",)),
            tenant("guest", models=("none",), keys=(Key(id=other.id, sha256=bytes.fromhex(other.sha256)),)),
        )  # fmt: skip
        table = routing_table(function(engine.url), tenants=tenants)
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            mine, last = post(CHAT).replace(CLOSE.encode(), b""), post(CHAT)
            theirs = post(CHAT, key=other.text).replace(CLOSE.encode(), b"")
            nobodys = mine.replace(f"Authorization: Bearer {KEY.text}\r\n".encode(), b"")
            got = answers(await raw(router.port, mine + theirs + nobodys + last))
            assert [status for status, _ in got] == [200, 404, 401, 200]
            assert len(engine.received) == 2


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (request(f"Content-Length: {len(SMUGGLED)}\r\n", SMUGGLED, line="POST /pause HTTP/1.1\r\n"), 404),
        (request(f"Content-Length: {len(SMUGGLED)}\r\n", SMUGGLED, line="GET /v1/models HTTP/1.1\r\n"), 200),
        (post(SMUGGLED, key="wrong").replace(CLOSE.encode(), b"", 1), 401),
        (post(SMUGGLED).replace(CLOSE.encode(), b"", 1), 400),
        (request(CHUNKED, chunk(SMUGGLED) + b"0\r\n\r\n", line="POST /pause HTTP/1.1\r\n"), 404),
    ],
    ids=["unknown path", "GET with a body", "wrong key", "no JSON", "chunks"],
)  # fmt: skip
async def test_the_body_of_what_is_refused_is_never_a_request(tmp_path, first, status):
    async with pair(tmp_path) as (engine, router):
        got = answers(await raw(router.port, first + post(CHAT)))
        assert [s for s, _ in got] in (
            [status, 200],
            [status],
        )  # going on, or closing, are both sound
        assert len(engine.received) == len(got) - 1
        assert all(b"smuggled" not in seen.body for seen in engine.received)


async def test_headers_with_underscores_do_not_say_who_is_asking(tmp_path):
    sent = "X_Forwarded_For: 1.2.3.4\r\nX_User_Id: root\r\nContent_Length: 3\r\nX_Custom: yes\r\n"
    async with pair(tmp_path) as (engine, router):
        assert b" 200 " in await raw(router.port, post(CHAT, headers=sent))
        names = {name for name in engine.received[0].headers if b"_" in name}
        assert names == {b"x_custom"}


async def test_what_a_client_calls_its_request_cannot_split_an_answer(tmp_path):
    async with pair(tmp_path) as (engine, router):
        for name in ("a b", "a%0d%0ab", "é", "a" * 1000, "a;b", ""):
            data = post(CHAT, headers=f"X-Request-Id: {name}\r\n")
            head = (await raw(router.port, data)).partition(b"\r\n\r\n")[0]
            assert b" 200 " in head
            assert f"x-request-id: {name}\r\n".encode() not in head + b"\r\n" or name == "a%0d%0ab"
            assert engine.received[-1].headers[b"x-request-id"].startswith(b"req_")


BODIES = {
    "empty": b"",
    "blank": b"  \n",
    "half": CHAT[:-1],
    "twice": CHAT * 2,
    "no object": b'"model"',
    "UTF-16": CHAT.decode().encode("utf-16"),
    "with BOM": b"\xef\xbb\xbf" + CHAT,
    "control character": CHAT.replace(b"hi", b"h\x01i"),
    "no number": CHAT[:-1] + b',"x":NaN}',
    "deep lists": CHAT[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": CHAT[:-1] + b',"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "n is huge": CHAT[:-1] + b',"n":1000000}',
    "n is beyond all": CHAT[:-1] + b',"n":1' + b"0" * 400 + b"}",
    "n is no integer": CHAT[:-1] + b',"n":1.5}',
    "n is text": CHAT[:-1] + b',"n":"999"}',
    "n is a list": CHAT[:-1] + b',"n":[999]}',
    "n once more": CHAT[:-1] + b',"n":1,"n":1000}',
    "n in escapes": CHAT[:-1] + b',"\\u006e":1000}',
    "best_of": CHAT[:-1] + b',"best_of":1000}',
    "model is a list": CHAT.replace(b'"sim"', b'["sim"]'),
    "model is null": CHAT.replace(b'"sim"', b"null"),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_bodies_that_make_no_sense_are_400(tmp_path, body):
    async with pair(tmp_path) as (engine, router):
        error = await refused(engine, router, post(body), 400)
        assert error["code"] == "invalid_json"


async def test_a_bomb_costs_no_more_than_the_largest_body_and_holds_up_nobody(tmp_path):
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    blanks = b" " * 2**20
    packed = b"".join(packer.compress(blanks) for _ in range(200)) + packer.flush()
    async with pair(tmp_path, max_body_bytes=50 * 2**20) as (engine, router):
        before, longest_s, loop = (
            psutil.Process().memory_info().rss,
            0.0,
            asyncio.get_running_loop(),
        )
        data = post(packed, headers="Content-Encoding: gzip\r\n")
        bombing = asyncio.create_task(refused(engine, router, data, 413))
        while not bombing.done():
            started = loop.time()
            await asyncio.sleep(0)
            longest_s = max(longest_s, loop.time() - started)
        assert (await bombing)["code"] == "request_too_large"
        assert psutil.Process().memory_info().rss - before < 100 * 2**20
        assert longest_s < 0.1


async def test_a_trailer_is_no_header_of_the_next_request(tmp_path):
    first = request(CHUNKED, chunk(CHAT) + b"0\r\nX-Trailer: 1\r\n\r\n")
    async with pair(tmp_path) as (engine, router):
        got = answers(await raw(router.port, first + post(CHAT)))
        assert [status for status, _ in got] == [200, 200]
        assert all(b"x-trailer" not in seen.headers for seen in engine.received)


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip, gzip", gzip.compress(gzip.compress(CHAT, mtime=0), mtime=0), 415),
        ("br", CHAT, 415),
        ("zstd", CHAT, 415),
        ("gzip", CHAT, 400),
        ("gzip", gzip.compress(CHAT, mtime=0)[:-20], 400),
        ("deflate", b"\x00" * 50, 400),
    ],
    ids=["twice", "brotli", "zstd", "not gzip", "cut off", "not deflate"],
)
async def test_encodings_that_are_not_understood_or_not_true_are_refused(
    tmp_path, encoding, body, status
):
    async with pair(tmp_path) as (engine, router):
        data = post(body, headers=f"Content-Encoding: {encoding}\r\n")
        await refused(engine, router, data, status)


@pytest.mark.parametrize("size", [1_000_001, 2**40])
async def test_a_body_that_is_said_to_be_too_long_is_refused_at_once(tmp_path, size):
    async with pair(tmp_path, max_body_bytes=1_000_000) as (engine, router):
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(request(f"Content-Length: {size}\r\n", b" "))
        async with asyncio.timeout(3):
            assert b" 413 " in await reader.readline()
        writer.close()
        assert engine.connections == 0


async def trickle(writer: asyncio.StreamWriter, piece: bytes) -> None:
    """Never quite idle."""
    while not writer.is_closing():
        writer.write(piece)
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("start", "piece"),
    [(f"{LINE}{AUTH}".encode(), b"X-A: b\r\n"), (f"{LINE}X-A: ".encode(), b"a")],
    ids=["lines", "letters"],
)
async def test_a_head_that_never_ends_is_cut_off(tmp_path, start, piece):
    async with pair(tmp_path, keepalive_timeout_s=0.5) as (engine, router):
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(start)
        slowly = asyncio.create_task(trickle(writer, piece))
        try:
            async with asyncio.timeout(4):
                assert not (await reader.read()).startswith(b"HTTP/1.1 200")
        except ConnectionResetError:
            pass
        finally:
            slowly.cancel()
            writer.close()
        assert engine.connections == 0


async def test_200_clients_that_never_read_cost_no_memory(tmp_path):
    sent = 0
    everybody_waits = asyncio.Event()

    async def flood(_, writer):
        nonlocal sent
        writer.write(SSE_HEAD)
        await everybody_waits.wait()
        piece = chunk(b"data: " + b"x" * 65_000 + b"\n\n")
        while True:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)

    async with fake_engine(flood) as engine:
        path = tmp_path / "routes"
        path.write_bytes(msgspec.msgpack.encode(routing_table(function(engine.url))))
        async with program(
            "router", "--port", "0", "--admin-port", "0", "--routes", str(path),
            "--probe-interval-s", "0",
        ) as router:  # fmt: skip
            port = int(router.url.rpartition(":")[2])
            clients = []
            for _ in range(200):
                # Small on this side, or the kernel would read a lot for whoever reads nothing.
                client = socket.socket()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", port))
                client.sendall(post(STREAM))
                clients.append(client)
            await eventually(lambda: len(engine.received) == 200)
            process = psutil.Process(router.process.pid)
            before = process.memory_info().rss
            everybody_waits.set()
            seen = -1

            async def stands_still() -> bool:
                nonlocal seen
                last, seen = seen, sent
                await asyncio.sleep(0.2)
                return last == sent

            await eventually(stands_still, timeout_s=20)
            held = process.memory_info().rss - before
            assert held < 200 * 300_000 < sent, held
            for client in clients:
                client.close()
            # But for what a busy engine is spared.
            await eventually(lambda: engine.open <= 2)
