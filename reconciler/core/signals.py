"""What all routers together saw of each deployment: rates, times to first token, errors, cache hits.

Adds up counters that only grow, whoever starts again or is missed for a while. No clock: the time of
each message is given, in seconds on any clock that does not go back. Not here: how messages come
(publish.signals), or what follows from them (autoscale, canary).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from schemas.wire.signals import ArmSignals, RouterSignals, ttft_bound_s

SILENT_S: Final = 5.0
"""A router that said nothing for so long carries nothing, as far as anybody knows."""
KEPT_S: Final = 120.0
"""How far back a rate can look."""


class ArmKey(NamedTuple):
    """One template of one deployment in one cluster; `deployment` as routers know it."""

    deployment: str
    cluster: str
    spec_digest: str


Place = tuple[str, str]
"""(deployment, cluster)"""


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


@dataclass(slots=True)
class _Now:
    """What is carried at one place at this moment."""

    in_flight: int = 0
    queued: dict[str, int] = field(default_factory=dict)
    """By template: the same engines, as each router repeats it."""
    kv_usage: float | None = None


_NOTHING: Final = _Now()
_Counted = dict[Place, Mapping[str, Totals]]
"""Place -> template -> totals. The inner ones are replaced, never changed, so that copies are cheap."""


@dataclass(frozen=True, slots=True)
class _Past:
    at: float
    counted: _Counted
    in_flight: Mapping[Place, int]


class Signals:
    """Takes messages in, and answers questions about them; each answer costs the same however many arms."""

    def __init__(self) -> None:
        self._routers: dict[str, _Router] = {}
        self._counted: _Counted = {}
        self._past: deque[_Past] = deque()
        self._now: tuple[float, dict[Place, _Now]] | None = None

    def take(self, message: RouterSignals, now: float) -> None:
        """One message, as it came."""
        router = self._routers.setdefault(message.router, _Router(now))
        router.at, self._now = now, None
        for arm in message.arms:
            key = ArmKey(arm.deployment, arm.cluster, arm.spec_digest)
            new = _growth(router.arms.get(key), arm)
            if new.attempts or new.ttft:
                place = (key.deployment, key.cluster)
                here = self._counted.get(place, {})
                total = here.get(key.spec_digest, Totals()) + new
                self._counted[place] = {**here, key.spec_digest: total}
            router.arms[key] = arm
        if message.full:
            named = {ArmKey(a.deployment, a.cluster, a.spec_digest) for a in message.arms}
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
        return _sum(self._counted, (deployment, cluster), spec_digest)

    def load(
        self, function: str, deployments: Iterable[str], cluster: str, now: float, *, over_s: float
    ) -> Load | None:
        """Of the arms of one place together. None while no router speaks."""
        if not self.heard(now):
            return None
        places = [(deployment, cluster) for deployment in deployments]
        carried = self._carried(now)
        here = [carried.get(place, _NOTHING) for place in places]
        in_flight = sum(one.in_flight for one in here)
        then = self._at(now - over_s)
        ended, started = Totals(), in_flight
        for place in places:
            ended += _sum(self._counted, place, None)
            if then is not None:
                ended -= _sum(then.counted, place, None)
                started -= then.in_flight.get(place, 0)
        # Started is what has ended and what still runs.
        started += ended.attempts
        since = then.at if then is not None else now - over_s
        usages = [one.kv_usage for one in here if one.kv_usage is not None]
        return Load(
            requests_per_s=max(0, started) / max(now - since, 1.0),
            in_flight=in_flight,
            waiting=self.waiting(function, now),
            queued=sum(sum(one.queued.values()) for one in here),
            kv_usage=max(usages) if usages else None,
            ttft_p95_s=ended.ttft_s(),
        )

    def forget(self, now: float, keep: Collection[Place]) -> None:
        """Drops routers silent for long, and places that are no more."""
        self._routers = {n: r for n, r in self._routers.items() if now - r.at <= KEPT_S}
        for place in [place for place in self._counted if place not in keep]:
            del self._counted[place]

    def _lively(self, now: float) -> list[_Router]:
        return [router for router in self._routers.values() if now - router.at <= SILENT_S]

    def _carried(self, now: float) -> dict[Place, _Now]:
        """By place; worked out once for each moment."""
        if self._now is not None and self._now[0] == now:
            return self._now[1]
        carried: dict[Place, _Now] = {}
        for router in self._lively(now):
            for key, arm in router.arms.items():
                one = carried.setdefault((key.deployment, key.cluster), _Now())
                one.in_flight += arm.in_flight
                # Each router repeats what the engines say.
                digest = key.spec_digest
                one.queued[digest] = max(one.queued.get(digest, 0), arm.queued)
                if arm.kv_usage is not None:
                    one.kv_usage = max(one.kv_usage or 0.0, arm.kv_usage)
        self._now = (now, carried)
        return carried

    def _remember(self, now: float) -> None:
        if self._past and now - self._past[-1].at < 1.0:
            return
        flying = {place: one.in_flight for place, one in self._carried(now).items()}
        self._past.append(_Past(now, dict(self._counted), flying))
        while len(self._past) > 2 and self._past[1].at <= now - KEPT_S:
            self._past.popleft()

    def _at(self, then: float) -> _Past | None:
        """The newest remembered state that is no younger than asked for; else the oldest."""
        found: _Past | None = None
        for past in reversed(self._past):
            found = past
            if past.at <= then:
                break
        return found


def _sum(counted: _Counted, place: Place, spec_digest: str | None) -> Totals:
    here = counted.get(place, {})
    if spec_digest is not None:
        return here.get(spec_digest, Totals())
    total = Totals()
    for one in here.values():
        total += one
    return total


def _growth(before: ArmSignals | None, now: ArmSignals) -> Totals:
    """What was counted since; a counter that fell has begun again."""
    new = Totals(now.attempts, now.failed, now.ttft, now.input_tokens, now.cached_tokens)
    if before is None or before.attempts > now.attempts:
        return new
    return new - Totals(
        before.attempts, before.failed, before.ttft, before.input_tokens, before.cached_tokens
    )
