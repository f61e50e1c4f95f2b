"""Sends a trace at its own times, and prints what clients saw as one JSON line.

    python tests/bench/http_replay.py --urls http://127.0.0.1:8000 --trace agents --pace 14

Open loop: a request goes out when it is due, however many are under way. With several URLs requests
go to them in turn. Every trace token is one character; a block's text is the same whenever it comes.
TTFT is in seconds of this clock; the caller knows how fast the engines' runs.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import aiohttp
import uvloop

from tests.bench import traces


def text_of(block: int) -> str:
    """512 characters, always the same."""
    return hashlib.shake_128(str(block).encode()).hexdigest(traces.BLOCK_TOKENS // 2)


def bodies(requests: list[traces.Request], model: str, max_tokens: int) -> list[bytes]:
    """All requests as they are sent: made before the first is due."""
    out = []
    for request in requests:
        prompt = "".join(map(text_of, request.blocks))[: request.tokens]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max(1, min(request.answer, max_tokens)),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        out.append(json.dumps(body).encode())
    return out


async def main(given: argparse.Namespace) -> None:
    requests = traces.load(given.trace)[: given.requests]
    urls = given.urls.split(",")
    headers = {"Content-Type": "application/json"}
    if given.key:
        headers["Authorization"] = f"Bearer {given.key}"
    sent = bodies(requests, given.model, given.max_tokens)
    ttfts: list[float] = []
    errors: dict[str, int] = {}
    late_s = 0.0

    def failed(why: str) -> None:
        errors[why] = errors.get(why, 0) + 1

    async def send(session: aiohttp.ClientSession, url: str, body: bytes) -> None:
        began = time.perf_counter()
        first, ended = None, False
        try:
            async with session.post(
                f"{url}/v1/chat/completions", data=body, headers=headers
            ) as response:
                async for line in response.content:
                    if first is None and line.startswith(b"data:"):
                        first = time.perf_counter() - began
                    ended = ended or line.startswith(b"data: [DONE]")
                if response.status != 200:
                    failed(f"HTTP {response.status}")
                elif first is None or not ended:
                    failed("cut off")
                else:
                    ttfts.append(first)
        except (aiohttp.ClientError, TimeoutError) as error:
            failed(type(error).__name__)

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=900)
    ) as session:
        began, tasks = time.perf_counter(), []
        for number, request in enumerate(requests):
            due_s = (request.at_s - requests[0].at_s) / given.pace
            wait_s = due_s - (time.perf_counter() - began)
            late_s = max(late_s, -wait_s)
            await asyncio.sleep(max(0.0, wait_s))
            tasks.append(asyncio.create_task(send(session, urls[number % len(urls)], sent[number])))
        await asyncio.gather(*tasks)
    print(json.dumps({"ttft_s": sorted(ttfts), "errors": errors, "late_s": round(late_s, 3)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--urls", required=True)
    parser.add_argument("--trace", required=True, help="a made-up one's name, or a file")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--pace", type=float, required=True, help="times the trace's own")
    parser.add_argument("--key", default="")
    parser.add_argument("--model", default="sim")
    parser.add_argument("--max-tokens", type=int, default=32)
    uvloop.run(main(parser.parse_args()))
