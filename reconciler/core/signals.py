"""What all routers together saw of each deployment: rates, times to first token, errors, cache hits.

Adds up counters that only grow, whoever starts again or is missed for a while. No clock: the time of
each message is given, in seconds on any clock that does not go back. Not here: how messages come
(publish.signals), or what follows from them (autoscale, canary).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

from schemas.wire.signals import ArmSignals, RouterSignals, ttft_bound_s

SILENT_S: Final = 5.0
"""A router that said nothing for so long carries nothing, as far as anybody knows."""
KEPT_S: Final = 120.0
"""How far back a rate can look."""


class ArmKey(NamedTuple):
    """One template of one deployment in one cluster; `deployment` as routers know it."""

    function: str
    deployment: str
    cluster: str
    spec_digest: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of ended requests; differences and sums of them are of the same kind."""

    attempts: int = 0
    failed: int = 0
    ttft: Mapping[int, int] = field(default_factory=dict)
    input_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Totals) -> Totals:
        return self._joined(other, 1)

    def __sub__(self, other: Totals) -> Totals:
        return self._joined(other, -1)

    def _joined(self, other: Totals, sign: int) -> Totals:
        ttft = dict(self.ttft)
        for bucket, count in other.ttft.items():
            ttft[bucket] = ttft.get(bucket, 0) + sign * count
        return Totals(
            self.attempts + sign * other.attempts,
            self.failed + sign * other.failed,
            {bucket: count for bucket, count in ttft.items() if count},
            self.input_tokens + sign * other.input_tokens,
            self.cached_tokens + sign * other.cached_tokens,
        )

    @property
    def error_percent(self) -> float | None:
        return 100.0 * self.failed / self.attempts if self.attempts else None

    @property
    def hit_ratio(self) -> float | None:
        """Input tokens that a cache held, 0 to 1; None where engines do not say."""
        return self.cached_tokens / self.input_tokens if self.input_tokens else None

    def ttft_s(self, quantile: float = 0.95) -> float | None:
        """Seconds within which that share of answers began, to 10 %; None where none did."""
        count = sum(self.ttft.values())
        left = quantile * count
        for bucket, inside in sorted(self.ttft.items()):
            left -= inside
            if left <= 1e-9:
                return ttft_bound_s(bucket)
        return None


@dataclass(frozen=True, slots=True)
class Load:
    """What one deployment carries, over a few seconds or now."""

    requests_per_s: float = 0.0
    in_flight: int = 0
    waiting: int = 0
    """Held by routers, of the whole function."""
    queued: int = 0
    """Of those in flight, the ones that wait inside engines."""
    kv_usage: float | None = None
    ttft_p95_s: float | None = None


@dataclass(slots=True)
class _Router:
    """One router's last word."""

    at: float
    arms: dict[ArmKey, ArmSignals] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)


class Signals:
    """Takes messages in, and answers questions about them."""

    def __init__(self) -> None:
        self._routers: dict[str, _Router] = {}
        self._totals: dict[ArmKey, Totals] = {}
        self._past: deque[tuple[float, dict[ArmKey, Totals], dict[ArmKey, int]]] = deque()

    def take(self, message: RouterSignals, now: float) -> None:
        """One message, as it came."""
        router = self._routers.setdefault(message.router, _Router(now))
        router.at = now
        for arm in message.arms:
            key = ArmKey(arm.function, arm.deployment, arm.cluster, arm.spec_digest)
            new = _growth(router.arms.get(key), arm)
            if new.attempts or new.ttft:
                self._totals[key] = self._totals.get(key, Totals()) + new
            router.arms[key] = arm
        if message.full:
            named = {
                ArmKey(a.function, a.deployment, a.cluster, a.spec_digest) for a in message.arms
            }
            router.arms = {key: arm for key, arm in router.arms.items() if key in named}
            router.waiting = {}
        for function in message.functions:
            router.waiting[function.function] = function.waiting
        self._remember(now)

    def heard(self, now: float) -> bool:
        """Whether any router has spoken lately; if not, nothing may be concluded from silence."""
        return any(now - router.at <= SILENT_S for router in self._routers.values())

    def waiting(self, function: str, now: float) -> int:
        """Requests that routers hold for a function."""
        return sum(router.waiting.get(function, 0) for router in self._lively(now))

    def totals(self, deployment: str, cluster: str, spec_digest: str | None = None) -> Totals:
        """Since this reconciler began to listen; of one template, or of all."""
        total = Totals()
        for key, counted in self._totals.items():
            if _is_of(key, deployment, cluster, spec_digest):
                total += counted
        return total

    def load(
        self, function: str, deployments: Iterable[str], cluster: str, now: float, *, over_s: float
    ) -> Load | None:
        """Of the arms of one place together. None while no router speaks."""
        if not self.heard(now):
            return None
        names = frozenset(deployments)

        def mine(key: ArmKey) -> bool:
            return key.deployment in names and key.cluster == cluster

        # Started is what has ended and what still runs.
        flying = self._flying(now)
        in_flight = sum(count for key, count in flying.items() if mine(key))
        at, before, flew = self._at(now - over_s)
        ended = Totals()
        for key, total in self._totals.items():
            if mine(key):
                ended += total - before.get(key, Totals())
        started = ended.attempts + in_flight - sum(n for key, n in flew.items() if mine(key))
        queued: dict[ArmKey, int] = {}
        for router in self._lively(now):
            for key, arm in router.arms.items():
                if mine(key):
                    # Each router repeats what the engines say.
                    queued[key] = max(queued.get(key, 0), arm.queued)
        usages = [
            arm.kv_usage
            for router in self._lively(now)
            for key, arm in router.arms.items()
            if mine(key) and arm.kv_usage is not None
        ]
        return Load(
            requests_per_s=max(0, started) / max(now - at, 1.0),
            in_flight=in_flight,
            waiting=self.waiting(function, now),
            queued=sum(queued.values()),
            kv_usage=max(usages) if usages else None,
            ttft_p95_s=ended.ttft_s(),
        )

    def forget(self, now: float, keep: Iterable[tuple[str, str]]) -> None:
        """Drops silent routers, and arms of places (deployment, cluster) that are no more."""
        self._routers = {n: r for n, r in self._routers.items() if now - r.at <= KEPT_S}
        kept = frozenset(keep)
        self._totals = {
            key: total
            for key, total in self._totals.items()
            if (key.deployment, key.cluster) in kept
        }

    def _lively(self, now: float) -> list[_Router]:
        return [router for router in self._routers.values() if now - router.at <= SILENT_S]

    def _flying(self, now: float) -> dict[ArmKey, int]:
        flying: dict[ArmKey, int] = {}
        for router in self._lively(now):
            for key, arm in router.arms.items():
                flying[key] = flying.get(key, 0) + arm.in_flight
        return flying

    def _remember(self, now: float) -> None:
        if self._past and now - self._past[-1][0] < 1.0:
            return
        self._past.append((now, dict(self._totals), self._flying(now)))
        while len(self._past) > 2 and self._past[1][0] <= now - KEPT_S:
            self._past.popleft()

    def _at(self, then: float) -> tuple[float, dict[ArmKey, Totals], dict[ArmKey, int]]:
        """The newest remembered state that is no younger than asked for; else the oldest."""
        past = list(self._past)
        for one, following in pairwise(past):
            if following[0] > then:
                return one
        return past[-1] if past else (then, {}, {})


def _growth(before: ArmSignals | None, now: ArmSignals) -> Totals:
    """What was counted since; a counter that fell has begun again."""
    new = Totals(now.attempts, now.failed, now.ttft, now.input_tokens, now.cached_tokens)
    if before is None or before.attempts > now.attempts:
        return new
    return new - Totals(
        before.attempts, before.failed, before.ttft, before.input_tokens, before.cached_tokens
    )


def _is_of(key: ArmKey, deployment: str, cluster: str, spec_digest: str | None) -> bool:
    return (
        key.deployment == deployment
        and key.cluster == cluster
        and spec_digest in (None, key.spec_digest)
    )
