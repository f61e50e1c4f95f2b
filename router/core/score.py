"""How good each candidate is for one request. Functions over flat sequences, one position a replica.

`expected-latency` puts the four signals on one horizon of seconds. At the default weights its
argmax is the argmin of expected time to the first token, with prefill priced by how busy the fleet is:

    T(h, n) = c ((n-h) p + (n^2-h^2) q)       seconds of prefill for the n-h tokens not cached
    rho     = min(.9, mean of min(1, backlog/T(0, n)));  lambda = .5 + 1.5 rho/(1-rho)
    saved   = (1+lambda) (T(0, n) - T(h, n))
    wait    = (backlog + T(h, n)) slow - T(h, n) + mu kv_used
    H       = max(max saved, max wait .35/.25, max rtt .35/.15)
    K       = saved/H                  L = 1 - wait/(H .25/.35)
    N       = 1 - rtt/(H .15/.35)      S = pinned .3 s/(H .25/.35), at most 1
    score   = .35 K + .25 S + .25 L + .15 N

rho goes by how much is queued beside what this prompt would cost, not by how many queues there are:
many short turns, each done in a moment, would else price prefill as if the fleet were full. T(0, n)
in `saved` is the slowest candidate's, one number for all: with each one's own, a replica would be
credited for being slow. The choice is made on costs, which are the score without H and turned
round; the horizon is worked out only where it decides, or where a person asks. Not here: which
replicas are candidates (pick), or what is known of them (load, speeds, index).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

from schemas.wire.routing import Weights

MU_S: Final = 1.0
"""What a full KV cache counts as, in seconds of waiting."""
PINNED_S: Final = 0.3
"""What a session's own replica counts as: enough for ties and near-ties, never above load."""
NOMINAL_REQUESTS: Final = 16
"""Requests at which `linear` counts a replica as without headroom."""
MANY: Final = 64
"""Candidates from which on their costs are worked out by columns."""
_DEFAULT: Final = Weights()
_LOAD: Final = _DEFAULT.kv_cache / _DEFAULT.load
_LATENCY: Final = _DEFAULT.kv_cache / _DEFAULT.latency


class Chance(Protocol):
    """The part of `random.Random` used here."""

    def random(self) -> float: ...


class Signals(NamedTuple):
    """What speaks for a replica, each in [0, 1] under `expected-latency`."""

    kv_cache: float
    session: float
    load: float
    latency: float


class Fleet:
    """The candidates of one request; all sequences are of one length, in one order.

    Args:
        slow: at least 1: how much longer prefill takes there just now than its speed says.
        factor: c: how many times the fleet's prefill time a replica needs, or what it counts as if it
            is dearer.
        p: seconds a token: the fleet's 1/v.
        q: seconds a square token: the fleet's 1/(2 a v).
        ready_at: when the queued prefill would be done if nothing came; -inf: idle.
        floor_s: work behind the prefill that runs: the backlog is never less. 0 where it is idle.
        kv_used: 0 to 1.
        now: on the same clock as `ready_at`.
        has_slow: whether any of `slow` may be more than 1.
    """

    def __init__(
        self,
        rtt_s: Sequence[float],
        slow: Sequence[float],
        factor: Sequence[float],
        p: float,
        q: float,
        ready_at: Sequence[float],
        floor_s: Sequence[float],
        kv_used: Sequence[float],
        requests: Sequence[int],
        now: float,
        has_slow: bool = True,
    ) -> None:
        self.rtt_s = rtt_s
        self.slow = slow
        self.factor = factor
        self.p = p
        self.q = q
        self.ready_at = ready_at
        self.floor_s = floor_s
        self.kv_used = kv_used
        self.requests = requests
        self.now = now
        self.has_slow = has_slow

    def __len__(self) -> int:
        return len(self.rtt_s)

    def prefill_s(self, cached: float, tokens: float) -> float:
        """T(h, n) where the factor is 1."""
        return (tokens - cached) * self.p + (tokens * tokens - cached * cached) * self.q

    def backlog_s(self) -> list[float]:
        """Seconds of prefill that stand before a new request."""
        now = self.now
        return [
            x if (x := at - now) > floor else floor
            for at, floor in zip(self.ready_at, self.floor_s, strict=True)
        ]

    def rho(self, tokens: float) -> float:
        """How busy they are on average: one with as much queued as this prompt would cost counts whole."""
        return busy_share(self.backlog_s(), self.prefill_s(0.0, tokens))


def busy_share(backlog_s: Sequence[float], cost_s: float) -> float:
    """rho, of what is queued and what the prompt would cost."""
    if not cost_s:
        return 0.0
    # Twice as fast as min(), for each of them.
    shares = [x if x < cost_s else cost_s for x in backlog_s]  # noqa: FURB136
    return sum(shares) / (cost_s * len(backlog_s))


Costs = Any
"""A list of seconds, or for many candidates numpy's array of them."""
Held = Sequence[tuple[float, Sequence[int]]]
"""(tokens, positions that hold so many), deepest first; nobody stands in it twice."""


def price(rho: float) -> float:
    """1 + lambda: what a second of prefill costs the fleet, itself included."""
    rho = min(0.9, rho)
    return 1.5 + 1.5 * rho / (1 - rho)


class Ranking:
    """The candidates of one request under `expected-latency`."""

    __slots__ = (
        "_backlog_s",
        "_cold_s",
        "_horizon_s",
        "_is_many",
        "_is_plain",
        "_prefill_s",
        "bonus_s",
        "costs_s",
        "fleet",
        "held",
        "pinned",
        "price",
        "tokens",
        "weights",
    )

    def __init__(
        self,
        fleet: Fleet,
        tokens: float,
        held: Held,
        *,
        pinned: int | None = None,
        weights: Weights = _DEFAULT,
        rho: float | None = None,
    ) -> None:
        """`rho` is the fleet's own share of busy replicas where it is not given."""
        self.fleet = fleet
        self.tokens = tokens
        self.held = held
        self.pinned = pinned
        self.weights = weights
        self._horizon_s = 0.0
        self._prefill_s: list[float] = []
        self._backlog_s: list[float] = []
        self._cold_s = fleet.prefill_s(0.0, tokens)
        """T(0, n) where the factor is 1."""
        self._is_plain = (
            MU_S == 1.0
            and (weights is _DEFAULT or weights == _DEFAULT)
            and (not fleet.has_slow or fleet.slow.count(1.0) == len(fleet.slow))
        )
        self.costs_s: Costs
        """The session's bonus taken off."""
        self._is_many = self._is_plain and len(fleet.slow) >= MANY and type(fleet.ready_at) is array
        if self._is_many:
            self.costs_s = self._costs_of_many(rho)
        else:
            self._backlog_s = fleet.backlog_s()
            self.price = price(busy_share(self._backlog_s, self._cold_s) if rho is None else rho)
            self.costs_s = self._costs()
        self.bonus_s = 0.0
        if pinned is not None:
            self.bonus_s = self._bonus(pinned)
            self.costs_s[pinned] -= self.bonus_s

    def _costs(self) -> list[float]:
        """Seconds: weighted rtt + wait + price x prefill. The one loop over all candidates."""
        fleet = self.fleet
        if self._is_plain:
            # Nearly always, and half the time: the same sum, without factors that are 1.
            priced = self.price
            return [
                r + x + k + c * (priced * t0)
                for r, x, k, c, t0 in zip(
                    fleet.rtt_s,
                    self._backlog_s,
                    fleet.kv_used,
                    fleet.factor,
                    self._prefills(),
                    strict=True,
                )
            ]
        kv, load, rtt = self._multipliers()
        # Of wait's prefill (slow - 1) T one T is taken from what is priced.
        priced, mu = kv * self.price - load, load * MU_S
        return [
            rtt * r + load * s * (x + (t := c * t0)) + mu * k + priced * t
            for r, s, c, x, k, t0 in zip(
                fleet.rtt_s,
                fleet.slow,
                fleet.factor,
                self._backlog_s,
                fleet.kv_used,
                self._prefills(),
                strict=True,
            )
        ]

    def least(self, chance: Chance) -> int:
        """Position of the one that costs least; among equals at random."""
        if self._is_many:
            from router.core import many  # noqa: PLC0415 - as below

            return many.least(self.costs_s, chance)
        return least(self.costs_s, chance)

    def _costs_of_many(self, rho: float | None) -> Costs:
        """The plain sum; `rho` as given."""
        from router.core import many  # noqa: PLC0415 - numpy is only for who needs it

        fleet, cold_s = self.fleet, self._cold_s
        backlog = many.backlog_s(fleet)
        priced = self.price = price(many.busy_share(backlog, cold_s) if rho is None else rho)
        held = [(priced * fleet.prefill_s(cached, self.tokens), at) for cached, at in self.held]
        return many.costs_s(fleet, backlog, priced * cold_s, held)

    def _backlogs(self) -> list[float]:
        if not self._backlog_s:
            self._backlog_s = self.fleet.backlog_s()
        return self._backlog_s

    def _prefills(self) -> list[float]:
        """T(h, n) of every candidate, where its factor is 1."""
        if not self._prefill_s:
            prefills = [self._cold_s] * len(self.fleet)
            for cached, positions in self.held:
                each = self.fleet.prefill_s(cached, self.tokens)
                for i in positions:
                    prefills[i] = each
            self._prefill_s = prefills
        return self._prefill_s

    def _multipliers(self) -> tuple[float, float, float]:
        w = self.weights
        return (
            w.kv_cache / _DEFAULT.kv_cache,
            w.load / _DEFAULT.load,
            w.latency / _DEFAULT.latency,
        )

    def _bonus(self, pinned: int) -> float:
        """Seconds that the session is worth; the horizon bounds it, so see first if it matters."""
        factor = self.weights.session / _DEFAULT.session
        costs = self.costs_s
        gap = costs[pinned] - (costs.min() if self._is_many else min(costs))
        if not 0 < gap <= PINNED_S * factor:
            return factor * PINNED_S
        backlogs = self._backlogs()
        busiest = backlogs.index(max(backlogs))
        if max(self._saved_s(pinned) / _LOAD, self._wait_s(busiest)) >= PINNED_S:
            return factor * PINNED_S
        return factor * min(PINNED_S, self.horizon_s / _LOAD)

    @property
    def horizon_s(self) -> float:
        """H; a second where nothing tells the candidates apart."""
        if not self._horizon_s:
            every = range(len(self.fleet))
            saved_s = max(map(self._saved_s, every))
            wait_s = max(map(self._wait_s, every))
            far_s = max(self.fleet.rtt_s)
            self._horizon_s = max(saved_s, wait_s * _LOAD, far_s * _LATENCY) or 1.0
        return self._horizon_s

    def _saved_s(self, i: int) -> float:
        factor = self.fleet.factor
        return self.price * (max(factor) * self._cold_s - factor[i] * self._prefills()[i])

    def _wait_s(self, i: int) -> float:
        fleet = self.fleet
        prefill = fleet.factor[i] * self._prefills()[i]
        return (self._backlogs()[i] + prefill) * fleet.slow[i] - prefill + MU_S * fleet.kv_used[i]

    def signals(self, i: int) -> Signals:
        """What speaks for one candidate. Slower than the choice: it is for people."""
        horizon = self.horizon_s
        return Signals(
            kv_cache=self._saved_s(i) / horizon,
            session=min(1.0, PINNED_S * _LOAD / horizon) if i == self.pinned else 0.0,
            load=1 - self._wait_s(i) * _LOAD / horizon,
            latency=1 - self.fleet.rtt_s[i] * _LATENCY / horizon,
        )

    def score(self, i: int) -> float:
        """The weighted sum of the signals."""
        return weigh(self.signals(i), self.weights)


def weigh(signals: Signals, weights: Weights) -> float:
    return (
        weights.kv_cache * signals.kv_cache
        + weights.session * signals.session
        + weights.load * signals.load
        + weights.latency * signals.latency
    )


def linear_signals(
    fleet: Fleet, tokens: float, held: Held, pinned: int | None = None
) -> list[Signals]:
    """The plain four: share of the prompt held, pinned, headroom (not clipped), nearness."""
    cached = [0.0] * len(fleet)
    for depth, positions in held:
        for i in positions:
            cached[i] = depth / tokens if tokens else 0.0
    far = max(fleet.rtt_s) or 1.0
    return [
        Signals(share, float(i == pinned), 1 - requests / NOMINAL_REQUESTS, 1 - rtt / far)
        for i, (share, requests, rtt) in enumerate(
            zip(cached, fleet.requests, fleet.rtt_s, strict=True)
        )
    ]


def least(costs: Sequence[float], chance: Chance) -> int:
    """Position of the least; among equals at random, so that no replica is everybody's first."""
    lowest = min(costs)
    ties = costs.count(lowest)
    if ties == 1:
        return costs.index(lowest)
    at = -1
    for _ in range(int(chance.random() * ties) + 1):
        at = costs.index(lowest, at + 1)
    return at


def two_choices(costs: Sequence[float], chance: Chance) -> int:
    """The less loaded of two taken at random."""
    one = int(chance.random() * len(costs))
    other = int(chance.random() * (len(costs) - 1))
    other += other >= one
    if len(costs) < 2 or costs[one] <= costs[other]:
        return one
    return other


def rendezvous(session: int, keys: Sequence[int]) -> int:
    """A session's own replica among those with these keys (64-bit hashes of their ids).

    When a replica comes or goes, only sessions that it has or had move.
    """
    return max(range(len(keys)), key=lambda i: _mixed(session ^ keys[i]))


def _mixed(value: int) -> int:
    """SplitMix64's finalizer."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
