"""What recorded requests would have met under another rule: caches, queues and first tokens.

A simulation with the very score that routes: every replica serves prefills in order, at the speed that was
recorded, and holds what it computed. Requests come when they came. The recorded rule is simulated
too, so that like is compared with like; neither is a forecast to the millisecond. Not here: the world
outside the records (requests that were not recorded), decode's effect on prefill, or evictions by answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final

from msgspec.structs import replace

from router.core.record import unchain
from router.core.rescore import Rule, liked
from router.core.score import Chance
from schemas.wire.decisions import CHAIN_STRIDE, Considered, Decision

_DECODE_S: Final = 1.0
"""How long an answer runs after its first token where that is not recorded."""
RuleOf = Callable[[Decision], Rule]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one function under one rule."""

    requests: int
    hit_rate: float
    """Share of prompt tokens that needed no prefill."""
    hotspot: float
    """Prefill of the busiest replica over the mean; 1 is even."""
    ttft_s: tuple[float, ...]
    """Of every request, ascending."""

    @property
    def mean_s(self) -> float:
        return sum(self.ttft_s) / len(self.ttft_s) if self.ttft_s else 0.0

    def quantile_s(self, share: float) -> float:
        """The time that this share of the requests did not exceed."""
        if not self.ttft_s:
            return 0.0
        return self.ttft_s[min(len(self.ttft_s) - 1, int(share * len(self.ttft_s)))]


@dataclass(slots=True)
class _Replica:
    free_at: float = 0.0
    work_s: float = 0.0
    held: dict[int, None] = field(default_factory=dict)
    """Hashes of prefixes it has computed, the longest unused first."""
    ends: list[float] = field(default_factory=list)
    """A heap: when each request that runs is over."""

    def running(self, now: float) -> int:
        while self.ends and self.ends[0] <= now:
            heappop(self.ends)
        return len(self.ends)

    def depth(self, chain: Sequence[int]) -> int:
        """How many hashes of the chain it holds, from the start on."""
        for i in range(len(chain) - 1, -1, -1):
            if chain[i] in self.held:
                return i + 1
        return 0

    def keep(self, chain: Sequence[int], limit: int) -> None:
        for block in reversed(chain):  # the start of a prompt outlives its end
            self.held.pop(block, None)
            self.held[block] = None
        while len(self.held) > limit:
            del self.held[next(iter(self.held))]


def simulate(
    decisions: Sequence[Decision],
    rule_of: RuleOf,
    chance: Chance,
    *,
    cache_tokens: float = float("inf"),
) -> Figures:
    """One function's recorded requests, in the order they came, sent by these rules.

    `cache_tokens`: what one replica's cache holds. Candidates are the recorded ones, those of other arms
    never.
    """
    replicas: dict[str, _Replica] = {}
    pins: dict[int, str] = {}
    ttft_s: list[float] = []
    hit = asked = 0.0
    for turn, decision in enumerate(decisions):
        chain = unchain(decision.chain)
        stride = CHAIN_STRIDE * decision.block_tokens
        limit = int(min(cache_tokens / stride, 1e9)) if stride else 0
        state = [replicas.setdefault(c.replica, _Replica()) for c in decision.candidates]
        at = decision.at
        seen = tuple(
            _seen(c, one, at, min(one.depth(chain) * stride, max(0.0, decision.tokens - 1)))
            for c, one in zip(decision.candidates, state, strict=True)
        )
        session = decision.session
        # The simulated world instead of the recorded one.
        now = replace(
            decision,
            candidates=seen,
            turn=turn,
            pinned=pins.get(session, "") if session is not None else "",
        )
        names = liked(now, rule_of(decision))
        chosen = names[int(chance.random() * len(names))] if len(names) > 1 else names[0]
        i = next(i for i, c in enumerate(seen) if c.replica == chosen)
        mine, known = state[i], seen[i]
        prefill_s = (known.speed or known.factor) * _prefill_s(decision, known.cached_tokens)
        first = max(at, mine.free_at) + prefill_s
        mine.free_at = first
        mine.work_s += prefill_s
        heappush(mine.ends, first + _decode_s(decision))
        mine.keep(chain, limit)
        if session is not None:
            pins[session] = chosen
        ttft_s.append(known.rtt_s + (first - at))
        hit += known.cached_tokens
        asked += decision.tokens
    work = [one.work_s for one in replicas.values()]
    even = sum(work) / len(work) if work else 0.0
    return Figures(
        requests=len(decisions),
        hit_rate=hit / asked if asked else 0.0,
        hotspot=max(work) / even if even else 1.0,
        ttft_s=tuple(sorted(ttft_s)),
    )


def _seen(recorded: Considered, state: _Replica, at: float, cached: float) -> Considered:
    return Considered(
        replica=recorded.replica,
        deployment=recorded.deployment,
        cluster=recorded.cluster,
        rtt_s=recorded.rtt_s,
        slow=recorded.slow,
        factor=recorded.factor,
        backlog_s=max(0.0, state.free_at - at),
        kv_used=0.0,
        requests=state.running(at),
        cached_tokens=cached,
        speed=recorded.speed,
    )


def _prefill_s(decision: Decision, cached: float) -> float:
    n = decision.tokens
    return (n - cached) * decision.p + (n * n - cached * cached) * decision.q


def _decode_s(decision: Decision) -> float:
    outcome = decision.outcome
    if outcome is None or outcome.ttft_s is None:
        return _DECODE_S
    return max(0.0, outcome.duration_s - outcome.ttft_s)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the records say themselves; None where no request said it."""

    hit_rate: float | None
    """By the engines' own counts."""
    ttft_s: tuple[float, ...]


def measured(decisions: Sequence[Decision]) -> Measured:
    """What really happened to the recorded requests."""
    outcomes = [d.outcome for d in decisions if d.outcome is not None and d.outcome.status == 200]
    counted = [o for o in outcomes if o.input_tokens and o.cached_tokens is not None]
    asked = sum(o.input_tokens or 0 for o in counted)
    return Measured(
        hit_rate=sum(o.cached_tokens or 0 for o in counted) / asked if asked else None,
        ttft_s=tuple(sorted(o.ttft_s for o in outcomes if o.ttft_s is not None)),
    )


def elsewhere(decisions: Sequence[Decision], rule_of: RuleOf) -> float:
    """Share of the decisions that the rules would make otherwise, with all else as it was."""
    if not decisions:
        return 0.0
    return sum(d.chosen not in liked(d, rule_of(d)) for d in decisions) / len(decisions)


def latest(decisions: Sequence[Decision]) -> list[Decision]:
    """Each request once, as it was recorded last, by the time it came; retries and forced ones are left out."""
    by_id = {d.id: d for d in decisions if d.attempt == 1 and not d.forced and d.candidates}
    kept = by_id.values()
    return sorted(kept, key=lambda d: (d.at, d.id))
