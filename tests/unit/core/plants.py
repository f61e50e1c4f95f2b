"""A fleet under a load, second by second, steered by the autoscaler: for its tests and its bench.

Replicas have slots; a request holds one for a while; who finds none waits in line. New replicas
take a while to start. Deterministic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from reconciler.core.autoscale import Scale, decide
from reconciler.core.signals import Load
from schemas.function import Scaling


@dataclass
class Outcome:
    """What a run came to."""

    replicas: list[int] = field(default_factory=list)
    """Wanted, each second."""
    waits_s: list[float] = field(default_factory=list)

    @property
    def changes(self) -> list[tuple[int, int, int]]:
        """(second, from, to)."""
        pairs = zip(self.replicas, self.replicas[1:], strict=False)
        return [(at, one, two) for at, (one, two) in enumerate(pairs, 1) if one != two]

    @property
    def replica_hours(self) -> float:
        return sum(self.replicas) / 3600

    def waited_s(self, quantile: float) -> float:
        ordered = sorted(self.waits_s)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else 0.0


def run(
    scaling: Scaling,
    arrivals: Sequence[Iterable[float]],
    *,
    slots: int,
    start_s: int = 30,
    first: int = 1,
    window_s: int = 20,
) -> Outcome:
    """Each second's arrivals are the times that its requests hold a slot for."""
    outcome, scale = Outcome(), Scale(first)
    ready_at: list[int] = [0] * first
    running: list[float] = []
    line: deque[tuple[int, float]] = deque()
    recent: deque[int] = deque(maxlen=window_s)
    ttfts: deque[float] = deque(maxlen=200)
    for now, arriving in enumerate(arrivals):
        running = [end for end in running if end > now]
        held = list(arriving)
        recent.append(len(held))
        line.extend((now, hold) for hold in held)
        ready = sum(at <= now for at in ready_at)
        while line and len(running) < ready * slots:
            came, hold = line.popleft()
            running.append(now + hold)
            outcome.waits_s.append(now - came)
            ttfts.append(0.2 + now - came)
        waits = len(line)
        load = Load(
            requests_per_s=sum(recent) / len(recent),
            in_flight=len(running),
            waiting=waits,
            kv_usage=len(running) / (ready * slots) if ready else None,
            ttft_p95_s=sorted(ttfts)[int(0.95 * len(ttfts))] if ttfts and recent[-1] else None,
        )
        scale = decide(scaling, scale, load, ready=ready, most=None, now=float(now))
        outcome.replicas.append(scale.replicas)
        while len(ready_at) > scale.replicas:
            ready_at.remove(max(ready_at))
        ready_at += [now + start_s] * (scale.replicas - len(ready_at))
    return outcome


def steady(seconds: int, per_s: int, hold_s: float) -> list[list[float]]:
    """The same every second."""
    return [[hold_s] * per_s for _ in range(seconds)]


def bursts(
    seconds: int, *, quiet: int, busy: int, every_s: int, long_s: int, hold_s: float
) -> Iterator[list[float]]:
    """Quiet, with a burst at the end of each period."""
    for now in range(seconds):
        yield [hold_s] * (busy if now % every_s >= every_s - long_s else quiet)
