"""How fast each replica computes prompts and how far away it is, learned from what happens.

    T(h, n) = c_i ((n-h) p + (n^2-h^2) q)      p, q: the fleet's; c_i: the replica's own factor

p and q are fitted over all replicas of a function, the factor is a replica's own, drawn to the
fleet's median until it has computed about a million tokens itself. Errs slow: a sample that says
"slower" is believed sooner than one that says "faster". Samples only add up; what scoring reads changes
in `refresh`, for all replicas at once, about once a second. Not here: which requests make good samples (a
prefill's time at the front of its queue, without the network).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, isfinite
from statistics import median
from typing import Final

DEFAULT_TOKENS_PER_S: Final = 4_000.0
"""Of a fleet never seen: slower than most, because an error that way costs less."""
DEFAULT_ATTENTION_TOKENS: Final = 32_768.0
PRIOR_TOKENS: Final = 1_000_000.0
"""A replica's own factor weighs as much as the fleet's median after so many tokens."""
MEMORY_TOKENS: Final = 8_000_000.0
"""Older samples fade: a replica that changes its pace is known by the new one after about so many."""
OUTLIER: Final = 3.0
"""A sample counts as at most so many times slower or faster than expected."""
_FIRST_OUTLIER: Final = 100.0
"""While nothing but the default is expected."""
SLOWER_COUNTS: Final = 2.0
"""How much more a sample weighs that is slower than expected."""
MIN_SAMPLE_TOKENS: Final = 64.0
"""Shorter prefills time the engine's steps, not its pace."""
MIN_FIT_TOKENS: Final = 20_000.0
"""The fleet's own fit replaces the default after so many."""
RAMP_S: Final = 30.0
RAMP_SLOW: Final = 2.0
"""How much slower a replica is taken to be the moment it appears among older ones."""
_NO_DEARER: Final[Mapping[int, float]] = {}
_RTT_GAIN: Final = 1 / 2
"""Noise only adds: the shorter one is the truer one."""
_RTT_RISE: Final = 1 / 32
"""Connections are at times slow to open for reasons other than distance."""


@dataclass(slots=True)
class Pace:
    """p and q of a fleet: least squares over fading sums, neither below zero."""

    default_tokens_per_s: float = DEFAULT_TOKENS_PER_S
    default_attention_tokens: float = DEFAULT_ATTENTION_TOKENS
    _tokens: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0
    _yy: float = 0.0
    _xt: float = 0.0
    _yt: float = 0.0

    def learn(self, linear: float, square: float, seconds: float) -> None:
        """One prefill of `linear` = n-h tokens and `square` = n^2-h^2 of them squared."""
        keep = exp(-linear / MEMORY_TOKENS)
        # Weighted by 1/linear: long prompts are timed better, but not by the square of their length.
        weight = 1 / linear
        self._tokens = self._tokens * keep + linear
        self._xx = self._xx * keep + weight * linear * linear
        self._xy = self._xy * keep + weight * linear * square
        self._yy = self._yy * keep + weight * square * square
        self._xt = self._xt * keep + weight * linear * seconds
        self._yt = self._yt * keep + weight * square * seconds

    @property
    def known(self) -> bool:
        """Whether the fit is of samples, and not the default."""
        return self._tokens >= MIN_FIT_TOKENS

    def fit(self) -> tuple[float, float]:
        """(p, q): seconds a token, seconds a square token."""
        p = 1 / self.default_tokens_per_s
        q = p / (2 * self.default_attention_tokens)
        if not self.known:
            return p, q
        # Drawn to the default's shape (not its speed) where lengths vary too little to tell p from q.
        determinant = self._xx * self._yy - self._xy * self._xy
        if determinant > 1e-3 * self._xx * self._yy:
            fitted_p = (self._xt * self._yy - self._yt * self._xy) / determinant
            fitted_q = (self._yt * self._xx - self._xt * self._xy) / determinant
            if fitted_p > 0 and fitted_q >= 0:
                return fitted_p, fitted_q
            if fitted_p > 0:
                return self._xt / self._xx, 0.0
        shape = q / p
        scale = (self._xt + shape * self._yt) / (
            self._xx + 2 * shape * self._xy + shape * shape * self._yy
        )
        return scale, scale * shape


@dataclass(slots=True)
class _Replica:
    since: float
    rtt_s: float
    rtt_known: bool = False
    tokens: float = 0.0
    linear: float = 0.0
    square: float = 0.0
    seconds: float = 0.0

    def factor(self, p: float, q: float) -> float:
        """Its own, before it is drawn anywhere; 1 before the first sample."""
        return self.seconds / (p * self.linear + q * self.square) if self.linear else 1.0


@dataclass(slots=True)
class Speeds:
    """Replicas of one function, by slot. p, q and the dicts are what scoring reads."""

    pace: Pace = field(default_factory=Pace)
    p: float = 1 / DEFAULT_TOKENS_PER_S
    """Seconds a token: the fleet's 1/v."""
    q: float = 1 / (2 * DEFAULT_TOKENS_PER_S * DEFAULT_ATTENTION_TOKENS)
    """Seconds a square token: the fleet's 1/(2 a v)."""
    factor: dict[int, float] = field(default_factory=dict)
    """c_i: how many times the fleet's time a replica needs."""
    cost: dict[int, float] = field(default_factory=dict)
    """The factor, times what makes prefill dearer there than its time."""
    slow: dict[int, float] = field(default_factory=dict)
    """At least 1: more while a replica has just appeared."""
    rtt_s: dict[int, float] = field(default_factory=dict)
    version: int = 0
    """Grows whenever one of them changes."""
    _replicas: dict[int, _Replica] = field(default_factory=dict)

    def add(self, slot: int, now: float, rtt_s: float = 0.0) -> None:
        """A replica that appears. `rtt_s` is what people say of its cluster, until it is measured."""
        self._replicas[slot] = _Replica(now, rtt_s)
        self.refresh(now)

    def remove(self, slot: int) -> None:
        self._replicas.pop(slot, None)
        for known in (self.factor, self.cost, self.slow, self.rtt_s):
            known.pop(slot, None)
        self.version += 1

    def prefill_s(self, slot: int, cached: float, tokens: float) -> float:
        """T(h, n) on one replica."""
        linear, square = tokens - cached, tokens * tokens - cached * cached
        return self.factor[slot] * (linear * self.p + square * self.q)

    def learn(self, slot: int, cached: float, tokens: float, prefill_s: float) -> None:
        """A prefill took so long, from the front of its queue to its first token."""
        replica = self._replicas.get(slot)
        linear, square = tokens - cached, tokens * tokens - cached * cached
        if (
            replica is None
            or linear < MIN_SAMPLE_TOKENS
            or prefill_s <= 0
            or not isfinite(prefill_s)
        ):
            return
        p, q = self.p, self.q
        expected_s = (linear * p + square * q) * replica.factor(p, q)
        at_most = OUTLIER if self.pace.known else _FIRST_OUTLIER
        prefill_s = min(max(prefill_s, expected_s / at_most), expected_s * at_most)
        weight = SLOWER_COUNTS if prefill_s > expected_s else 1.0
        keep = exp(-linear / MEMORY_TOKENS)
        replica.tokens = replica.tokens * keep + linear
        replica.linear = replica.linear * keep + weight * linear
        replica.square = replica.square * keep + weight * square
        replica.seconds = replica.seconds * keep + weight * prefill_s
        self.pace.learn(linear, square, prefill_s)

    def measured_rtt(self, slot: int, seconds: float) -> None:
        """A round trip was timed: opening a connection, or a probe."""
        replica = self._replicas.get(slot)
        if replica is None:
            return
        if not replica.rtt_known:
            replica.rtt_known = True
            replica.rtt_s = seconds
        else:
            error = seconds - replica.rtt_s
            replica.rtt_s += error * (_RTT_RISE if error > 0 else _RTT_GAIN)

    def refresh(self, now: float, dearer: Mapping[int, float] = _NO_DEARER) -> None:
        """Puts what was learned where scoring reads it. `dearer`: times; 1 for those left out."""
        p, q = self.p, self.q = self.pace.fit()
        factors = [r.factor(p, q) for r in self._replicas.values() if r.tokens]
        middle = median(factors) if factors else 1.0
        # Where all have just appeared, as when this router has, none is newer than the others.
        eldest = min((r.since for r in self._replicas.values()), default=now)
        eldest_left = max(0.0, 1 - (now - eldest) / RAMP_S)
        for slot, replica in self._replicas.items():
            own = replica.tokens / (replica.tokens + PRIOR_TOKENS)
            self.factor[slot] = own * replica.factor(p, q) + (1 - own) * middle
            self.cost[slot] = self.factor[slot] * dearer.get(slot, 1.0)
            left = max(0.0, 1 - (now - replica.since) / RAMP_S)
            self.slow[slot] = 1 + (RAMP_SLOW - 1) * (left - eldest_left)
            self.rtt_s[slot] = replica.rtt_s
        self.version += 1
