"""Engines that answer at once, for measuring what stands before them: `python tests/bench/instant_engines.py`.

Each has a port of its own. A whole answer is one write; a stream spreads its `max_tokens` events over
--stream-s, the first at once. Prints {"event": "ready", "urls"} when all listen. Not a model of an
engine: that is agent.simulated, which costs more than a router does.
"""

from __future__ import annotations

import argparse
import asyncio
import json

import httptools
import orjson
import uvloop

MODEL = "sim"


def answer(body: bytes, content_type: str = "application/json") -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(**fields: object) -> bytes:
    payload = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return chunk(b"data: " + json.dumps(payload | fields).encode() + b"\n\n")


TEXT = "The quick brown fox jumps over the lazy dog. " * 4
USAGE = {"prompt_tokens": 500, "completion_tokens": 40, "total_tokens": 540}
WHOLE = answer(
    json.dumps(
        {
            "id": "c-1",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": TEXT},
                }
            ],
            "usage": USAGE,
        }
    ).encode()
)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
TOKEN = event(choices=[{"index": 0, "finish_reason": None, "delta": {"content": "tok "}}])
STREAM_END = event(choices=[], usage=USAGE) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
# What routers ask of a worker before they send to it, and while they do.
ABOUT = {
    b"/v1/models": answer(
        json.dumps(
            {
                "object": "list",
                "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "bench"}],
            }
        ).encode()
    ),
    b"/metrics": answer(
        f'vllm:num_requests_running{{model_name="{MODEL}"}} 0\n'.encode(),
        "text/plain; version=0.0.4",
    ),
}
INFO = answer(json.dumps({"model_path": MODEL, "served_model_name": MODEL}).encode())


class Engine(asyncio.Protocol):
    """One connection to an engine."""

    def __init__(self, stream_s: float) -> None:
        self._stream_s = stream_s
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body = bytearray()
        self._left = 0
        self._gap_s = 0.0
        self._next_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        del self._parser

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()  # such as the preface of HTTP/2, which a router may try

    def on_url(self, url: bytes) -> None:
        self._path = url

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if self._parser.get_method() == b"GET":
            self._transport.write(ABOUT.get(self._path, INFO))
            return
        request = orjson.loads(self._body)
        self._body.clear()
        if not request.get("stream"):
            self._transport.write(WHOLE)
            return
        # The SGLang router gives `max_tokens` its newer name.
        tokens = request.get("max_tokens") or request["max_completion_tokens"]
        self._left = tokens - 1
        self._gap_s = self._stream_s / tokens
        self._next_at = self._loop.time()
        self._transport.write(STREAM_HEAD + TOKEN)
        self._wait()

    def _wait(self) -> None:
        self._next_at += self._gap_s
        self._timer = self._loop.call_at(self._next_at, self._token)

    def _token(self) -> None:
        if not self._left:
            self._transport.write(STREAM_END)
            return
        self._left -= 1
        self._transport.write(TOKEN)
        self._wait()


async def main(count: int, stream_s: float) -> None:
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda: Engine(stream_s), "127.0.0.1", 0, backlog=4096)
        for _ in range(count)
    ]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    print(json.dumps({"event": "ready", "urls": urls}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--stream-s", type=float, default=2.0)
    chosen = parser.parse_args()
    uvloop.run(main(chosen.count, chosen.stream_s))
