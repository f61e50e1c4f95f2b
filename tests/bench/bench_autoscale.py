"""How the autoscaler would have done over a trace, against a fixed number of replicas.

    python tests/bench/bench_autoscale.py [TRACE.jsonl] [--metric qps --target 2] [--speed 1]

TRACE is in the Mooncake form (`timestamp` in ms, `input_length`, `output_length`); without one, an
hour is generated: a slow wave with bursts. A request holds a slot for its prefill and its answer.
Prints what was waited and what the replicas cost, for a few settings; changes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schemas.function import Scaling
from tests.unit.core.plants import Outcome, run

PREFILL_TOKENS_PER_S = 8000.0
ANSWER_TOKENS_PER_S = 40.0
SLOTS = 16
START_S = 60


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("trace", nargs="?", type=Path)
    options.add_argument("--speed", type=float, default=1.0, help="how much denser the trace is")
    chosen = options.parse_args()
    seconds = list(_of_trace(chosen.trace, chosen.speed) if chosen.trace else _generated())
    count = sum(map(len, seconds))
    held_s = sum(map(sum, seconds))
    print(
        f"{count} requests in {len(seconds)} s; {held_s / len(seconds):.1f} slots held on average"
    )
    print(f"{'':34} replica h  changes  waited p50    p95    p99  most replicas")
    for fixed in (1, 2, 4, 8):
        _show(f"fixed at {fixed}", run(_fixed(fixed), seconds, slots=SLOTS, first=fixed))
    mean_s = held_s / max(1, count)
    for metric, target in (
        ("qps", 0.7 * SLOTS / mean_s),
        ("concurrency", 0.7 * SLOTS),
        ("kvUsage", 0.7),
        ("queueDepth", 1.0),
        ("ttft", 2.0),
    ):
        spec = _scaling(metric, target)
        name = f"{metric} at {target:.3g} a replica, 1 to 8"
        _show(name, run(spec, seconds, slots=SLOTS, start_s=START_S))


def _show(name: str, outcome: Outcome) -> None:
    waited = [outcome.waited_s(q) for q in (0.5, 0.95, 0.99)]
    print(
        f"{name:34} {outcome.replica_hours:9.2f}  {len(outcome.changes):7}  {waited[0]:9.0f}s "
        f"{waited[1]:5.0f}s {waited[2]:5.0f}s  {max(outcome.replicas):13}"
    )


def _fixed(replicas: int) -> Scaling:
    limits = {"minReplicas": replicas, "maxReplicas": replicas}
    return Scaling.model_validate(limits | {"metric": "qps", "target": 1.0})


def _scaling(metric: str, target: float) -> Scaling:
    spec: dict[str, Any] = {"maxReplicas": 8, "metric": metric, "target": round(target, 4)}
    return Scaling.model_validate(spec | {"upscaleDelay": "30s", "downscaleDelay": "5m"})


def _held_s(input_tokens: int, output_tokens: int) -> float:
    return input_tokens / PREFILL_TOKENS_PER_S + output_tokens / ANSWER_TOKENS_PER_S


def _of_trace(path: Path, speed: float) -> Iterator[list[float]]:
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    last = int(max(row["timestamp"] for row in rows) / 1000 / speed)
    seconds: list[list[float]] = [[] for _ in range(last + 1)]
    for row in rows:
        held = _held_s(row["input_length"], row["output_length"])
        seconds[int(row["timestamp"] / 1000 / speed)].append(held)
    yield from seconds


def _generated(length_s: int = 3600) -> Iterator[list[float]]:
    draw = random.Random(1)
    for now in range(length_s):
        wave = 2.5 - 2.0 * math.cos(2 * math.pi * now / length_s)
        burst = 6.0 if now % 900 > 840 else 0.0
        count = sum(draw.random() < (wave + burst) / 20 for _ in range(20))
        yield [_held_s(draw.randint(500, 12_000), draw.randint(20, 400)) for _ in range(count)]


if __name__ == "__main__":
    main()
