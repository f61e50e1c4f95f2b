"""Decisions through a real Valkey: recorded by a router's log, explained and replayed by the commands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from redis.asyncio import Redis

from router.core.blocks import Prompt
from router.core.record import Seen
from router.core.score import Fleet
from router.core.snapshot import snapshot
from router.decisions import DecisionLog
from schemas.wire import redis_keys
from schemas.wire.decisions import Outcome
from schemas.wire.routing import Arm, Function, Replica, RoutingTable, Tenant
from tests.behaviour.cli_process import EXAMPLE, detoserve
from tests.behaviour.publish_fixtures import running_valkey
from tests.support import eventually

REPLICAS = tuple(Replica(id=f"r{i}", url=f"http://h:{i + 1}") for i in range(3))
GONE = Replica(id="r9", url="http://h:9", state="draining")
FUNCTION = Function(
    name="chat",
    served_name="m",
    policy_since="9f3c1ab77777",
    arms=(Arm(deployment="d", cluster="eu", replicas=(*REPLICAS, GONE)),),
)
TENANTS = tuple(Tenant(name=name, models=("*",)) for name in ("team", "other"))
SNAPSHOT = snapshot(
    RoutingTable(
        generation=17,
        revision="0123abcd" * 5,
        published_at=0.0,
        functions=(FUNCTION,),
        tenants=TENANTS,
    )
)
POOL = SNAPSHOT.candidates(FUNCTION, TENANTS[0])
DONE = Outcome(
    status=200,
    outcome="ok",
    replica="r1",
    ttft_s=0.12,
    duration_s=1.5,
    input_tokens=1000,
    cached_tokens=512,
)


def fleet(*backlog_s: float, requests: tuple[int, ...] = (0, 0, 0)) -> Fleet:
    return Fleet(
        rtt_s=(0.002, 0.002, 0.08),
        slow=(1.0, 1.0, 1.0),
        factor=(1.0, 1.0, 1.0),
        p=1e-4,
        q=0.0,
        ready_at=backlog_s,
        floor_s=(0.0, 0.0, 0.0),
        kv_used=(0.0, 0.0, 0.0),
        requests=requests,
        now=0.0,
    )


def seen(number: int, *, tenant: Tenant = TENANTS[0], at: float = 1_790_000_000.0) -> Seen:
    return Seen(
        id=f"{number:016x}",
        at=at + number,
        snapshot=SNAPSHOT,
        function=FUNCTION,
        tenant=tenant,
        operation="chat",
        pool=POOL,
        chosen=POOL[1],
        fleet=fleet(0.5, 0.1, 0.0, requests=(4, 1, 0)),
        held=[(576.0, (1,))],
        prompt=Prompt([number % 5 * 1000 + i for i in range(16)], 1024.0),
    )


@asynccontextmanager
async def running(redis: Redis, **settings: float) -> AsyncIterator[DecisionLog]:
    chosen = {"per_s": 1e6, "kept": 10_000, **settings}
    log = DecisionLog("router-1", **chosen)  # type: ignore[arg-type]
    task = asyncio.create_task(log.run(redis))
    await eventually(lambda: log.wanted >= 1 or not chosen["per_s"])
    try:
        yield log
        await log.farewell(redis)
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=0.1)


async def length(redis: Redis, tenant: str = "team") -> int:
    return int(await redis.xlen(redis_keys.decisions(tenant)))


async def run(*argv: str, url: str) -> tuple[int, str, str]:
    done = await asyncio.to_thread(detoserve, *argv, "--redis-url", url)
    return done.returncode, done.stdout, done.stderr


async def test_a_decision_is_recorded_and_explained(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (valkey, redis):
        async with running(redis) as log:
            log.noted(seen(7))
            assert log.is_open(seen(7).id)
            log.ended(seen(7).id, DONE)
            assert not log.is_open(seen(7).id)
        assert log.recorded == 1
        header = f"x-detoserve-route: r1;g=17;d={7:016x}"
        code, out, _ = await run("explain", header, url=valkey.url)
        assert code == 0
        assert "policy expected-latency (default weights), set by commit 9f3c1ab77777" in out
        assert "routing table 17, from commit 0123abcd0123" in out
        assert "512 of 1,000 tokens were cached (thought: 576)" in out
        assert " > r1" in out
        assert "r9  draining" in out
        assert "  least-load       r2" in out
        code, out, _ = await run(
            "explain", f"{7:016x}", "--json", "--tenant", "team", url=valkey.url
        )
        (told,) = json.loads(out)
        assert told["chosen"] == told["standings"][0]["replica"] == "r1"
        assert told["outcome"]["cachedTokens"] == 512
        assert told["otherwise"]["round-robin"] == ["r0"]
        assert set(told["standings"][0]["signals"]) == {"kvCache", "session", "load", "latency"}


async def test_the_newest_decisions_are_listed(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (valkey, redis):
        async with running(redis) as log:
            for number in range(30):
                log.noted(seen(number, tenant=TENANTS[number % 2]))
                log.ended(f"{number:016x}", DONE)
        code, out, _ = await run("explain", url=valkey.url)
        assert code == 0
        head, *rows = out.splitlines()
        assert head.split()[0] == "decision"
        assert [row.split()[0] for row in rows] == [f"{number:016x}" for number in range(10, 30)]
        assert rows[-1].split()[3:8] == ["other", "chat", "expected-latency", "r1", "200"]
        code, out, _ = await run("explain", "--tenant", "team", "--json", url=valkey.url)
        assert {one["tenant"] for one in json.loads(out)} == {"team"}
        assert len(json.loads(out)) == 15


async def test_every_attempt_of_a_request_is_shown(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (valkey, redis):
        async with running(redis) as log:
            log.noted(replace(seen(1), chosen=POOL[0]))
            log.noted(replace(seen(1), attempt=2, pool=POOL[1:], fleet=fleet(0.1, 0), tried={"r0"}))
            log.ended(seen(1).id, replace_outcome(attempts=2))
        code, out, _ = await run("explain", seen(1).id, url=valkey.url)
        assert code == 0
        assert "attempt 1" in out
        assert "attempt 2" in out
        assert "r0  tried before, and failed" in out
        assert "answered by r1 at attempt 2" in out


def replace_outcome(**more: int) -> Outcome:
    from msgspec.structs import replace as changed

    return changed(DONE, **more)


async def test_a_request_that_still_runs_can_be_explained(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (valkey, redis), running(redis) as log:
        log.noted(seen(3))
        await eventually(lambda: length(redis))
        code, out, _ = await run("explain", seen(3).id, url=valkey.url)
        assert code == 0
        assert "had not ended" in out
        log.ended(seen(3).id, DONE)
        await eventually(lambda: log.recorded)
        code, out, _ = await run("explain", seen(3).id, url=valkey.url)
        assert "ok, status 200" in out


async def test_what_is_recorded_has_a_ceiling_a_second(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (_, redis):
        async with running(redis, per_s=5.0) as log:
            taken = 0
            while log.wanted >= 1:
                log.noted(seen(taken))
                taken += 1
            assert 1 <= taken <= 6
        async with running(redis, per_s=0.0) as log:
            assert log.wanted == 0


async def test_tenants_have_streams_of_their_own_that_are_bounded(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (valkey, redis):
        async with running(redis, kept=400) as log:
            log.noted(seen(1, tenant=TENANTS[1]))
            log.ended(seen(1).id, DONE)
            for number in range(2, 2000):
                log.noted(seen(number))
                log.ended(f"{number:016x}", DONE)
        assert await length(redis, "other")
        # Half of what is kept for each of two tenants; Redis trims by whole nodes of a hundred.
        assert 200 <= await length(redis) <= 310
        assert 0 < await redis.ttl(redis_keys.decisions("team")) <= 86_400
        assert (await run("explain", f"{1:016x}", url=valkey.url))[0] == 0
        assert (await run("explain", f"{1:016x}", "--tenant", "team", url=valkey.url))[0] == 1


async def test_a_redis_that_refuses_loses_records_and_nothing_else(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (_, redis):
        await redis.set(redis_keys.decisions("team"), "not a stream")
        async with running(redis) as log:
            log.noted(seen(1))
            log.ended(seen(1).id, DONE)
            await eventually(lambda: log.lost)
            log.noted(seen(2, tenant=TENANTS[1]))
            log.ended(seen(2).id, DONE)
            await eventually(lambda: length(redis, "other"))


async def test_replay_compares_rules_over_what_was_recorded(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (valkey, redis):
        async with running(redis) as log:
            for number in range(60):
                log.noted(replace(seen(number), at=float(number), skipped=1))
                log.ended(f"{number:016x}", DONE)
        code, out, err = await run("replay", "--policy", "round-robin", url=valkey.url)
        assert (code, err) == (0, "")
        assert "chat: 60 recorded requests" in out
        assert "expected-latency  round-robin" in out
        assert "Only 50 % of the requests were recorded" in out
        assert "hit rate 51.2 %" in out
        code, out, _ = await run(
            "replay", "--weight", "kvCache=0", "--weight", "load=1", "--markdown", url=valkey.url
        )
        assert code == 0
        assert out.startswith("### chat: 60 recorded requests\n\n| simulated | expected-latency | ")
        assert "expected-latency, kvCache 0, load 1" in out
        code, out, _ = await run("replay", "--policy", "least-load", "--json", url=valkey.url)
        (told,) = json.loads(out)
        assert told["recorded"]["hitRate"] > told["proposed"]["hitRate"]
        assert told["elsewhere"] == 1.0


async def test_replay_takes_the_policy_of_a_config_repo(tmp_path: Path) -> None:
    function = next(
        line.split(": ")[1]
        for path in (EXAMPLE / "functions").glob("*.yaml")
        for line in path.read_text().splitlines()
        if line.strip().startswith("name: ")
    )
    async with running_valkey(tmp_path) as (valkey, redis):
        async with running(redis) as log:
            named = replace_function(name=function.strip())
            log.noted(replace(seen(1), function=named))
            log.ended(seen(1).id, DONE)
        code, out, _ = await run("replay", "--config", str(EXAMPLE), "--json", url=valkey.url)
        assert code == 0
        assert json.loads(out)[0]["proposed"]["rule"].startswith("expected-latency")


def replace_function(**more: str) -> Function:
    from msgspec.structs import replace as changed

    return changed(FUNCTION, policy=changed(FUNCTION.policy, name="least-load"), **more)


UNANSWERABLE = [
    (("explain", "not-hex"), "is no decision"),
    (("explain", "abc123"), "decision abc123 is not recorded"),
    (("replay",), "say what to try"),
    (("replay", "--policy", "best"), "none of expected-latency"),
    (("replay", "--weight", "speed=1"), "is not like kvCache=0.5"),
    (("replay", "--weight", "load=11"), "must be from 0 to 10"),
    (("replay", "--ref", "main"), "belong to --config"),
    (("replay", "--policy", "linear"), "no decisions are recorded"),
]


async def test_what_cannot_be_answered_is_said(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (valkey, _):
        for argv, words in UNANSWERABLE:
            code, out, err = await run(*argv, url=valkey.url)
            assert code in (1, 2)
            assert out == ""
            assert words in err


async def test_no_redis_is_one_line(tmp_path: Path) -> None:
    done = await asyncio.to_thread(
        detoserve, "explain", "abc", "--state-dir", str(tmp_path), cwd=tmp_path
    )
    assert done.returncode == 2
    assert "no `detoserve up` runs in" in done.stderr
    code, _, err = await run("explain", "abc", url=f"unix://{tmp_path}/nobody.sock")
    assert code == 2
    assert err.startswith("error: Redis:")
