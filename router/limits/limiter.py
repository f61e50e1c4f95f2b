"""Admits requests under limits and budgets that all routers share, mostly without asking anybody.

What a request needs is taken from what this process has leased; where that does not suffice, one question to
Redis serves all that wait. Redis away or silent: each process goes by its part of every limit, never more.
Not here: the arithmetic of leases (core.leases), which limits there are (core.limits, core.limit_plan),
or waiting for a replica (queue).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from router.core.errors import Refusal
from router.core.leases import Book, Message, Verdict
from router.core.limit_plan import Plan
from router.core.limits import (
    limited,
    limits_of,
    month_end,
    month_of,
    over_limit,
    price_nano_usd,
)
from router.core.shares import Amounts, Ask, Failing, Share, blocked
from router.core.snapshot import Principal, Snapshot
from router.ending import end
from schemas.wire import redis_keys
from schemas.wire.routing import Function, Price

_log: Final = logging.getLogger(__name__)
_SCRIPT: Final = (Path(__file__).parent / "shared_limits.lua").read_bytes()
_SHA1: Final = hashlib.sha1(_SCRIPT).hexdigest()  # noqa: S324 - how Redis names scripts
_TICK_S: Final = 0.25
_FORGET_S: Final = 600.0
_FLIGHT_S: Final = 1.0
"""After which a connection that does not answer is given up; nobody waits so long."""
_ASK_AGAIN_S: Final = 0.003
_MOST_ASKS: Final = 64
_MAX_WAIT_S: Final = 5.0


class Admission:
    """A request that was let in. Settle or release it whichever way it ends; the first time counts."""

    def __init__(self, limiter: Limiter, plan: Plan, amounts: Amounts, admitted_at: float) -> None:
        self._limiter = limiter
        self._plan = plan
        self._amounts = amounts
        self._admitted_at = admitted_at
        self._done = False

    def settle(self, input_tokens: int, output_tokens: int, nano_usd: int | None = None) -> None:
        """It has ended and used so much; at the function's price where no cost is given."""
        if self._done:
            return
        self._done = True
        plan = self._plan
        if not plan.ends:
            return
        if nano_usd is None:
            nano_usd = price_nano_usd(plan.price, input_tokens, output_tokens)
        book, tokens = self._limiter.book, input_tokens + output_tokens
        plan.pocket.end(book, self._amounts, tokens, nano_usd, self._admitted_at)
        if book.news:
            self._limiter.tell_now()

    def release(self) -> None:
        """It has ended without using anything. That it came still counts as a request."""
        self.settle(0, 0, 0)

    def undo(self) -> None:
        """It was not served here and tries elsewhere: as if it had never come."""
        if not self._limiter.enabled:
            return
        self.release()
        for share, _ in self._plan.wants:
            if share.limit.role == "requests":
                self._limiter.book.settle_tokens(share, 1, 0, self._admitted_at)

    def headers(self) -> bytes:
        """`x-ratelimit-*` of the narrowest of tenant and key, and a budget's warning; lines with ends."""
        return self._plan.headers(self._limiter.remaining)


_NO_PLAN: Final = Plan((), Price(), 100.0)


@dataclass(slots=True, eq=False)
class _Waiter:
    ask: Ask
    since: float
    answer: asyncio.Future[Failing | None] = field(repr=False)
    """None: let in."""
    failing: list[Failing] = field(default_factory=list)
    """Why it was not let in yet, though it may be."""


class Limiter:
    """Owned by one event loop. `redis` None: this process stands alone.

    Args:
        redis: a client of its own, without a timeout of its own.
        name: of this router, for people; every process is told apart besides.
        expected_routers: processes that share the limits, until Redis has said how many there are.
        wait_s: how long a request may wait for Redis.
    """

    def __init__(
        self,
        redis: Redis | None,
        *,
        name: str,
        expected_routers: int = 1,
        wait_s: float = 0.05,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._wall = wall
        self._redis = redis
        self._wait_s = wait_s
        self.enabled = False
        """Whether anything is limited at all."""
        self.book = Book(
            me=f"{name}-{secrets.token_hex(6)}",
            epoch_key=redis_keys.LIMIT_EPOCH,
            routers_key=redis_keys.LIMIT_ROUTERS,
            expected_routers=expected_routers,
            away=redis is None,
        )
        self.round_trips = 0
        """Questions asked of Redis."""
        self._plans: dict[tuple[str, str, str], Plan] = {}
        self._month = month_of(wall())
        self._unlimited = Admission(self, _NO_PLAN, (0, 0, 0), 0.0)
        self._lost = False
        self._flying: list[_Waiter] = []
        self._waiting: list[_Waiter] = []
        self._later: list[_Waiter] = []
        self._retry_at = 0.0
        self._hearing: asyncio.Task[None] | None = None
        self._flight: asyncio.Task[None] | None = None
        self._again = False
        self._alarm: asyncio.TimerHandle | None = None
        self._wanted = asyncio.Event()

    # What requests call

    def installed(self, snapshot: Snapshot) -> None:
        """Goes by this table from now on."""
        table = snapshot.table
        self._plans.clear()
        self.enabled = limited(table)
        if self.enabled:
            self._wanted.set()

    @property
    def is_shared(self) -> bool:
        """Whether limits are counted over all routers now; else each goes by its part."""
        return not self.book.away

    def admit_now(
        self, principal: Principal, function: Function, input_tokens: int, output_tokens: int
    ) -> Admission | Refusal | None:
        """The answer, where it can be had without waiting; None: `admit` can tell.

        Tokens as estimated: of the prompt, and at most of the answer.
        """
        if not self.enabled:
            return self._unlimited
        plan = self._plan(principal, function)
        if not plan.wants:
            return self._unlimited
        now = self._now()
        amounts = plan.amounts(input_tokens, output_tokens)
        if plan.pocket.take(amounts, now) or self.book.take(plan.pocket, amounts, now):
            return Admission(self, plan, amounts, now)
        failing = blocked(plan.wants, amounts, now)
        if failing is None:
            if not self.book.away:
                return None
            failing = self.book.take_part(plan.wants, amounts, now)
            if failing is None:
                return Admission(self, plan, amounts, now)
        return self._refusal(failing, function)

    async def admit(
        self, principal: Principal, function: Function, input_tokens: int, output_tokens: int
    ) -> Admission | Refusal:
        """The answer, after at most `wait_s` of waiting for Redis."""
        answer = self.admit_now(principal, function, input_tokens, output_tokens)
        if answer is not None:
            return answer
        plan, now = self._plan(principal, function), self._now()
        amounts = plan.amounts(input_tokens, output_tokens)
        waiter = _Waiter(Ask(plan.wants, amounts, now), now, self._loop.create_future())
        self._waiting.append(waiter)
        if self._alarm is None:
            self._alarm = self._loop.call_later(self._wait_s, self._overdue)
        self._fly()
        try:
            failing = await waiter.answer
        except asyncio.CancelledError:
            # Let in just as its client left: nobody else will give it back.
            if waiter.answer.done() and not waiter.answer.cancelled():
                if waiter.answer.result() is None:
                    Admission(self, plan, amounts, now).release()
            else:
                waiter.answer.cancel()
            raise
        if failing is not None:
            return self._refusal(failing, function)
        return Admission(self, plan, amounts, now)

    def remaining(self, share: Share) -> int:
        """What is left, as far as this process knows."""
        if self.book.away and share.is_rate:
            return max(0, self.book.part_of(share.limit.limit) - share.window_total)
        return max(0, share.free + share.pool)

    def _plan(self, principal: Principal, function: Function) -> Plan:
        tenant, key = principal
        name = (tenant.name, key.id, function.name)
        plan = self._plans.get(name)
        if plan is None:
            wants = tuple(
                (self.book.share(limit), limit.unit)
                for limit in limits_of(tenant, key, function, self._month)
            )
            plan = self._plans[name] = Plan(wants, function.price, tenant.budget.soft_percent)
        return plan

    def _refusal(self, failing: Failing, function: Function) -> Refusal:
        now = self._wall()
        share = failing.share
        known = share.is_rate or not self.book.away
        remaining = self.remaining(share) if known else None
        return over_limit(failing, function.name, month_end(now) - now, remaining)

    # The conversation with Redis

    def tell_now(self) -> None:
        """What has changed may let others in: says it with the next message, at once."""
        self._fly()

    def _fly(self) -> None:
        if self._redis is None or self._now() < self._retry_at:
            return
        if self._flight is None:
            self._flight = self._loop.create_task(self._converse(self._redis))
        else:
            self._again = True

    async def _converse(self, redis: Redis) -> None:
        """One message after another, until there is nothing to say."""
        try:
            # What ends in this pass of the loop goes along.
            await asyncio.sleep(0)
            while True:
                self._again = False
                flying = [w for w in self._waiting[:_MOST_ASKS] if not w.answer.done()]
                for waiter in self._waiting[:_MOST_ASKS]:
                    if waiter.answer.done():
                        waiter.ask.put_back()
                del self._waiting[:_MOST_ASKS]
                if not await self._exchange(redis, flying) or not (
                    self._waiting or self._again or self.book.news
                ):
                    return
        finally:
            self._flight = None

    async def _exchange(self, redis: Redis, flying: list[_Waiter]) -> bool:
        message = self.book.message([w.ask for w in flying], self._now())
        self._flying = flying
        self.round_trips += 1
        try:
            async with asyncio.timeout(_FLIGHT_S):
                data = await self._call(redis, message)
            verdicts = self.book.answered(message, data, self._now())
        except (RedisError, OSError, TimeoutError, msgspec.DecodeError) as error:
            self.book.unanswered(message)
            self._retry_at = self._now() + _TICK_S
            self._lose(f"{type(error).__name__}: {error}")
            for waiter in (*flying, *self._waiting, *self._later):
                self._alone(waiter)
            return False
        finally:
            self._flying = []
        if self._lost:
            self._lost = False
            _log.info("limits are shared again")
            # What was cut off unnoticed would hear nothing for ever.
            if self._hearing is not None:
                self._hearing.cancel()
                self._hearing = self._loop.create_task(self._hear(redis))
        for waiter, (verdict, failing) in zip(flying, verdicts, strict=True):
            self._tell(waiter, verdict, failing)
        return True

    async def _call(self, redis: Redis, message: Message) -> bytes:
        arguments = (len(message.keys), *message.keys, redis_keys.LIMIT_RECALL, message.body)
        try:
            data = await redis.execute_command("EVALSHA", _SHA1, *arguments)  # type: ignore[no-untyped-call]
        except NoScriptError:
            data = await redis.execute_command("EVAL", _SCRIPT, *arguments)  # type: ignore[no-untyped-call]
        if not isinstance(data, bytes):
            raise msgspec.DecodeError("no answer of the script")
        return data

    def _tell(self, waiter: _Waiter, verdict: Verdict, failing: list[Failing]) -> None:
        gone = waiter.answer.done()
        if verdict == "granted":
            if gone:
                ask = waiter.ask
                plan = Plan(ask.wants, Price(), 100.0)
                Admission(self, plan, ask.amounts, waiter.since).release()
            else:
                waiter.answer.set_result(None)
        elif gone:
            return
        elif verdict == "refused" or self._now() - waiter.since >= self._wait_s:
            waiter.answer.set_result(_worst(failing) if failing else None)
        else:
            waiter.failing = failing
            self._later.append(waiter)
            if len(self._later) == 1:
                self._loop.call_later(_ASK_AGAIN_S, self._ask_again)

    def _ask_again(self) -> None:
        later, self._later = self._later, []
        now = self._now()
        self.book.empty_pockets()
        for waiter in later:
            if not waiter.answer.done():
                waiter.ask = Ask(waiter.ask.wants, waiter.ask.amounts, now)
                self._waiting.append(waiter)
        if self._waiting:
            self._fly()

    def _overdue(self) -> None:
        """Somebody may have waited long enough."""
        self._alarm = None
        now = self._now()
        waiting = [w for w in (*self._flying, *self._waiting, *self._later) if not w.answer.done()]
        late = [w for w in waiting if now - w.since >= self._wait_s]
        silent = [w for w in late if not w.failing]
        if silent:
            self._lose(f"no answer within {self._wait_s:g} s")
            late = waiting
        for waiter in late:
            self._alone(waiter)
        left = [w.since for w in waiting if not w.answer.done()]
        if left:
            self._alarm = self._loop.call_at(min(left) + self._wait_s, self._overdue)

    def _alone(self, waiter: _Waiter) -> None:
        """Decides without Redis."""
        if waiter.answer.done():
            return
        if waiter.failing and not self.book.away:
            waiter.answer.set_result(_worst(waiter.failing))
            return
        ask = waiter.ask
        waiter.answer.set_result(self.book.take_part(ask.wants, ask.amounts, self._now()))

    def _lose(self, why: str) -> None:
        self.book.lost()
        if not self._lost:
            self._lost = True
            _log.warning("limits: Redis: %s; going by 1/%d of each limit", why, self.book.sharers)

    # In the background

    async def run(self) -> None:
        """Keeps the shared counters told, until cancelled. Idle while nothing is limited."""
        await self._wanted.wait()
        forget_at = self._now() + _FORGET_S
        if self._redis is not None:
            self._hearing = self._loop.create_task(self._hear(self._redis))
        try:
            while True:
                await asyncio.sleep(_TICK_S)
                now = self._now()
                month = month_of(self._wall())
                if month != self._month:
                    self._month = month
                    self._plans.clear()
                if now >= forget_at:
                    forget_at = now + _FORGET_S
                    self._forget()
                if self.book.look(now) or self.book.away or self.book.is_renewal_due(now):
                    self._fly()
        finally:
            if self._hearing is not None:
                await end([self._hearing])
                self._hearing = None

    def _forget(self) -> None:
        """Drops shares that no request stands under any more."""
        keep = {s.limit.key for plan in self._plans.values() for s, _ in plan.wants}
        # What was spent this month is this process's to remember, also for a budget taken away.
        keep |= {key for key in self.book.shares if f":{self._month}:" in key}
        self.book.forget(keep)

    async def close(self) -> None:
        """Gives back what is leased, if Redis can be told. Whoever waits is decided for."""
        self.book.leave()
        if self._flight is not None:
            await asyncio.wait([self._flight])
        if self._redis is not None and self.book.news and not self.book.away:
            self._fly()
            if self._flight is not None:
                await asyncio.wait([self._flight])
        if self._alarm is not None:
            self._alarm.cancel()
        for waiter in (*self._waiting, *self._later):
            self._alone(waiter)

    async def _hear(self, redis: Redis) -> None:
        """Gives back at once what another router needs."""
        wait_s = 0.1
        while True:
            try:
                async with redis.pubsub() as channel:
                    await channel.subscribe(redis_keys.LIMIT_RECALL)
                    # Whatever was said while nobody listened.
                    self.book.look(self._now())
                    self._fly()
                    async for message in channel.listen():
                        wait_s = 0.1
                        if message["type"] == "message":
                            self._heard(message["data"])
            except (RedisError, OSError, TimeoutError):
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _MAX_WAIT_S)

    def _heard(self, data: bytes) -> None:
        if not data or self.book.recall(data.decode()):
            self._fly()


def _worst(failing: list[Failing]) -> Failing:
    """The one that keeps the request out for longest."""
    return max(
        failing,
        key=lambda f: (f.never, f.share.limit.role.startswith("budget"), f.wait_s or 0.0),
    )
