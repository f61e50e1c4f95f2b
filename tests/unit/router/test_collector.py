"""What is old is collected when it holds up nobody, and in the end in any case."""

from __future__ import annotations

import subprocess
import sys

from router.collector import BUSY_S, IDLE_S, OldGarbage


def looked_at(times: list[tuple[float, bool]]) -> list[float]:
    collected: list[float] = []
    now = 0.0
    garbage = OldGarbage(0.0, lambda: collected.append(now))
    for now, idle in times:
        garbage.look(now, idle=idle)
    return collected


def test_an_idle_router_collects_now_and_then():
    seconds = [(float(s), True) for s in range(200)]
    assert looked_at(seconds) == [IDLE_S, 2 * IDLE_S, 3 * IDLE_S]


def test_a_busy_router_waits_for_a_quiet_moment_but_not_for_ever():
    busy = [(float(s), False) for s in range(500)]
    assert looked_at(busy) == []
    assert looked_at([*busy, (500.0, True)]) == [500.0]
    assert looked_at([(float(s), False) for s in range(2000)]) == [BUSY_S, 2 * BUSY_S]


def test_nothing_old_is_collected_by_itself():
    program = """
import gc
from router.collector import calm
calm()
before = gc.get_stats()[2]["collections"]
kept = [[] for _ in range(2_000_000)]
stats = gc.get_stats()
assert stats[0]["collections"] and stats[1]["collections"]
assert stats[2]["collections"] == before
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
