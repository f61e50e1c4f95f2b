"""A head that is known by its bytes is read as llhttp reads it, or not at all."""

from __future__ import annotations

import asyncio

import httptools
from hypothesis import example, given
from hypothesis import strategies as st

from router.core.errors import Refusal
from router.downstream.connection import ClientConnection, ClientServer
from router.downstream.request import Request
from router.downstream.same_head import KnownHeads, SameHead
from tests.silent_transport import SilentTransport

HEAD = b"POST /v1/chat/completions?x=1 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer k\r\n"


class Heard:
    """A handler that keeps what it is asked, and answers at once."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def look_at_head(self, request: Request) -> Refusal | bool:
        return False

    def serve(self, request: Request, client: ClientConnection) -> None:
        self.requests.append(request)
        client.done(keep=request.keep_alive)


def heard(
    *reads: bytes, remember: bool, max_body_bytes: int = 1000, apart: bool = False
) -> list[tuple]:
    """What a handler hears of a connection, or `apart`, of one for each read.

    `remember`: whether a head may be known again.
    """

    async def run() -> list[tuple]:
        handler = Heard()
        server = ClientServer(
            handler, max_body_bytes=max_body_bytes, body_timeout_s=10, keepalive_s=10
        )
        connection = server()
        connection.connection_made(SilentTransport())
        for data in reads:
            connection.data_received(data)
            await asyncio.sleep(0)
            if not remember:
                connection._same_head = None
                server.heads = KnownHeads()
            if apart:
                connection.connection_lost(None)
                connection = server()
                connection.connection_made(SilentTransport())
        connection.connection_lost(None)
        return [
            (r.method, r.target, r.path, bare(r.headers), r.body, r.keep_alive, r.modern)
            for r in handler.requests
        ]

    return asyncio.run(run())


def bare(headers):
    """Without the length, of which a head that is known again still has the first."""
    return [(name, value) for name, value in headers if name.lower() != b"content-length"]


def request(body: bytes, *, head: bytes = HEAD, length: bytes | None = None) -> bytes:
    told = b"%d" % len(body) if length is None else length
    return head + b"Content-Length: " + told + b"\r\nAccept: */*\r\n\r\n" + body


def test_the_same_head_with_another_length_is_known():
    first = request(b"one")
    read = Request([(b"Content-Length", b"3")])
    read.method, read.path = "POST", "/v1/chat/completions"
    read.target = f"{read.path}?x=1"
    read.body = b"one"
    read.keep_alive = read.modern = True
    known = SameHead.of(first, read)
    assert known is not None
    again = known.again(request(b"another body"), 1000)
    assert again is not None
    assert (again.method, again.path, again.body) == ("POST", read.path, b"another body")
    assert known.again(request(b"x" * 1001), 1000) is None
    assert known.again(request(b"x", head=HEAD.replace(b"Bearer k", b"Bearer l")), 1000) is None
    for cut in range(len(first)):
        assert known.again(first[:cut], 1000) is None
    # No prompt is kept for the next request.
    assert known._request.body == b""


@given(st.data())
def test_it_is_heard_as_it_would_be_without_a_memory(data):
    bodies = data.draw(st.lists(st.binary(max_size=20), min_size=1, max_size=5))
    reads = [request(body) for body in bodies]
    which = data.draw(st.integers(0, len(reads) - 1))
    spoilt = bytearray(reads[which])
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(spoilt) - 1))
        how = data.draw(st.sampled_from(["replace", "remove", "insert"]))
        byte = data.draw(st.sampled_from(b"\r\n:0129 aZ\x00\xff"))
        if how == "replace":
            spoilt[at] = byte
        elif how == "remove":
            del spoilt[at]
        else:
            spoilt.insert(at, byte)
    reads[which] = bytes(spoilt)
    if data.draw(st.booleans()):
        reads = [b"".join(reads)]
    elif data.draw(st.booleans()):
        whole = b"".join(reads)
        cut = data.draw(st.integers(0, len(whole)))
        reads = [whole[:cut], whole[cut:]]
    apart = data.draw(st.booleans())
    assert heard(*reads, remember=True, apart=apart) == heard(*reads, remember=False, apart=apart)


def test_a_new_connection_is_known_by_the_heads_of_others(monkeypatch):
    read = []

    class Parser(httptools.HttpRequestParser):
        def feed_data(self, data):
            read.append(data)
            super().feed_data(data)

    monkeypatch.setattr(httptools, "HttpRequestParser", Parser)
    first, second, other = (
        request(b"one"),
        request(b"two!"),
        request(b"", head=b"POST / HTTP/1.1\r\n"),
    )
    assert [r[4] for r in heard(first, second, other, second, remember=True, apart=True)] == [
        b"one",
        b"two!",
        b"",
        b"two!",
    ]
    assert read == [first, other]


def test_no_more_heads_are_kept_than_are_worth_it():
    heads = KnownHeads()
    for n in range(1000):
        data = request(b"x", head=b"POST /%d HTTP/1.1\r\n" % n)
        read = Request([(b"Content-Length", b"1")])
        read.body, read.modern = b"x", True
        known = SameHead.of(data, read)
        assert known is not None
        heads.add(known)
        assert heads.find(data) is known
    assert len(heads._known) == 256
    assert heads.find(request(b"x", head=b"POST /1 HTTP/1.1\r\n")) is None


@given(
    st.sampled_from([b"3", b"03", b"0000000003", b"00000000003", b"+3", b"3 ", b"", b"3,3", b"4"])
)
@example(b" 3")
def test_a_length_is_taken_as_llhttp_takes_it(length):
    reads = request(b"one"), request(b"two", length=length)
    assert heard(*reads, remember=True) == heard(*reads, remember=False)


def test_heads_that_always_differ_are_not_compared_for_ever():
    async def run() -> int:
        handler = Heard()
        server = ClientServer(handler, max_body_bytes=99, body_timeout_s=1, keepalive_s=1)
        connection = server()
        connection.connection_made(SilentTransport())
        for number in range(9):
            head = HEAD + b"Traceparent: %d\r\n" % number
            connection.data_received(request(b"x", head=head))
        assert len(handler.requests) == 9
        unlike = connection._unlike
        connection.connection_lost(None)
        return unlike

    assert asyncio.run(run()) == 3
