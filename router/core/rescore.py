"""Deciding again from a record: why a replica was chosen, and who would have been by another rule.

A record holds what scoring read, so the score is worked out with the very functions that made the
choice. Not here: what a record consists of (schemas.wire.decisions), or what follows from many other
choices in a row (replay).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace
from xxhash import xxh64_intdigest

from router.core.score import MU_S, Fleet, Held, Ranking, Signals, linear_signals, rendezvous, weigh
from schemas.wire.decisions import Decision
from schemas.wire.routing import Weights

DEFAULT: Final = Weights()
SCORED: Final = ("expected-latency", "linear")
_EQUAL: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy with its weights."""

    policy: str
    weights: Weights = DEFAULT


@dataclass(frozen=True, slots=True)
class Standing:
    """One candidate at the decision. Seconds are of the expected time to the first token."""

    replica: str
    rtt_s: float
    wait_s: float
    """For what is queued there, and what its cache in use counts as."""
    prefill_s: float
    """Of what it does not hold of the prompt, as the score counted it."""
    saved_s: float
    """Prefill that it saves beside one that holds nothing, at the price of the moment."""
    session_s: float
    """What it is worth that the session was there."""
    signals: Signals | None
    """None where the policy has none."""
    score: float | None

    @property
    def first_token_s(self) -> float:
        return self.rtt_s + self.wait_s + self.prefill_s


@dataclass(frozen=True, slots=True)
class Explanation:
    """`standings` are in the decision's own order of preference; the chosen one may not be first in it
    where a tie was drawn or a person chose.
    """

    standings: tuple[Standing, ...]
    price: float
    """What a second of prefill was taken to cost the fleet, itself included."""
    others: tuple[tuple[str, tuple[str, ...]], ...]
    """(rule, replicas that it likes equally well)."""


def fleet(decision: Decision) -> Fleet:
    """The candidates as scoring saw them."""
    of = decision.candidates
    return Fleet(
        rtt_s=[c.rtt_s for c in of],
        slow=[c.slow for c in of],
        factor=[c.factor for c in of],
        p=decision.p,
        q=decision.q,
        ready_at=[c.backlog_s for c in of],
        floor_s=[0.0] * len(of),
        kv_used=[c.kv_used for c in of],
        requests=[c.requests for c in of],
        now=0.0,
    )


def held(decision: Decision) -> Held:
    """Who held how much of the prompt, the most first."""
    by_depth: dict[float, list[int]] = {}
    for i, candidate in enumerate(decision.candidates):
        if candidate.cached_tokens:
            by_depth.setdefault(candidate.cached_tokens, []).append(i)
    return sorted(by_depth.items(), reverse=True)


def pinned(decision: Decision) -> int | None:
    """Position of the session's own replica, where it is a candidate."""
    names = [c.replica for c in decision.candidates]
    return names.index(decision.pinned) if decision.pinned in names else None


def liked(decision: Decision, rule: Rule, *, session: bool = True) -> tuple[str, ...]:
    """The replicas that a rule likes best as things stood; several where it draws among them.

    `session`: whether it is known where the session was.
    """
    of = decision.candidates
    mine = pinned(decision) if session else None
    if rule.policy == "round-robin":
        return (of[decision.turn % len(of)].replica,)
    if rule.policy == "session" and mine is not None:
        return (of[mine].replica,)
    if rule.policy == "session" and session and decision.session is not None:
        keys = [xxh64_intdigest(c.replica.encode()) for c in of]
        return (of[rendezvous(decision.session, keys)].replica,)
    costs: Sequence[float]
    if rule.policy == "expected-latency":
        ranking = Ranking(
            fleet(decision), decision.tokens, held(decision), pinned=mine, weights=rule.weights
        )
        costs = ranking.costs_s
    elif rule.policy == "linear":
        signals = linear_signals(fleet(decision), decision.tokens, held(decision), mine)
        costs = [-weigh(one, rule.weights) for one in signals]
    else:
        costs = [c.requests for c in of]
        if rule.policy == "random-two-choices":
            # Any that is not alone in being the worst may win.
            worst = max(costs)
            if len(costs) > 1 and list(costs).count(worst) == 1:
                return tuple(c.replica for c in of if c.requests < worst)
            return tuple(c.replica for c in of)
    least = min(costs) + _EQUAL
    return tuple(c.replica for c, cost in zip(of, costs, strict=True) if cost <= least)


def explain(decision: Decision) -> Explanation:
    """Every candidate's standing, and who else would have won."""
    mine, rule = pinned(decision), Rule(decision.policy, decision.weights)
    ranking = Ranking(
        fleet(decision), decision.tokens, held(decision), pinned=mine, weights=DEFAULT
    )
    signals: Sequence[Signals | None] = [None] * len(decision.candidates)
    if rule.policy == "linear":
        signals = linear_signals(fleet(decision), decision.tokens, held(decision), mine)
    elif rule.policy == "expected-latency":
        ranking = Ranking(
            fleet(decision), decision.tokens, held(decision), pinned=mine, weights=rule.weights
        )
        signals = [ranking.signals(i) for i in range(len(decision.candidates))]
    cold_s = max(ranking.fleet.factor) * ranking.fleet.prefill_s(0.0, decision.tokens)
    standings = []
    for i, c in enumerate(decision.candidates):
        prefill_s = c.factor * ranking.fleet.prefill_s(c.cached_tokens, decision.tokens)
        signal = signals[i]
        standings.append(
            Standing(
                replica=c.replica,
                rtt_s=c.rtt_s,
                wait_s=(c.backlog_s + prefill_s) * c.slow - prefill_s + MU_S * c.kv_used,
                prefill_s=prefill_s,
                saved_s=ranking.price * (cold_s - prefill_s),
                session_s=ranking.bonus_s if i == mine and rule.policy in SCORED else 0.0,
                signals=signal,
                score=None if signal is None else weigh(signal, rule.weights),
            )
        )
    order = {c.replica: (c.requests, i) for i, c in enumerate(decision.candidates)}
    standings.sort(
        key=lambda s: (-(s.score or 0.0), s.replica != decision.chosen, order[s.replica])
    )
    return Explanation(tuple(standings), ranking.price, tuple(_others(decision, rule)))


def _others(decision: Decision, rule: Rule) -> list[tuple[str, tuple[str, ...]]]:
    found = [
        (name, liked(decision, Rule(name, rule.weights)))
        for name in ("expected-latency", "linear", "session", "least-load", "round-robin")
        if name != rule.policy
    ]
    if rule.policy in SCORED:
        w = rule.weights
        for name, weights in (
            ("without kvCache", replace(w, kv_cache=0.0)),
            ("without load", replace(w, load=0.0)),
            ("without latency", replace(w, latency=0.0)),
        ):
            found.append((name, liked(decision, Rule(rule.policy, weights))))
        found.append(("without session", liked(decision, rule, session=False)))
    return found
