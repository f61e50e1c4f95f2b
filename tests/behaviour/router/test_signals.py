"""What is counted of requests as they really go: answers, retries, failures, and what engines say."""

from __future__ import annotations

import json

from schemas.wire.routing import Arm, Policy, Replica
from schemas.wire.signals import ArmSignals
from tests.behaviour.router.harness import (
    CHAT,
    fake_engine,
    function,
    http,
    post,
    raw,
    routing_table,
    running_router,
    simulated,
)
from tests.support import eventually


def two_arms(stable: str, canary: str, *, weight: int = 100):
    """All sessions go to the canary's arm at weight 100; both are tried where one fails."""
    arms = (
        Arm(
            deployment="chat",
            cluster="here",
            weight=10_000 - weight * 100,
            replicas=(Replica(id="old", url=stable, spec_digest="d-old"),),
        ),
        Arm(
            deployment="chat/canary",
            cluster="here",
            weight=weight * 100,
            replicas=(Replica(id="new", url=canary, spec_digest="d-new"),),
        ),
    )
    return function(arms=arms, policy=Policy(name="least-load", retry_budget_percent=100))


def arms(router) -> dict[str, ArmSignals]:
    return {arm.deployment: arm for arm in router.router.signals.message(full=True).arms}


async def test_answers_are_counted_with_their_first_byte_and_what_was_cached(tmp_path):
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 40},
    }
    body = json.dumps({"choices": [], "usage": usage}).encode()
    async with fake_engine(http(body)) as engine:
        table = routing_table(two_arms(engine.url, engine.url, weight=50))
        async with running_router(table, tmp_path) as router:
            for _ in range(6):
                assert b" 200 " in await raw(router.port, post(CHAT))
            counted = arms(router).values()
            assert sum(arm.attempts for arm in counted) == 6
            assert sum(arm.failed for arm in counted) == 0
            assert sum(sum(arm.ttft.values()) for arm in counted) == 6
            assert {arm.spec_digest for arm in counted} <= {"d-old", "d-new"}
            assert sum(arm.input_tokens for arm in counted) == 600
            assert sum(arm.cached_tokens for arm in counted) == 240
            assert router.router.signals.message(full=True).functions[0].arrived == 6


async def test_a_failure_that_a_retry_made_good_is_the_failing_arms_all_the_same(tmp_path):
    broken = http(b"{}", "503 Service Unavailable")
    async with fake_engine() as good, fake_engine(broken) as bad:
        table = routing_table(two_arms(good.url, bad.url, weight=99))
        async with running_router(table, tmp_path) as router:
            for _ in range(4):
                assert b" 200 " in await raw(router.port, post(CHAT))
            counted = arms(router)
            assert bad.received
            assert counted["chat/canary"].failed == counted["chat/canary"].attempts > 0
            assert counted["chat"].failed == 0
            assert counted["chat"].attempts >= counted["chat/canary"].attempts


async def test_the_simulated_engine_tells_its_cache_hits(tmp_path):
    long = json.loads(CHAT)
    long["messages"][0]["content"] = "the same long beginning " * 60
    long["max_tokens"] = 4
    async with simulated("--speed", "instant") as engine:
        arm = Arm(
            deployment="chat",
            cluster="here",
            replicas=(Replica(id="r", url=engine.url, spec_digest="d"),),
        )
        table = routing_table(function(arms=(arm,)))
        async with running_router(table, tmp_path) as router:
            for _ in range(2):
                assert b" 200 " in await raw(router.port, post(json.dumps(long).encode()))
            counted = await eventually(lambda: (arm := arms(router)["chat"]).attempts == 2 and arm)
            assert counted.input_tokens > 100
            assert 0 < counted.cached_tokens < counted.input_tokens
