"""What to start, restart and stop next, so that a workload comes to run as it was told. Pure.

A step is decided from what is there alone, never from what was decided before; after every change it
is decided anew. Rules:

- No roll takes a ready replica away before another is ready in its place, unless there is no room
  for both (`maxProcesses`): then one at a time, and said so.
- Too many of the newest template: failed ones go first, then starting, then not ready, then ready
  ones; within each the youngest first, because the oldest hold the warmest caches.
- Of an older template, the oldest go first; those that never were ready go at once.
- A replica of an older template that crashed is started again only while none of the newest is ready.

Not here: how long to wait between restarts (core.backoff), or doing any of it (backend).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from reconciler.core.observed import Phase

_LEAST_USEFUL_FIRST: Final = {
    Phase.FAILED: 0,
    Phase.PENDING: 1,
    Phase.STARTING: 1,
    Phase.NOT_READY: 2,
    Phase.READY: 3,
}


@dataclass(frozen=True, slots=True)
class Member:
    """A replica as the decision sees it. `newest`: it runs the newest template.

    `proven`: it, or the one it replaced after a crash, has been ready. `due`: FAILED, its process
    gone, and its pause over. Higher `order` is younger.
    """

    id: str
    newest: bool
    phase: Phase
    order: int
    proven: bool = False
    due: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """Processes that may still be started in this cluster; `soon`: one there is about to end."""

    free: int
    soon: bool = False


@dataclass(frozen=True, slots=True)
class Steps:
    """`start` new replicas of the newest template; `restart` and `stop` those ids, in this order.

    `waiting` replicas cannot be started for want of room.
    """

    start: int = 0
    restart: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    waiting: int = 0
    without_surge: bool = False


def decide(
    wanted: int, members: Sequence[Member], *, max_surge: int, blue_green: bool, room: Room
) -> Steps:
    """The next steps of one workload that should have `wanted` replicas."""
    active = [m for m in members if m.phase is not Phase.DRAINING]
    newest = sorted(
        (m for m in active if m.newest), key=lambda m: (_LEAST_USEFUL_FIRST[m.phase], -m.order)
    )
    surplus = max(0, len(newest) - wanted)
    stop, newest = newest[:surplus], newest[surplus:]
    ready = sum(m.phase is Phase.READY for m in newest)

    older = sorted((m for m in active if not m.newest), key=lambda m: m.order)
    serving = [m for m in older if m.phase is Phase.READY]
    if blue_green:
        leaving = len(serving) if ready >= wanted else 0
    else:
        leaving = min(len(serving), max(0, ready + len(serving) - wanted))
    stop += serving[:leaving]
    serving = serving[leaving:]
    places = max(0, wanted - len(serving)) if ready == 0 else 0
    useful = [m for m in older if m.phase is not Phase.READY and m.proven]
    spare = useful[:places]
    stop += [m for m in older if m.phase is not Phase.READY and m not in spare]
    kept = serving + spare

    missing = wanted - len(newest)
    start = missing
    if kept and not blue_green:
        start = max(0, min(missing, wanted + max_surge - len(newest) - len(kept)))
    restart = [m for m in (*spare, *newest) if m.due]

    free = max(0, room.free)
    restarted = restart[:free]
    started = min(start, free - len(restarted))
    waiting = len(restart) + start - len(restarted) - started

    # One that crashed may take an old one's place only where its template has shown that it runs.
    settled = all(m.phase is Phase.READY or (m.due and ready) for m in newest)
    without_surge = bool(waiting and kept and not free and settled and not room.soon)
    if without_surge:
        stop.append((spare + serving)[0])
    return Steps(
        start=started,
        restart=tuple(m.id for m in restarted),
        stop=tuple(m.id for m in stop),
        waiting=waiting,
        without_surge=without_surge,
    )
