"""Conversations through a router: where they stay, which arm they are on, who gets copies, who may say where."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from schemas import api_keys
from schemas.wire.routing import Arm, Function, Key, Policy, Replica, RoutingTable
from tests.behaviour.router.harness import (
    KEY,
    FakeEngine,
    Received,
    RunningRouter,
    fake_engine,
    http,
    post,
    raw,
    routing_table,
    running_router,
    tenant,
)
from tests.support import eventually

DEBUG_KEY = api_keys.create()
TENANTS = (
    tenant(
        keys=(
            Key(id=KEY.id, sha256=bytes.fromhex(KEY.sha256)),
            Key(
                id=DEBUG_KEY.id,
                sha256=bytes.fromhex(DEBUG_KEY.sha256),
                scopes=("inference", "debug"),
            ),
        )
    ),
)
SESSION = Policy(name="session")


@dataclass
class Fleet:
    """Engines by name, each of an arm of its own name."""

    router: RunningRouter
    engines: dict[str, FakeEngine]

    def table(self, generation: int, names: str = "abc", **more: Any) -> RoutingTable:
        return table(self.engines, names, generation=generation, **more)

    async def ask(
        self, body: dict[str, Any], headers: str = "", key: str = KEY.text
    ) -> tuple[int, str, str]:
        """(status, replica, decision)"""
        answer = await raw(
            self.router.port, post(json.dumps(body).encode(), headers=headers, key=key)
        )
        status = int(answer.split(b" ", 2)[1])
        route = re.search(rb"x-detoserve-route: ([^;]+);g=\d+;d=(\w+)", answer)
        return status, *(group.decode() for group in (route.groups() if route else (b"", b"")))

    async def where(self, body: dict[str, Any], headers: str = "") -> str:
        status, replica, _ = await self.ask(body, headers)
        assert status == 200
        return replica

    async def metric(self, line: str) -> float:
        text = (await admin(self.router, "/metrics")).decode()
        found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
        return float(found.group(1)) if found else 0.0


async def admin(router: RunningRouter, path: str) -> bytes:
    port = int(router.router.admin_url.rpartition(":")[2])
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    return await raw(port, request)


def table(
    engines: dict[str, FakeEngine],
    names: str = "abc",
    *,
    generation: int = 1,
    policy: Policy = SESSION,
    arms: dict[str, dict[str, Any]] | None = None,
) -> RoutingTable:
    """One replica of each name; an arm each where `arms` says of what weight, else all in one."""
    replicas = {name: Replica(id=name, url=engines[name].url) for name in names}
    made = (
        (Arm(deployment="d", cluster="here", replicas=tuple(replicas.values())),)
        if arms is None
        else tuple(
            Arm(deployment=f"arm-{name}", cluster="here", replicas=(replicas[name],), **more)
            for name, more in arms.items()
        )
    )
    function = Function(name="sim", served_name="sim", policy=policy, arms=made)
    return routing_table(function, generation=generation, tenants=TENANTS)


@asynccontextmanager
async def fleet(folder: Path, names: str = "abc", **more: Any) -> AsyncIterator[Fleet]:
    settings = more.pop("settings", {})
    async with AsyncExitStack() as stack:
        engines = {name: await stack.enter_async_context(fake_engine()) for name in names}
        started = table(engines, names, **more)
        router = await stack.enter_async_context(
            running_router(started, folder, probe_interval_s=0, **settings)
        )
        yield Fleet(router, engines)


def turns(*texts: str, system: str = "Be kind.", **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": system}]
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"model": "sim", "messages": messages, **more}


NAMED = {
    "header": lambda name: ({}, f"X-Session-ID: {name}\r\n"),
    "prompt_cache_key": lambda name: ({"prompt_cache_key": name}, ""),
    "safety_identifier": lambda name: ({"safety_identifier": name}, ""),
    "user": lambda name: ({"user": name}, ""),
    "anthropic": lambda name: ({"metadata": {"user_id": name}}, ""),
}


@pytest.mark.parametrize("by", NAMED)
async def test_a_session_stays_on_one_replica_however_it_is_named(tmp_path: Path, by: str) -> None:
    async with fleet(tmp_path) as it:
        seen: dict[str, set[str]] = {}
        for turn in range(3):
            for i in range(12):
                more, headers = NAMED[by](f"s{i}")
                replica = await it.where(turns(f"{turn} {i}", **more), headers)
                seen.setdefault(f"s{i}", set()).add(replica)
        assert all(len(replicas) == 1 for replicas in seen.values())
        assert len(set.union(*seen.values())) == 3
        assert await it.metric("detoserve_router_sessions") == 12


async def test_a_pin_moves_when_its_replica_goes_and_stays_until_it_is_released(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path) as it:
        header = "X-Session-ID: s / 1\r\n"
        home = await it.where(turns("a"), header)
        others = "abc".replace(home, "")
        it.router.install(it.table(2, others))
        new = await it.where(turns("a"), header)
        assert new != home
        it.router.install(it.table(3))
        assert await it.where(turns("a"), header) == new
        assert await it.metric('detoserve_router_session_changes_total{what="moved"}') == 1
        # Released, it is where its hash says once more.
        released = await raw(
            it.router.port,
            post(b"", path="/v1/sessions/s%20%2F%201").replace(b"POST", b"DELETE", 1),
        )
        assert released.startswith(b"HTTP/1.1 200")
        assert json.loads(released.partition(b"\r\n\r\n")[2])["deleted"] is True
        assert await it.metric("detoserve_router_sessions") == 0
        assert await it.where(turns("a"), header) == home


async def test_the_last_request_of_a_session_leaves_nothing_behind(tmp_path: Path) -> None:
    async with fleet(tmp_path) as it:
        header = "X-Session-ID: s\r\n"
        await it.where(turns("a"), header)
        assert await it.metric("detoserve_router_sessions") == 1
        await it.where(turns("a"), header + "X-Session-Final: true\r\n")
        assert await it.metric("detoserve_router_sessions") == 0
        sent = it.engines["a"].received + it.engines["b"].received + it.engines["c"].received
        assert all(b"x-session-final" not in request.headers for request in sent)
        assert all(request.headers[b"x-session-id"] == b"s" for request in sent)


async def test_affinity_that_is_off_remembers_nothing(tmp_path: Path) -> None:
    off = Policy(name="least-load", session_affinity=False)
    async with fleet(tmp_path, policy=off) as it:
        await it.where(turns("a"), "X-Session-ID: s\r\n")
        assert await it.metric("detoserve_router_sessions") == 0


async def test_ending_a_session_needs_a_key_and_a_name(tmp_path: Path) -> None:
    async with fleet(tmp_path, "a") as it:
        for path, key, status in (
            ("/v1/sessions/s", "sk-wrong", b"401"),
            ("/v1/sessions/", KEY.text, b"404"),
        ):
            request = post(b"", path=path, key=key).replace(b"POST", b"DELETE", 1)
            assert (await raw(it.router.port, request)).startswith(b"HTTP/1.1 " + status)
        got = await raw(
            it.router.port, post(b"", path="/v1/sessions/s").replace(b"POST", b"GET", 1)
        )
        assert got.startswith(b"HTTP/1.1 405")
        assert b"Allow: DELETE" in got


async def test_a_session_breaks_near_ties_under_expected_latency(tmp_path: Path) -> None:
    async with fleet(tmp_path, policy=Policy()) as it:
        same = turns("x" * 2000)
        for name in "abc":
            header = f"X-Session-ID: of-{name}\r\n"
            await it.ask(same, header + f"x-detoserve-replica: {name}\r\n", DEBUG_KEY.text)
        # On a busy machine opening a connection may have taken longer than a session is worth.
        brain = it.router.router.brain
        for speeds in brain._speeds.values():
            for replica in speeds._replicas.values():
                replica.rtt_s = 0.0
        brain._refresh(brain.now())
        # All of them hold the prompt and are idle: the session decides.
        for name in "abc" * 4:
            assert await it.where(same, f"X-Session-ID: of-{name}\r\n") == name


CANARY = {"a": {"weight": 70}, "b": {"weight": 30}}


async def test_a_conversation_stays_on_its_arm_without_any_name(tmp_path: Path) -> None:
    async with fleet(tmp_path, "ab", arms=CANARY, policy=Policy()) as it:
        arms: dict[int, set[str]] = {}
        for i in range(60):
            talk = [f"question {i}"]
            for turn in range(2):
                arms.setdefault(i, set()).add(await it.where(turns(*talk)))
                talk += [f"answer {turn}", f"more {turn}"]
        assert all(len(seen) == 1 for seen in arms.values())
        on_canary = sum(seen == {"b"} for seen in arms.values())
        assert 8 <= on_canary <= 30
        # More weight for the canary moves some to it, and nobody away from it.
        it.router.install(it.table(2, "ab", arms={"a": {"weight": 40}, "b": {"weight": 60}}))
        after = {i: await it.where(turns(f"question {i}")) for i in range(60)}
        assert all(after[i] == "b" for i, seen in arms.items() if seen == {"b"})
        assert sum(replica == "b" for replica in after.values()) > on_canary


async def test_an_arm_that_is_away_lends_its_sessions_and_gets_them_back(tmp_path: Path) -> None:
    async with fleet(tmp_path, "ab", arms=CANARY) as it:
        header = "X-Session-ID: {}\r\n"
        mine = [i for i in range(30) if await it.where(turns("q"), header.format(i)) == "b"]
        assert mine
        it.router.install(it.table(2, "ab", arms={"a": {"weight": 70}}))
        assert {await it.where(turns("q"), header.format(i)) for i in mine} == {"a"}
        it.router.install(it.table(3, "ab", arms=CANARY))
        assert {await it.where(turns("q"), header.format(i)) for i in mine} == {"b"}


async def test_weight_zero_serves_nobody(tmp_path: Path) -> None:
    async with fleet(tmp_path, "ab", arms={"a": {"weight": 0}}) as it:
        status, _, _ = await it.ask(turns("q"))
        assert status == 503
        it.router.install(it.table(2, "ab", arms={"a": {"weight": 0}, "b": {}}))
        assert {await it.where(turns(f"q{i}")) for i in range(10)} == {"b"}


SHADOW = {"a": {}, "b": {"shadow_percent": 40.0}}


async def test_a_shadow_gets_copies_of_whole_conversations_and_answers_nobody(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path, "ab", arms=SHADOW) as it:
        for turn in range(2):
            for i in range(25):
                assert await it.where(turns(f"t{turn}"), f"X-Session-ID: s{i}\r\n") == "a"
        copies = (
            'detoserve_router_shadow_requests_total{deployment="arm-b",function="sim",outcome="ok"}'
        )
        await eventually(lambda: idle(it))
        got = [request.headers[b"x-session-id"] for request in it.engines["b"].received]
        assert await it.metric(copies) == len(got)
        assert 4 <= len(set(got)) <= 18
        assert all(got.count(session) == 2 for session in got)
        copy = it.engines["b"].received[0]
        assert copy.headers[b"x-request-id"].endswith(b"-shadow")
        assert copy.body == json.dumps(turns("t0")).encode()
        # The function's own numbers know of the requests alone.
        requests = (
            'detoserve_router_requests_total{function="sim",operation="chat",outcome="ok",'
            'status="200",tenant=""}'
        )
        assert await it.metric(requests) == 50
        it.router.assert_idle()


async def idle(it: Fleet) -> bool:
    return it.router.router.state.in_flight.by_replica == {}


async def test_a_shadow_that_hangs_or_is_dead_costs_clients_nothing(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def hang(_: Received, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        await http()(_, writer)

    all_copied = {"a": {}, "b": {"shadow_percent": 100.0}}
    async with fleet(tmp_path, "ab", arms=all_copied, settings={"shadow_requests": 2}) as it:
        it.engines["b"].answer = hang
        for i in range(5):
            assert await it.where(turns(f"q{i}")) == "a"
        base = 'detoserve_router_shadow_requests_total{deployment="arm-b",function="sim",outcome='
        assert await it.metric(base + '"skipped"}') == 3
        release.set()
        await eventually(lambda: idle(it))
        assert await it.metric(base + '"ok"}') == 2
        it.engines["b"].url = "http://127.0.0.1:1"
        it.router.install(it.table(2, "ab", arms=all_copied))
        assert await it.where(turns("q")) == "a"
        await eventually(lambda: it.metric(base + '"failed"}'))
        assert it.router.router.state.breakers == {}


async def test_a_router_that_ends_takes_its_copies_along(tmp_path: Path) -> None:
    async def hang(_: Received, __: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with fleet(tmp_path, "ab", arms={"a": {}, "b": {"shadow_percent": 100.0}}) as it:
        it.engines["b"].answer = hang
        assert await it.where(turns("q")) == "a"
        await eventually(lambda: it.engines["b"].received)
        engine = it.engines["b"]
        await it.router.router.__aexit__(None, None, None)
        async with asyncio.timeout(5):
            await engine.gone.wait()


async def test_whoever_may_debug_chooses_the_replica(tmp_path: Path) -> None:
    arms = {"a": {}, "b": {}, "c": {"shadow_percent": 1.0}}
    async with fleet(tmp_path, arms=arms) as it:
        for name in "abcab":
            header = f"x-detoserve-replica: {name}\r\n"
            status, replica, _ = await it.ask(turns("q"), header, DEBUG_KEY.text)
            assert (status, replica) == (200, name)
            assert b"x-detoserve-replica" not in it.engines[name].received[-1].headers
        status, _, _ = await it.ask(turns("q"), "x-detoserve-replica: a\r\n")
        assert status == 403
        status, _, _ = await it.ask(turns("q"), "x-detoserve-replica: z\r\n", DEBUG_KEY.text)
        assert status == 404


async def test_a_chosen_replica_that_fails_is_not_replaced(tmp_path: Path) -> None:
    async with fleet(tmp_path, "ab", arms={"a": {}, "b": {}}) as it:
        it.engines["a"].answer = http(status="503 Service Unavailable")
        for _ in range(3):  # kept out after failures, it is asked all the same
            header = "x-detoserve-replica: a\r\n"
            status, replica, _ = await it.ask(turns("q"), header, DEBUG_KEY.text)
            assert (status, replica) == (503, "a")
        assert it.engines["b"].received == []
