"""However an engine's bytes are cut, the body that is handed on is the one that was sent."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from router.upstream.connection import Connection, ResponseHead
from router.upstream.failures import UpstreamFailed
from tests.silent_transport import SilentTransport

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECES = st.lists(
    st.sampled_from([b"\r\n", b"a", b"0", b"5\r\nhello\r\n", b"\n", b"1a"]), max_size=9
)


class Client:
    """Wants whole chunks from the first body on, as a relay does."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.body = b""
        self.framed = 0
        self.complete = False
        self.error: UpstreamFailed | None = None

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        self.body += data
        self.complete = complete
        if self.body and not complete:
            self.connection.on_chunk = self.on_chunk

    def on_chunk(self, data: bytes, framed: bytes) -> None:
        assert framed == b"%x\r\n%b\r\n" % (len(data), data)
        self.body += data
        self.framed += 1

    def failed(self, error: UpstreamFailed) -> None:
        self.error = error


def read(connection: Connection, data: bytes) -> None:
    connection.get_buffer(-1)[: len(data)] = data
    connection.buffer_updated(len(data))


def exchange(*reads: bytes, count: int = 1) -> list[Client]:
    connection = Connection()
    connection.connection_made(SilentTransport())
    clients = []
    for _ in range(count):
        client = Client(connection)
        clients.append(client)
        connection.send(b"", b"", client)
        for data in reads:
            read(connection, data)
            if connection.closed:
                break
    connection.connection_lost(None)
    return clients


@st.composite
def streams(draw):
    """(body, the answer's bytes in reads)."""
    chunks = [b"".join(draw(PIECES)) for _ in range(draw(st.integers(1, 5)))]
    chunks = [chunk for chunk in chunks if chunk]
    form = draw(st.sampled_from([b"%x", b"%X", b"0%x", b"%x;name=value"]))
    parts = [HEAD, *((form % len(c)) + b"\r\n" + c + b"\r\n" for c in chunks), b"0\r\n\r\n"]
    wire = b"".join(parts)
    if draw(st.booleans()):
        return b"".join(chunks), parts
    cuts = sorted(draw(st.sets(st.integers(1, len(wire) - 1), max_size=6)))
    return b"".join(chunks), [
        wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)
    ]


@given(streams())
@example(
    (b"hello" + b"x" * 26, [HEAD + b"5\r\nhello\r\n1", b"a\r\n" + b"x" * 26 + b"\r\n0\r\n\r\n"])
)
@example((b"\r\n\r\n\r\nab", [HEAD + b"8\r\n\r\n\r\n", b"\r\nab\r\n0\r\n\r\n"]))
@example((b"hello", [HEAD + b"2\r\nhe\r\n", b"3\r\n", b"llo\r\n0\r\n\r\n"]))
@example((b"hello5\r\nabcd", [HEAD + b"c\r\nhello", b"5\r\nabcd", b"\r\n0\r\n\r\n"]))
def test_a_stream_is_the_same_however_it_is_cut(stream):
    body, reads = stream
    for client in exchange(*reads, count=2):
        assert (client.body, client.complete, client.error) == (body, True, None)


def test_whole_chunks_are_spared_the_parser():
    chunks = [b"data: %d\n\n" % i for i in range(5)]
    reads = [HEAD, *(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks), b"0\r\n\r\n"]
    (client,) = exchange(*reads)
    assert client.framed == 4
    assert client.complete


def test_what_looks_like_a_chunk_in_a_body_without_any_is_body():
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    (client,) = exchange(head, b"5\r\nhello\r\n", b"5\r\nhello\r\n")
    assert (client.body, client.framed) == (b"5\r\nhello\r\n" * 2, 0)
    assert client.complete


def test_a_connection_that_is_used_again_and_again_does_not_grow():
    connection = Connection()
    connection.connection_made(SilentTransport())
    for _ in range(50):
        connection.send(b"", b"", Client(connection))
        read(connection, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert len(connection._within) <= 2
    connection.connection_lost(None)


def test_only_a_connection_that_was_idle_may_have_been_closed_meanwhile():
    for kept in (False, True):
        connection = Connection()
        connection.connection_made(SilentTransport())
        connection.kept = kept
        client = Client(connection)
        connection.send(b"", b"", client)
        connection.connection_lost(None)
        assert client.error is not None
        assert client.error.stale is kept


def test_whoever_wants_to_know_hears_once_that_a_connection_is_lost():
    heard = []
    connection = Connection()
    connection.connection_made(SilentTransport())
    connection.on_lost = lambda: heard.append(1)
    connection.close()
    connection.connection_lost(None)
    assert heard == [1]
