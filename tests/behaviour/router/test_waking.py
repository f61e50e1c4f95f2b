"""A request for a function that sleeps is held until a replica is there: in bounds, and not for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from schemas.wire.routing import Arm, Function, Policy, Replica
from tests.behaviour.router.harness import (
    CHAT,
    fake_engine,
    function,
    post,
    raw,
    routing_table,
    running_router,
)
from tests.support import eventually


def sleeping(*, wait_s: float = 20.0, most: int = 10, **more: Any) -> Function:
    policy = Policy(name="least-load", queue_max_requests=most)
    arms = (Arm(deployment="sim", cluster="here"),)
    return function(**{"wake_wait_s": wait_s, "policy": policy, "arms": arms, **more})


def awake(url: str) -> Function:
    arm = Arm(deployment="sim", cluster="here", replicas=(Replica(id="sim-r0", url=url),))
    return sleeping(arms=(arm,))


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def held(router) -> int:
    return router.router.proxy.queues.by_function().get("sim", 0)


def told(router) -> dict[str, int]:
    message = router.router.signals.message(full=True)
    return {f.function: f.waiting for f in message.functions}


async def test_it_is_held_and_told_and_answered_when_a_replica_comes(tmp_path):
    async with (
        fake_engine() as engine,
        running_router(routing_table(sleeping()), tmp_path) as router,
    ):
        asked = [asyncio.create_task(raw(router.port, post(CHAT))) for _ in range(3)]
        await eventually(lambda: held(router) == 3)
        assert told(router) == {"sim": 3}
        assert not engine.received
        router.install(routing_table(awake(engine.url), generation=2))
        answers = await asyncio.gather(*asked)
        assert [status_of(answer) for answer in answers] == [200, 200, 200]
        assert len(engine.received) == 3
        await eventually(lambda: not held(router))
        router.assert_idle()


async def test_more_than_may_wait_are_refused_and_who_leaves_waits_no_more(tmp_path):
    async with running_router(routing_table(sleeping(most=2)), tmp_path) as router:
        asked = [asyncio.create_task(raw(router.port, post(CHAT))) for _ in range(2)]
        await eventually(lambda: held(router) == 2)
        refused = await raw(router.port, post(CHAT))
        assert status_of(refused) in (429, 503)
        assert b"retry-after" in refused.lower()
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await eventually(lambda: held(router) == 0)
        await eventually(lambda: router.router.state.in_flight.total == 0)


async def test_it_is_not_held_for_ever(tmp_path):
    async with running_router(routing_table(sleeping(wait_s=0.2)), tmp_path) as router:
        answer = await raw(router.port, post(CHAT))
        assert status_of(answer) in (429, 503)
        assert b"retry-after" in answer.lower()
        router.assert_idle()


async def test_a_function_that_does_not_sleep_is_refused_at_once(tmp_path):
    async with running_router(routing_table(sleeping(wait_s=0.0)), tmp_path) as router:
        answer = await raw(router.port, post(CHAT))
        assert status_of(answer) == 503
        assert told(router) == {"sim": 0}


async def test_where_another_answers_in_its_place_it_is_woken_all_the_same(tmp_path):
    async with fake_engine() as engine:
        other = function(engine.url, name="other")
        table = routing_table(sleeping(fallbacks=("other",)), other)
        async with running_router(table, tmp_path) as router:
            answer = await raw(router.port, post(CHAT))
            assert status_of(answer) == 200
            assert told(router)["sim"] == 1
            assert told(router)["sim"] == 0
