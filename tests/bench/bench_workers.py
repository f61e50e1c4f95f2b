"""Whether workers add up: `python tests/bench/bench_workers.py [--rounds 2] [--seconds 3] [--share 0.1]`.

One machine has too few cores to give every worker one beside engines and clients. So each gets the
same part of a core, by a control group of its own, and there are always cores enough: what two, four and
eight of them do beside one is then theirs. Needs root, or a control group that may be written (v1 or v2).
Prints a Markdown table, asserts nothing. Not here: what a request costs (bench_router).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from tests.bench.bench_router import ENGINES, REPO, Target, cpu_s, load, ours, process, ready

WORKERS: Final = (1, 2, 4, 8)
CONNECTIONS: Final = 256
"""Enough that the kernel deals them out evenly."""
PERIOD_US: Final = 10_000
_V1: Final = Path("/sys/fs/cgroup/cpu")
_V2: Final = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited(workers: list[psutil.Process], share: float) -> Iterator[None]:
    """Each has this part of a core and no more.

    Raises:
        OSError: control groups cannot be written here.
    """
    quota_us = round(PERIOD_US * share)
    made: list[Path] = []
    try:
        for worker in workers:
            group = (_V1 if _V1.is_dir() else _V2) / f"detoserve-bench-{worker.pid}"
            group.mkdir()
            made.append(group)
            if _V1.is_dir():
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(quota_us))
            else:
                (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
            (group / "cgroup.procs").write_text(str(worker.pid))
        yield
    finally:
        for group in made:
            for pid in (group / "cgroup.procs").read_text().split():
                (group.parent / "cgroup.procs").write_text(pid)
            group.rmdir()


def serving(target: Target) -> list[psutil.Process]:
    """The workers; a single one has no supervisor."""
    assert target.process is not None
    return target.process.children() or [target.process]


def measure(engines: list[str], workers: int, share: float, seconds: float) -> tuple[float, float]:
    """Requests a second, and CPU seconds a request."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        target = ours(stack, folder, engines, workers)
        if not ready(target):
            raise RuntimeError((folder / f"detoserve-{workers}.log").read_text()[-500:])
        load(target, seconds=1, connections=CONNECTIONS)
        found = serving(target)
        assert len(found) == workers
        with limited(found, share):
            before = cpu_s(target.process)
            seen = load(target, seconds=seconds, connections=CONNECTIONS)
            used_s = cpu_s(target.process) - before
        if target.errors:
            raise RuntimeError(f"{target.errors} errors with {workers} workers")
        return seen["requests"] / seen["seconds"], used_s / seen["requests"]


def main(rounds: int, seconds: float, share: float) -> None:
    seen: dict[int, list[tuple[float, float]]] = {workers: [] for workers in WORKERS}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, str(REPO / "tests/bench/instant_engines.py")]
        running = stack.enter_context(
            process([*command, f"--count={ENGINES}"], folder / "engines.log")
        )
        engines = json.loads(running.stdout.readline())["urls"]
        for _ in range(rounds):
            for workers in WORKERS:
                seen[workers].append(measure(engines, workers, share, seconds))
                time.sleep(0.5)
    one = statistics.median(rate for rate, _ in seen[1])
    print("| workers | requests/s | beside one | CPU us a request |\n|--:|--:|--:|--:|")
    for workers, figures in seen.items():
        rate, cost = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"| {workers} | {rate:,.0f} | {rate / one:.1f} | {cost * 1e6:.0f} |")
    print(
        f"\nEach worker with {share:g} of a core; {CONNECTIONS} clients; medians of {rounds} rounds."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--share", type=float, default=0.1)
    chosen = parser.parse_args()
    try:
        main(chosen.rounds, chosen.seconds, chosen.share)
    except PermissionError as error:
        sys.exit(f"control groups cannot be written here: {error}; run it as root")
