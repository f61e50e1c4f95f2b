"""Which replica a request goes to, what is written down of that, and whose shadow gets a copy.

The rule is core's. Not here: sending it (attempts).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from time import perf_counter

from router.conversation import Conversation
from router.core.arms import by_session, is_shadowed
from router.core.health import kept_out
from router.core.pick import available, pick
from router.core.record import Seen
from router.core.snapshot import Candidate
from router.exchange.admitted import Admitted
from router.fleet.brain import Sent


class Chosen(Admitted):
    """A replica for an attempt."""

    def _choose(self) -> tuple[Candidate, Sent | None] | None:
        """A replica for one attempt, and how to count it where caches are weighed or others hear of it."""
        state, function, brain = self._state, self._function, self._proxy.brain
        pool = self._candidates
        ejected: Collection[str] = ()
        forced = self._headers.replica is not None
        if (
            state.breakers or self._tried or function.name in self._snapshot.bounded
        ) and not forced:
            ejected = kept_out(pool, state.breakers, perf_counter())
            carried = self._carried(pool)
            pool = available(pool, carried, without=self._tried, ejected=ejected)
        session = pinned = None
        conversation = self._conversation
        if conversation is not None:
            if function.name in self._snapshot.divided and not forced:
                pool = self._of_arm(pool, conversation)
            if conversation.key is not None:
                session, pinned = conversation.session, conversation.pinned()
        if not pool:
            return None
        found: tuple[Candidate, Sent | None]
        if self._prompt is not None:
            found = brain.choose(pool, function, self._prompt, state.chance, pinned)
        else:
            turn, name = self._counts.turn, function.policy.name
            load = brain.requests(state.in_flight.by_replica)
            picked = pick(pool, name, load, turn, state.chance, session=session, pinned=pinned)
            if picked is None:
                return None
            found = picked, brain.count(picked, function, len(self._body))
        decisions = self._proxy.decisions
        if decisions.wanted < 1:
            decisions.skipped += 1
        else:
            self._seen = self._what_was_seen(pool, found[0], found[1], ejected, pinned or "")
        return found

    def _of_arm(self, pool: Sequence[Candidate], conversation: Conversation) -> Sequence[Candidate]:
        """Those that the conversation's deployment has."""
        deployment = by_session(pool, conversation.number(self._state.chance))
        if deployment is None:
            return ()
        if pool is self._candidates:
            return self._snapshot.of_arm(self._function, self._principal.tenant, deployment)
        return [candidate for candidate in pool if candidate.deployment == deployment]

    def _what_was_seen(
        self,
        pool: Sequence[Candidate],
        chosen: Candidate,
        sent: Sent | None,
        ejected: Collection[str],
        pinned: str,
    ) -> Seen:
        """What the choice was made from, by reference; it is written out later."""
        proxy, function, record = self._proxy, self._function, self.record
        carried: dict[str, int] = {}
        if len(pool) < len(self._candidates):
            counted = self._carried(self._candidates)
            carried = {c.id: counted.get(c.id, 0) for c in self._candidates}
        prompt = self._prompt or proxy.brain.read(
            function, self._endpoint, self._parsed, len(self._body), self._salt
        )
        fleet = proxy.brain.fleet(pool, function)
        if self._prompt is None:  # nothing is weighed then but requests
            load = proxy.brain.requests(self._state.in_flight.by_replica)
            fleet.requests = tuple(load.get(c.id, 0) for c in pool)
        return Seen(
            id=record.decision,
            at=time.time(),
            snapshot=self._snapshot,
            function=function,
            tenant=self._principal.tenant,
            operation=record.operation,
            pool=pool,
            chosen=chosen,
            fleet=fleet,
            held=() if sent is None else sent.held,
            prompt=prompt,
            speeds=proxy.brain.factors(pool, function),
            turn=self._counts.turn,
            session=None if self._conversation is None else self._conversation.session,
            pinned=pinned,
            attempt=record.attempts + 1,
            forced=self._headers.replica is not None,
            skipped=proxy.decisions.skipped,
            tried=self._tried,
            ejected=ejected,
            in_flight=carried,
        )

    def _choose_again(self) -> tuple[Candidate, Sent | None] | None:
        """A replica for one more attempt, if it may be made at all."""
        if not self._left:
            return None
        found = self._choose()
        percent = self._function.policy.retry_budget_percent
        if found is None or not self._counts.budget.spend(perf_counter(), percent):
            return None
        return found

    def _copy_to_shadows(self, conversation: Conversation) -> None:
        """Sends copies to those of the function's shadows that get this conversation's."""
        state, function = self._state, self._function
        number = conversation.number(state.chance)
        for shadow in self._snapshot.shadows(function, self._principal.tenant):
            if not is_shadowed(number, shadow.deployment, shadow.percent):
                continue
            load = state.in_flight.by_replica
            candidate = pick(shadow.replicas, "session", load, 0, state.chance, session=number)
            if candidate is not None and candidate is not self._candidate:
                head = self._head(candidate, self._headers.passed, f"{self.record.id}-shadow")
                self._proxy.shadows.send(candidate, function.policy, head, self._sent_body)
