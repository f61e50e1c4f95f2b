"""What is old is collected when it holds up nobody, and in the end in any case."""

from __future__ import annotations

import subprocess
import sys

from router.collector import BUSY_S, IDLE_S, MIDDLE_S, OldGarbage

ALL, MIDDLE = 2, 1


def looked_at(generation: int, times: list[tuple[float, bool]]) -> list[float]:
    """When that generation and what is younger was collected, the clock going as given."""
    collected: list[tuple[float, int]] = []
    now = 0.0
    garbage = OldGarbage(0.0, lambda which: collected.append((now, which)))
    for now, idle in times:
        garbage.look(now, idle=idle)
    return [at for at, which in collected if which >= generation]


def test_an_idle_router_collects_now_and_then():
    seconds = [(float(s), True) for s in range(200)]
    assert looked_at(ALL, seconds) == [IDLE_S, 2 * IDLE_S, 3 * IDLE_S]


def test_a_busy_router_waits_for_a_quiet_moment_but_not_for_ever():
    busy = [(float(s), False) for s in range(500)]
    assert looked_at(ALL, busy) == []
    assert looked_at(ALL, [*busy, (500.0, True)]) == [500.0]
    assert looked_at(ALL, [(float(s), False) for s in range(2000)]) == [BUSY_S, 2 * BUSY_S]


def test_what_outlived_one_look_is_looked_at_sooner_also_while_busy():
    assert looked_at(MIDDLE, [(float(s), False) for s in range(100)]) == [
        MIDDLE_S,
        2 * MIDDLE_S,
        3 * MIDDLE_S,
    ]


def test_only_what_is_young_is_collected_by_itself():
    program = """
import gc
from router.collector import calm
calm()
before = [stats["collections"] for stats in gc.get_stats()]
kept = [[] for _ in range(2_000_000)]
after = [stats["collections"] for stats in gc.get_stats()]
assert after[0] > before[0]
assert after[1:] == before[1:]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
