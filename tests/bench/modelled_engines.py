"""Engines that take as long as a GPU would, for judging where a router sends what.

    python tests/bench/modelled_engines.py --count 8 --rtts 0.002,0.025,0.08 --speed 10

Each has a port of its own and an LRU cache of prefix blocks. A request waits its round trip, then for
those before it, then for what is not cached of its prompt at --prefill characters a second; then it
decodes, the slower the more decode beside it. All times are divided by --speed. GET /stats says what
an engine saw itself, DELETE /stats makes it new. Prints {"event": "ready", "urls"} when all listen.
agent.simulated is truer to vLLM, and costs too much beside a router that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import httptools
import orjson
import uvloop
from xxhash import xxh3_64_intdigest

MODEL = "sim"
CHARS_A_TOKEN = 4
STEP_S = 0.01
"""Of any prefill, however short."""
BATCH = 32
"""Requests that decode together at half the pace of one alone."""


def answer(body: bytes, status: str = "200 OK", content_type: str = "application/json") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(**fields: object) -> bytes:
    payload = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return chunk(b"data: " + json.dumps(payload | fields).encode() + b"\n\n")


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
TOKEN = event(choices=[{"index": 0, "finish_reason": None, "delta": {"content": "tok "}}])
STREAM_END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
MODELS = answer(
    json.dumps(
        {
            "object": "list",
            "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "bench"}],
        }
    ).encode()
)
INFO = answer(json.dumps({"model_path": MODEL, "served_model_name": MODEL}).encode())


@dataclass(frozen=True)
class Kind:
    """What all engines of a fleet have in common."""

    capacity_blocks: int
    block_chars: int
    prefill_chars_per_s: float
    attention_chars: float
    """Prompt length at which attention makes prefill a half longer; 0: it never does."""
    token_s: float
    speed: float


class Engine:
    """One simulated GPU: its cache, its queue, and what it has seen."""

    def __init__(self, kind: Kind, rtt_s: float) -> None:
        self.kind = kind
        self.rtt_s = rtt_s
        self.free_at = 0.0
        self.renew()

    def renew(self) -> None:
        """Nothing cached, nothing counted."""
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.running = self.requests = self.seen = self.hit = self.aborted = 0
        self.work_s = 0.0

    def stats(self) -> dict[str, float]:
        return {
            "requests": self.requests,
            "seen": self.seen,
            "hit": self.hit,
            "work_s": self.work_s,
            "aborted": self.aborted,
        }

    def look_up(self, text: bytes) -> int:
        """Characters of the prompt that are cached; all of it is from now on."""
        size = self.kind.block_chars
        parent, blocks = 0, []
        for at in range(0, len(text) - size + 1, size):
            parent = xxh3_64_intdigest(text[at : at + size], parent)
            blocks.append(parent)
        cache = self.cache
        depth = next((i for i, block in enumerate(blocks) if block not in cache), len(blocks))
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > self.kind.capacity_blocks:
            cache.popitem(last=False)
        self.seen += len(text)
        self.hit += depth * size
        return depth * size

    def prefill_s(self, cached: int, chars: int) -> float:
        kind = self.kind
        work = float(chars - cached)
        if kind.attention_chars:
            work += (chars**2 - cached**2) / (2 * kind.attention_chars)
        return work / kind.prefill_chars_per_s + STEP_S

    async def first_token(self, text: bytes) -> int:
        """Waits until it would be there; returns the characters that were cached."""
        loop, speed = asyncio.get_running_loop(), self.kind.speed
        await asyncio.sleep(self.rtt_s / speed)
        cached = self.look_up(text)
        cost_s = self.prefill_s(cached, len(text))
        self.work_s += cost_s
        self.free_at = max(loop.time(), self.free_at) + cost_s / speed
        await asyncio.sleep(self.free_at - loop.time())
        return cached

    @property
    def token_s(self) -> float:
        return self.kind.token_s * (1 + self.running / BATCH) / self.kind.speed


def prompt_of(request: dict) -> bytes:
    """What is computed, as the engine's template would write it."""
    if "messages" in request:
        return "".join(f"\n{m['role']}: {m['content']}" for m in request["messages"]).encode()
    return str(request.get("prompt", "")).encode()


class Connection(asyncio.Protocol):
    """One connection to an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._write: Callable[[bytes], None] = lambda _: None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._write = transport.write

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None and not self._task.done():
            self._engine.aborted += 1
            self._task.cancel()
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
        method = self._parser.get_method()
        if self._path == b"/stats":
            self._write(answer(json.dumps(self._engine.stats()).encode()))
            if method == b"DELETE":
                self._engine.renew()
        elif method == b"GET":
            self._write(self._about())
        else:
            request = orjson.loads(self._body)
            self._body.clear()
            self._task = asyncio.get_running_loop().create_task(self._serve(request))

    def _about(self) -> bytes:
        if self._path.startswith(b"/v1/models"):
            return MODELS
        if self._path.startswith(b"/metrics"):
            text = f'vllm:num_requests_running{{model_name="{MODEL}"}} {self._engine.running}\n'
            return answer(text.encode(), content_type="text/plain; version=0.0.4")
        return INFO

    async def _serve(self, request: dict) -> None:
        engine = self._engine
        engine.requests += 1
        engine.running += 1
        text = prompt_of(request)
        # The SGLang router gives `max_tokens` its newer name.
        tokens = request.get("max_tokens") or request.get("max_completion_tokens") or 16
        try:
            cached = await engine.first_token(text)
            usage = {
                "prompt_tokens": len(text) // CHARS_A_TOKEN,
                "completion_tokens": tokens,
                "total_tokens": len(text) // CHARS_A_TOKEN + tokens,
                "prompt_tokens_details": {"cached_tokens": cached // CHARS_A_TOKEN},
            }
            if not request.get("stream"):
                await asyncio.sleep(tokens * engine.token_s)
                message = {"role": "assistant", "content": "tok " * tokens}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                body = {"id": "c-1", "object": "chat.completion", "created": 1, "model": MODEL}
                self._write(
                    answer(json.dumps(body | {"choices": [choice], "usage": usage}).encode())
                )
                return
            self._write(STREAM_HEAD)
            for _ in range(tokens):
                self._write(TOKEN)
                await asyncio.sleep(engine.token_s)
            self._write(event(choices=[], usage=usage) + STREAM_END)
        finally:
            engine.running -= 1


async def main(given: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    kind = Kind(
        given.blocks,
        given.block_chars,
        given.prefill,
        given.attention,
        given.token_s,
        given.speed,
    )
    rtts = [float(rtt) for rtt in given.rtts.split(",")]
    engines = [Engine(kind, rtts[i * len(rtts) // given.count]) for i in range(given.count)]
    servers = [
        await loop.create_server(lambda e=e: Connection(e), "127.0.0.1", 0, backlog=4096)
        for e in engines
    ]
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    print(json.dumps({"event": "ready", "urls": urls}), flush=True)
    await loop.create_future()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--rtts", default="0.002,0.025,0.08", help="s; engines spread over them")
    parser.add_argument("--blocks", type=int, default=8000, help="an engine's cache")
    parser.add_argument("--block-chars", type=int, default=128)
    parser.add_argument("--prefill", type=float, default=12_500.0, help="characters a second")
    parser.add_argument("--attention", type=float, default=0.0, help="see Kind")
    parser.add_argument("--token-s", type=float, default=0.02)
    parser.add_argument("--speed", type=float, default=10.0)
    uvloop.run(main(parser.parse_args()))
