"""What this router tells the reconciler of load and health, by deployment and template.

Counted as requests go; told every second, and at once when a function's first request has to wait, for
that may be one that wakes it. Redis away costs nothing but the word. Not here: what follows (reconciler).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.core.snapshot import Snapshot
from router.records import RequestRecord
from router.state import RouterState
from schemas.wire import redis_keys
from schemas.wire.events import EngineReport
from schemas.wire.routing import RoutingTable
from schemas.wire.signals import ArmSignals, FunctionSignals, RouterSignals, ttft_bucket

_log: Final = logging.getLogger(__name__)

_FAILURES: Final = frozenset({"upstream_error", "interrupted", "timeout"})
FULL_EVERY: Final = 10
"""Messages; between them, only what changed is told."""


class _Arm:
    """The counters of one deployment's template."""

    __slots__ = ("attempts", "cached_tokens", "failed", "input_tokens", "key", "ttft")

    def __init__(self, key: tuple[str, str, str, str]) -> None:
        self.key = key
        self.attempts = self.failed = self.input_tokens = self.cached_tokens = 0
        self.ttft: dict[int, int] = {}


class Signals:
    """Owned by one event loop. `finished` is called for every request: it is cheap.

    `waiting` says how many requests each function holds, where any are held; `engine` what the engine
    of a replica last said of itself, where it did.
    """

    def __init__(
        self,
        state: RouterState,
        router_id: str,
        *,
        waiting: Callable[[], Mapping[str, int]] = dict,
        engine: Callable[[str], EngineReport | None] = lambda _: None,
    ) -> None:
        self._state = state
        # A process that starts again counts from nothing: it is another router to whoever adds up.
        self._router = f"{router_id}/{os.urandom(6).hex()}"
        self._waiting = waiting
        self._engine = engine
        self._seq = 0
        self._arms: dict[tuple[str, str, str, str], _Arm] = {}
        self._of_replica: dict[str, _Arm] = {}
        self._arrived: dict[str, int] = {}
        self._told_arms: dict[tuple[str, str, str, str], ArmSignals] = {}
        self._told_functions: dict[str, FunctionSignals] = {}
        self._sleeping: set[str] = set()
        self._urgent = asyncio.Event()
        state.on_install.append(self._installed)

    def finished(self, record: RequestRecord) -> None:
        """A request has ended, whichever way; its last attempt with it."""
        if not record.function:
            return
        self._arrived[record.function] = self._arrived.get(record.function, 0) + 1
        arm = self._of_replica.get(record.replica)
        if arm is None:
            return
        arm.attempts += 1
        if record.outcome in _FAILURES:
            arm.failed += 1
        usage = record.usage
        # What the router counted itself says nothing of caches.
        if usage is not None and not usage.estimated:
            arm.input_tokens += usage.input_tokens
            arm.cached_tokens += usage.cached_tokens
        if record.first_body:
            bucket = ttft_bucket(record.first_body - record.started)
            arm.ttft[bucket] = arm.ttft.get(bucket, 0) + 1

    def abandoned(self, replica: str) -> None:
        """An attempt came to nothing, and another is made elsewhere."""
        arm = self._of_replica.get(replica)
        if arm is not None:
            arm.attempts += 1
            arm.failed += 1

    def wakes(self, function: str) -> None:
        """A request finds a function asleep: told at once, also where another answers in its place."""
        self._sleeping.add(function)
        self._urgent.set()

    def message(self, *, full: bool) -> RouterSignals:
        """What to tell now."""
        self._seq += 1
        flying: dict[tuple[str, str, str, str], int] = {}
        for replica, count in self._state.in_flight.by_replica.items():
            arm = self._of_replica.get(replica)
            if arm is not None:
                flying[arm.key] = flying.get(arm.key, 0) + count
        engines: dict[tuple[str, str, str, str], list[EngineReport]] = {}
        for replica, arm in self._of_replica.items():
            report = self._engine(replica)
            if report is not None:
                engines.setdefault(arm.key, []).append(report)
        arms = {
            key: ArmSignals(
                *key,
                arm.attempts,
                arm.failed,
                dict(arm.ttft),
                arm.input_tokens,
                arm.cached_tokens,
                flying.get(key, 0),
                sum(report.waiting for report in engines.get(key, ())),
                _mean([report.kv_usage for report in engines.get(key, ())]),
            )
            for key, arm in self._arms.items()
        }
        waiting = dict(self._waiting())
        for name in self._sleeping:
            waiting[name] = max(1, waiting.get(name, 0))
        self._sleeping.clear()
        # Who waited when last told is told of once more, that nobody waits any longer.
        waited = {name for name, told in self._told_functions.items() if told.waiting}
        functions = {
            name: FunctionSignals(name, self._arrived.get(name, 0), waiting.get(name, 0))
            for name in self._arrived.keys() | waiting.keys() | waited
        }
        told_arms, told_functions = self._told_arms, self._told_functions
        self._told_arms, self._told_functions = arms, functions
        return RouterSignals(
            router=self._router,
            seq=self._seq,
            arms=tuple(a for key, a in arms.items() if full or a != told_arms.get(key)),
            functions=tuple(
                f for name, f in functions.items() if full or f != told_functions.get(name)
            ),
            full=full,
        )

    async def run(self, redis: Redis, *, interval_s: float = 1.0) -> None:
        """Tells until cancelled."""
        failing, full = False, True
        while True:
            self._urgent.clear()
            data = msgspec.msgpack.encode(self.message(full=full))
            full = self._seq % FULL_EVERY == 0
            try:
                await redis.publish(redis_keys.SIGNALS_CHANNEL, data)
                failing = False
            except (RedisError, OSError, TimeoutError) as error:
                full = True
                if not failing:
                    _log.warning("no signals: Redis: %s", type(error).__name__)
                failing = True
            try:
                async with asyncio.timeout(interval_s):
                    await self._urgent.wait()
            except TimeoutError:
                pass

    def _installed(self, snapshot: Snapshot) -> None:
        self._take(snapshot.table)

    def _take(self, table: RoutingTable) -> None:
        """Replicas that left keep their arm until what they carry has ended."""
        flying = self._state.in_flight.by_replica
        of_replica = {r: arm for r, arm in self._of_replica.items() if r in flying}
        arms = {arm.key: arm for arm in of_replica.values()}
        for function in table.functions:
            for arm in function.arms:
                for replica in arm.replicas:
                    key = (function.name, arm.deployment, arm.cluster, replica.spec_digest)
                    known = arms.get(key) or self._arms.get(key) or _Arm(key)
                    arms[key] = of_replica[replica.id] = known
        self._of_replica, self._arms = of_replica, arms
        names = {function.name for function in table.functions}
        self._arrived = {name: n for name, n in self._arrived.items() if name in names}


def _mean(shares: list[float]) -> float | None:
    # To a hundredth: what differs less is not worth telling.
    return round(sum(shares) / len(shares), 2) if shares else None
