"""Requests to replay: a file in Mooncake's format, or made up, always the same for one seed.

A file has a JSON object a line: timestamp (ms), input_length and output_length (tokens), and hash_ids,
one for each 512 tokens of the prompt; equal ids stand for equal text after equal beginnings. What is
made up here differs in what it asks of a router. Not here: sending them.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

BLOCK_TOKENS: Final = 512


class Request(NamedTuple):
    at_s: float
    tokens: int
    answer: int
    blocks: tuple[int, ...]
    """Of the prompt; the last may be cut by `tokens`."""


def read(path: Path) -> list[Request]:
    """The requests of a file.

    Raises:
        OSError, ValueError, KeyError: it cannot be read, or is in another format.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [
        Request(
            row["timestamp"] / 1000,
            max(1, min(row["input_length"], len(row["hash_ids"]) * BLOCK_TOKENS)),
            row["output_length"],
            tuple(row["hash_ids"]),
        )
        for row in rows
        if row["hash_ids"]
    ]


def _length(blocks: Sequence[int], rng: random.Random) -> int:
    return len(blocks) * BLOCK_TOKENS - rng.randrange(BLOCK_TOKENS)


def agents(seed: int = 7, sessions: int = 260, minutes: float = 10) -> list[Request]:
    """Agents at work: one of six system prompts, then turn after turn with a short pause."""
    rng = random.Random(seed)
    fresh = itertools.count()
    kinds = [[next(fresh) for _ in range(rng.randint(2, 10))] for _ in range(6)]
    out = []
    for _ in range(sessions):
        at_s = rng.random() * minutes * 60
        blocks = list(rng.choice(kinds))
        for _ in range(max(1, int(rng.expovariate(1 / 9)))):
            blocks += [next(fresh) for _ in range(rng.choice((1, 1, 2, 3, 6)))]
            answer = int(rng.expovariate(1 / 250)) + 10
            out.append(Request(at_s, _length(blocks, rng), answer, tuple(blocks)))
            at_s += 2 + answer * 0.02 + rng.expovariate(1 / 6)
    return sorted(out)


def conversations(seed: int = 11, sessions: int = 700, minutes: float = 20) -> list[Request]:
    """People who talk: one system prompt for all, few and long turns, minutes between them."""
    rng = random.Random(seed)
    fresh = itertools.count(1)
    out = []
    for _ in range(sessions):
        at_s = rng.random() * minutes * 60
        blocks = [0]
        for _ in range(max(1, int(rng.expovariate(1 / 3)))):
            blocks += [next(fresh) for _ in range(1 + int(rng.lognormvariate(1.6, 1.1)))]
            blocks = blocks[:250]
            answer = int(rng.expovariate(1 / 340)) + 5
            out.append(Request(at_s, _length(blocks, rng), answer, tuple(blocks)))
            at_s += answer * 0.02 + rng.expovariate(1 / 70)
    return sorted(out)


def documents(seed: int = 13, requests: int = 2500, minutes: float = 15) -> list[Request]:
    """Questions about a library: some documents are asked about far more than others."""
    rng = random.Random(seed)
    fresh = itertools.count(1)
    shelf = [[next(fresh) for _ in range(rng.randint(8, 60))] for _ in range(160)]
    weights = [1 / (1 + rank) for rank in range(len(shelf))]
    out = []
    for _ in range(requests):
        blocks = [0, *rng.choices(shelf, weights)[0], next(fresh)]
        at_s = rng.random() * minutes * 60
        out.append(Request(at_s, _length(blocks, rng), rng.randint(5, 200), tuple(blocks)))
    return sorted(out)


def unrelated(seed: int = 17, requests: int = 2000, minutes: float = 15) -> list[Request]:
    """Prompts that share nothing, of very different lengths: no cache helps."""
    rng = random.Random(seed)
    fresh = itertools.count()
    out = []
    for _ in range(requests):
        count = min(120, 1 + int(rng.lognormvariate(2.2, 1.0)))
        blocks = tuple(next(fresh) for _ in range(count))
        out.append(
            Request(rng.random() * minutes * 60, _length(blocks, rng), rng.randint(5, 200), blocks)
        )
    return sorted(out)


def short(seed: int = 19, requests: int = 3000, minutes: float = 15) -> list[Request]:
    """Prompts of less than a block: next to nothing to compute, and nothing to save."""
    rng = random.Random(seed)
    return sorted(
        Request(rng.random() * minutes * 60, rng.randint(20, 400), rng.randint(20, 300), (i,))
        for i in range(requests)
    )


MADE_UP: Final[dict[str, Callable[[], list[Request]]]] = {
    "agents": agents,
    "conversations": conversations,
    "documents": documents,
    "unrelated": unrelated,
    "short": short,
}


def load(name: str) -> list[Request]:
    """A made-up trace by its name, or a file by its path.

    Raises:
        OSError, ValueError, KeyError: as `read` says.
    """
    return MADE_UP[name]() if name in MADE_UP else read(Path(name))


def pooled_hit(requests: Sequence[Request], capacity_blocks: int) -> float:
    """Share of all prompt tokens that one cache of so many blocks would hold, LRU, in order."""
    cache: OrderedDict[int, None] = OrderedDict()
    held = total = 0
    for request in requests:
        whole = request.blocks[: request.tokens // BLOCK_TOKENS]
        depth = next((i for i, block in enumerate(whole) if block not in cache), len(whole))
        held += depth * BLOCK_TOKENS
        total += request.tokens
        for block in reversed(whole):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > capacity_blocks:
            cache.popitem(last=False)
    return held / max(1, total)
