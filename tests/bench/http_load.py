"""Clients that cost little, and what they saw as one JSON line: `python tests/bench/http_load.py URL`.

Every connection sends a request, reads its answer and sends the next, until --seconds are over; with
--rate, not before its turn of so many requests a second of all. With --tokens, answers are streams, and the clients begin spread over --spread-s, or, with 0, all at once. Every
request has a prompt of its own behind a beginning that all share. What is not a whole answer with
status 200 is counted as an error. Not a model of users.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from urllib.parse import urlsplit

import uvloop

SHARED = "You are a helpful assistant. " * 35
OWN = "Tell me about number {}. "
END = b"0\r\n\r\n"


def requests(url: str, key: str, tokens: int, count: int = 64) -> list[bytes]:
    """Different requests as they go over the wire, about 2,000 characters each."""
    out = []
    for number in range(count):
        body = {
            "model": "sim",
            "messages": [
                {"role": "system", "content": SHARED},
                {"role": "user", "content": OWN.format(number) * 38},
            ],
            "max_tokens": tokens or 16,
            "stream": bool(tokens),
        }
        data = json.dumps(body, separators=(",", ":")).encode()
        authorization = f"Authorization: Bearer {key}\r\n" if key else ""
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
            f"{authorization}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        out.append(head.encode() + data)
    return out


class Seen:
    """What all clients saw together. Times are in seconds."""

    def __init__(self, until: float, *, stream: bool, every_s: float = 0.0) -> None:
        self.until = until
        self.every_s = every_s
        """Between two requests of a client; 0: the next follows the answer."""
        self.stream = stream
        self.took: list[float] = []
        self.first: list[float] = []
        self.events = 0
        self.errors = 0


class Client(asyncio.Protocol):
    """One connection, one request after another."""

    def __init__(self, payloads: list[bytes], number: int, seen: Seen) -> None:
        self._payloads = payloads
        self._number = number
        self._seen = seen
        self._sent_at = 0.0
        self._turn_at = 0.0
        self._first_at = 0.0
        self._start = b""
        self._tail = b""
        self._missing = -1
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def send(self) -> None:
        self._turn_at = self._turn_at or time.perf_counter()
        self._number += 1
        self._start = self._tail = b""
        self._missing = -1
        self._first_at = 0.0
        self._sent_at = time.perf_counter()
        self._transport.write(self._payloads[self._number % len(self._payloads)])

    def data_received(self, data: bytes) -> None:
        if self._seen.stream:
            if not self._first_at:
                self._start += data
                if b"data: " not in self._start:
                    if not self._start.startswith(b"HTTP/1.1 200"[: len(self._start)]):
                        self._transport.close()
                    return
                self._first_at = time.perf_counter()
            self._seen.events += data.count(b"data: ")
            self._tail = (self._tail + data)[-32:]
            if self._tail.endswith(END):
                self._done(ok=b"data: [DONE]" in self._tail)
            return
        if self._missing < 0:
            self._start += data
            head, blank, rest = self._start.partition(b"\r\n\r\n")
            if not blank:
                return
            length = head.lower().partition(b"content-length:")[2].partition(b"\r")[0]
            self._missing = int(length) - len(rest)
        else:
            self._missing -= len(data)
        if not self._missing:
            self._done(ok=self._start.startswith(b"HTTP/1.1 200"))

    def _done(self, *, ok: bool) -> None:
        now = time.perf_counter()
        if ok:
            self._seen.took.append(now - self._sent_at)
            self._seen.first.append((self._first_at or now) - self._sent_at)
        else:
            self._seen.errors += 1
        self._turn_at += self._seen.every_s
        if max(now, self._turn_at) >= self._seen.until:
            self._sent_at = 0.0
            self._transport.close()
        elif self._turn_at > now:
            asyncio.get_running_loop().call_later(self._turn_at - now, self.send)
        else:
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sent_at:
            self._seen.errors += 1
        if not self.ended.done():
            self.ended.set_result(None)


def percentiles_ms(times_s: list[float]) -> dict[str, float]:
    ordered = sorted(times_s) or [0.0]
    return {
        f"p{percent}": ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] * 1000
        for percent in (50, 99)
    }


async def run(
    url: str,
    key: str,
    *,
    connections: int,
    seconds: float,
    rate: float,
    tokens: int,
    spread_s: float,
) -> dict[str, object]:
    loop, place = asyncio.get_running_loop(), urlsplit(url)
    payloads = requests(url, key, tokens)
    seen = Seen(0.0, stream=bool(tokens), every_s=connections / rate if rate else 0.0)
    spread_s = spread_s or seen.every_s
    clients = []
    for number in range(connections):
        _, client = await loop.create_connection(
            lambda number=number: Client(payloads, number, seen), place.hostname, place.port
        )
        clients.append(client)
    start = time.perf_counter()
    seen.until = start + seconds
    for number, client in enumerate(clients):
        if spread_s:
            loop.call_later(spread_s * number / connections, client.send)
        else:
            client.send()
    await asyncio.wait([client.ended for client in clients], timeout=seconds + 30)
    return {
        "requests": len(seen.took),
        "seconds": time.perf_counter() - start,
        "events": seen.events,
        "errors": seen.errors + sum(not client.ended.done() for client in clients),
        "took_ms": percentiles_ms(seen.took),
        "first_ms": percentiles_ms(seen.first),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--key", default="")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--spread-s", type=float, default=0.0)
    chosen = parser.parse_args()
    print(
        json.dumps(
            uvloop.run(
                run(
                    chosen.url,
                    chosen.key,
                    connections=chosen.connections,
                    seconds=chosen.seconds,
                    rate=chosen.rate,
                    tokens=chosen.tokens,
                    spread_s=chosen.spread_s,
                )
            )
        )
    )
