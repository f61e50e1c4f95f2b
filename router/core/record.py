"""From what a choice was made from to what is written down of it.

Pure, and slower than a choice: it is done afterwards, of immutable things that the choice left behind.
Not here: when it is done and where it goes (decisions), or reading it again (rescore).
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from sys import byteorder

from router.core.blocks import Prompt
from router.core.score import Fleet, Held
from router.core.snapshot import Candidate, Snapshot
from schemas.wire.decisions import CHAIN_STRIDE, Considered, Decision, Outcome, Removed
from schemas.wire.routing import Function, Tenant


@dataclass(frozen=True, slots=True)
class Seen:
    """What one choice was made from, by reference: nothing of it changes afterwards."""

    id: str
    at: float
    """Unix seconds."""
    snapshot: Snapshot
    function: Function
    tenant: Tenant
    operation: str
    pool: Sequence[Candidate]
    chosen: Candidate
    fleet: Fleet
    """Of the pool, by position."""
    held: Held
    prompt: Prompt
    speeds: Sequence[float] = ()
    """How many times the fleet's prefill time each of the pool needs."""
    turn: int = 0
    session: int | None = None
    pinned: str = ""
    attempt: int = 1
    forced: bool = False
    skipped: int = 0
    tried: Collection[str] = ()
    ejected: Collection[str] = ()
    in_flight: Mapping[str, int] = field(default_factory=dict)
    """Of replicas that may be full; a copy."""


def written(seen: Seen, router: str, outcome: Outcome | None = None) -> Decision:
    """The record of a choice, with what became of the request where that is known."""
    policy = seen.function.policy
    return Decision(
        id=seen.id,
        at=seen.at,
        router=router,
        tenant=seen.tenant.name,
        function=seen.function.name,
        operation=seen.operation,
        generation=seen.snapshot.generation,
        revision=seen.snapshot.revision,
        policy_since=seen.function.policy_since,
        policy=policy.name,
        weights=policy.weights,
        chosen=seen.chosen.id,
        candidates=considered(seen.pool, seen.fleet, seen.held, seen.speeds),
        removed=removed(
            seen.snapshot,
            seen.function,
            seen.tenant,
            seen.pool,
            seen.in_flight,
            tried=seen.tried,
            ejected=seen.ejected,
        ),
        pinned=seen.pinned,
        session=seen.session,
        turn=seen.turn,
        tokens=seen.prompt.tokens,
        block_tokens=seen.prompt.block_tokens,
        chain=chain(seen.prompt.blocks),
        p=seen.fleet.p,
        q=seen.fleet.q,
        attempt=seen.attempt,
        forced=seen.forced,
        skipped=seen.skipped,
        outcome=outcome,
    )


def considered(
    pool: Sequence[Candidate], fleet: Fleet, held: Held, speeds: Sequence[float] = ()
) -> tuple[Considered, ...]:
    """Every candidate with what scoring read of it; all the others go by position in the pool."""
    cached = [0.0] * len(pool)
    for tokens, positions in held:
        for i in positions:
            cached[i] = tokens
    return tuple(
        Considered(
            replica=c.id,
            deployment=c.deployment,
            cluster=c.cluster,
            rtt_s=fleet.rtt_s[i],
            slow=fleet.slow[i],
            factor=fleet.factor[i],
            backlog_s=max(fleet.ready_at[i] - fleet.now, fleet.floor_s[i], 0.0),
            kv_used=fleet.kv_used[i],
            requests=fleet.requests[i],
            cached_tokens=cached[i],
            speed=speeds[i] if speeds else 0.0,
        )
        for i, c in enumerate(pool)
    )


def removed(
    snapshot: Snapshot,
    function: Function,
    tenant: Tenant,
    pool: Sequence[Candidate],
    in_flight: Mapping[str, int],
    *,
    tried: Collection[str] = (),
    ejected: Collection[str] = (),
) -> tuple[Removed, ...]:
    """Every replica of the function that was not in the pool, and what took it out."""
    kept = {c.id for c in pool}
    arm_of_session = pool[0].deployment if pool else ""
    out: list[Removed] = []
    for arm, replicas in snapshot.arms(function):
        for c in replicas:
            if c.id in kept:
                continue
            running = in_flight.get(c.id, 0)
            if reason := snapshot.kept_from(arm, tenant):
                pass
            elif arm.shadow_percent:
                reason = "a shadow: gets copies only"
            elif c.draining:
                reason = "draining"
            elif c.id in tried:
                reason = "tried before, and failed"
            elif c.id in ejected:
                reason = "kept out after failures"
            elif c.max_concurrent and running >= c.max_concurrent:
                reason = f"full: {running} requests of {c.max_concurrent}"
            elif not c.weight:
                reason = "its deployment has weight 0"
            elif c.deployment != arm_of_session:
                reason = f"the session is on deployment {arm_of_session}"
            else:
                reason = "not asked for"
            out.append(Removed(c.id, reason))
    return tuple(out)


def chain(blocks: Sequence[int]) -> bytes:
    """The prompt's chain of hashes as `Decision.chain` has it."""
    packed = array("Q", blocks[CHAIN_STRIDE - 1 :: CHAIN_STRIDE])
    if byteorder == "little":
        packed.byteswap()
    return packed.tobytes()


def unchain(packed: bytes) -> array[int]:
    """The hashes again."""
    out = array("Q", packed[: len(packed) // 8 * 8])
    if byteorder == "little":
        out.byteswap()
    return out
