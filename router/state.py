"""What one router process serves from: the current snapshot, and what it knows besides.

A new table is swapped in between two requests; running ones keep the connection they have. Not here:
where tables come from (tables).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from router.core.health import Breaker
from router.core.pick import effective_policy
from router.core.retries import RetryBudget
from router.core.snapshot import Candidate, Snapshot, snapshot
from router.in_flight import InFlight
from router.upstream.pool import Pool
from schemas.wire.routing import RoutingTable

_log: Final = logging.getLogger(__name__)


@dataclass(slots=True)
class FunctionState:
    """What is counted for one function."""

    turn: int = 0
    budget: RetryBudget = field(default_factory=RetryBudget)


class RouterState:
    """Owned by one event loop; nothing here is thread-safe."""

    def __init__(
        self,
        *,
        upstream_keepalive_s: float,
        upstream_silence_s: float,
        chance: random.Random | None = None,
    ) -> None:
        self.snapshot: Snapshot | None = None
        self.fresh_at = 0.0
        """Unix seconds at which the table was last known to be current."""
        self.draining = False
        self.in_flight = InFlight()
        self.chance = chance or random.Random()
        self.on_install: list[Callable[[Snapshot], None]] = []
        self._upstream_keepalive_s = upstream_keepalive_s
        self._upstream_silence_s = upstream_silence_s
        self.breakers: dict[str, Breaker] = {}
        """Of replicas that have failed and not recovered; the others have none."""
        self._pools: dict[str, Pool] = {}
        self._functions: dict[str, FunctionState] = {}

    def install(self, table: RoutingTable, fresh_at: float) -> bool:
        """Serves from this table on. False, and nothing changes, when it is not a newer one."""
        current = self.snapshot
        if current is not None and table.generation <= current.generation:
            return False
        new = snapshot(table)
        for problem in new.unusable:
            _log.error("generation %d: left out: %s", table.generation, problem)
        for function in table.functions:
            effective = effective_policy(function.policy.name)
            known = current.functions.get(function.name) if current else None
            if effective != function.policy.name and (
                known is None or known.policy.name != function.policy.name
            ):
                _log.warning(
                    "function %s: policy %s is not built in this version and acts as %s",
                    function.name,
                    function.policy.name,
                    effective,
                )
        self.snapshot = new
        self.freshen(fresh_at)
        self._functions = {
            name: self._functions.get(name) or FunctionState() for name in new.functions
        }
        for replica in [r for r in self._pools if r not in new.replicas]:
            self._pools.pop(replica).close()
        for replica in [r for r in self.breakers if r not in new.replicas]:
            del self.breakers[replica]
        _log.info(
            "serving generation %d (%s): %d functions, %d replicas, %d tenants",
            table.generation,
            table.revision[:12],
            len(table.functions),
            len(new.replicas),
            len(table.tenants),
        )
        for hear in self.on_install:
            hear(new)
        return True

    def freshen(self, at: float) -> None:
        """The current table was still current at `at`; time does not go back."""
        self.fresh_at = max(self.fresh_at, at)

    def function(self, name: str) -> FunctionState:
        found = self._functions.get(name)
        if found is None:
            found = self._functions[name] = FunctionState()
        return found

    def pool(self, candidate: Candidate) -> Pool:
        """Connections of a replica; one that has moved gets a new pool."""
        pool = self._pools.get(candidate.id)
        if pool is None or pool.address != candidate.address:
            if pool is not None:
                pool.close()
            pool = Pool(
                candidate,
                keepalive_s=self._upstream_keepalive_s,
                silence_s=self._upstream_silence_s,
            )
            if self.snapshot is not None and candidate.id in self.snapshot.replicas:
                self._pools[candidate.id] = pool
        return pool

    def breaker(self, replica: str) -> Breaker:
        """The replica's, made if it has none: something has gone wrong with it."""
        return self.breakers.setdefault(replica, Breaker())

    def recovered(self, replica: str) -> None:
        """It answered as it should."""
        breaker = self.breakers.pop(replica, None)
        if breaker is not None and breaker.ejections:
            _log.info("replica %s answers again", replica)

    def sweep(self) -> None:
        """Closes connections that have been idle too long."""
        for pool in self._pools.values():
            pool.sweep()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
