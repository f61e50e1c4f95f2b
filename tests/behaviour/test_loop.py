"""The loop with real Git and Valkey: every way an edge can fail, and what must be true after it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from reconciler.core.observed import Phase
from reconciler.errors import NotOurs, Stalled, Transient
from reconciler.publish.status_yaml import parse_document
from tests.behaviour.loop_fixtures import FIRST, Bench, running_bench, running_loop
from tests.config_text import cluster, deployment, function, tenant
from tests.support import eventually


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with running_bench(tmp_path) as made:
        made.repo.commit(FIRST)
        yield made


def conditions(document: str) -> dict[str, dict[str, str]]:
    parsed: Any = parse_document(document.encode())
    return {c["type"]: c for c in parsed["status"]["conditions"]}


# --- config


async def test_a_commit_becomes_replicas_routes_and_status(bench: Bench) -> None:
    await bench.settle()
    assert await bench.running() == {"chat--local": 1}
    assert len((await bench.routed())["chat"]) == 1
    status = await bench.write_status()
    assert conditions(status["status/deployment/chat.yaml"])["Ready"]["status"] == "True"
    assert bench.repo.head in status["status/summary.yaml"]


async def test_what_does_not_load_keeps_its_last_good_and_the_rest_goes_on(bench: Bench) -> None:
    await bench.settle()
    bench.repo.commit(
        {
            "deployments/chat.yaml": "kind: Deployment\n  broken: [",
            "deployments/more.yaml": deployment("more"),
        }
    )
    await bench.settle()
    assert await bench.running() == {"chat--local": 1, "more--local": 1}
    status = await bench.write_status()
    stalled = conditions(status["status/deployment/chat.yaml"])["Stalled"]
    assert "deployments/chat.yaml" in stalled["message"]
    assert conditions(status["status/deployment/chat.yaml"])["Ready"]["status"] == "True"
    assert "deployments/chat.yaml:2" in status["status/summary.yaml"]
    # The same for a reconciler that has forgotten everything but its state, and one without.
    bench.start()
    await bench.settle()
    assert await bench.running() == {"chat--local": 1, "more--local": 1}
    bench.state_file.path.unlink()
    bench.start()
    await bench.settle()
    assert await bench.running() == {"chat--local": 1, "more--local": 1}


async def test_a_commit_of_something_else_moves_the_revision_and_nothing_more(
    bench: Bench,
) -> None:
    await bench.settle()
    before = await bench.write_status()
    generation, applied = (await bench.table()).generation, len(bench.backend.applied)
    head = bench.repo.commit({"README.md": "Hello"})
    await bench.settle()
    assert (await bench.table()).generation == generation
    assert len(bench.backend.applied) == applied
    after = await bench.write_status()
    assert [path for path in after if after[path] != before[path]] == ["status/summary.yaml"]
    assert head in after["status/summary.yaml"]
    commits = bench.status_commits()
    await bench.settle()
    await bench.write_status()
    assert bench.status_commits() == commits


async def test_its_own_status_commits_wake_nothing(bench: Bench) -> None:
    await bench.settle()
    revision = bench.world.effective.revision
    told = len(bench.worlds)
    await bench.write_status()
    assert bench.status_commits() == 1
    await bench.settle()
    assert bench.world.effective.revision == revision == bench.repo.head
    assert all(world == bench.worlds[told - 1] for world in bench.worlds[told:])
    await bench.write_status()
    assert bench.status_commits() == 1


async def test_a_repo_that_is_gone_changes_nothing_and_is_said(bench: Bench) -> None:
    await bench.settle()
    away = bench.repo.path.rename(bench.folder / "away")
    await bench.passes()
    assert await bench.running() == {"chat--local": 1}
    assert "repo" in bench.world.source_problem
    assert bench.source_problems == [bench.world.source_problem]
    away.rename(bench.repo.path)
    bench.repo.commit({"more.yaml": deployment("more")})
    await bench.settle()
    assert bench.world.source_problem == ""
    assert await bench.running() == {"chat--local": 1, "more--local": 1}


async def test_an_unread_repo_is_read_again_by_itself(bench: Bench) -> None:
    away = bench.repo.path.rename(bench.folder / "away")
    async with running_loop(bench):
        await eventually(lambda: bench.source_problems)
        away.rename(bench.repo.path)
        bench.clock.now += 2.0
        await eventually(bench.running)


async def test_history_rewritten_deletes_nothing_and_says_how_to_accept_it(bench: Bench) -> None:
    await bench.settle()
    old = bench.repo.head
    bench.repo.git("checkout", "--quiet", "--orphan", "fresh")
    bench.repo.commit({"deployments/chat.yaml": None, "more.yaml": deployment("more")})
    bench.repo.git("branch", "-M", "fresh", "main")
    await bench.settle()
    assert await bench.running() == {"chat--local": 1, "more--local": 1}
    assert old in bench.world.source_problem
    status = await bench.write_status()
    assert f"Detoserve-Accept-History: {old}" in status["status/summary.yaml"].replace("\n", " ")
    bench.repo.commit(message=f"Go on\n\nDetoserve-Accept-History: {old}")
    await bench.settle()
    assert bench.world.source_problem == ""
    assert await bench.running() == {"more--local": 1}


async def test_a_remote_that_hangs_delays_no_route(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.settle()
    release = threading.Event()
    read = bench.config._read
    monkeypatch.setattr("reconciler.loop.reconciler.FETCH_PATIENCE_S", 0.05)
    monkeypatch.setattr(bench.config, "_read", lambda last: (release.wait(20), read(last))[1])
    async with running_loop(bench):
        bench.repo.commit({"more.yaml": deployment("more")})
        bench.loop.wake(fetch=True)
        (replica,) = (await bench.seen())["chat--local"].replicas
        bench.backend.set_phase(replica.id, Phase.FAILED, "died")
        bench.loop.wake()

        async def rerouted() -> bool:
            states = [r.state for f in (await bench.table()).functions for r in f.arms[0].replicas]
            return "ready" not in states

        await eventually(rerouted)
        assert not release.is_set()
        release.set()
        await eventually(lambda: "more--local" in bench.world.desired.workloads)


# --- backends


async def test_a_backend_that_cannot_be_asked_holds_everything(bench: Bench) -> None:
    await bench.settle()
    routed = await bench.routed()
    bench.backend.broken = "no answer"
    bench.repo.commit(
        {"deployments/chat.yaml": None, "more.yaml": deployment("more")}, "Swap chat for more"
    )
    await bench.passes()
    assert len(bench.backend.applied) == 1
    assert (await bench.routed())["chat"] == routed["chat"]
    status = await bench.write_status()
    ready = conditions(status["status/deployment/more.yaml"])["Ready"]
    assert ready["status"] == "Unknown"
    assert "no answer" in ready["message"]
    bench.backend.broken = ""
    await bench.settle()
    assert await bench.running() == {"more--local": 1}


async def test_a_backend_with_a_defect_is_unknown_and_the_pass_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.settle()

    async def observe() -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(bench.backend, "observe", observe)
    bench.repo.commit({"acme.yaml": tenant("acme", models="chat")})
    await bench.passes()
    assert len((await bench.routed())["chat"]) == 1
    assert (await bench.table()).tenants[0].models == ("chat",), "published all the same"


@pytest.mark.parametrize("error", [Transient("busy"), Stalled("no such command"), KeyError("bug")])
async def test_a_poisoned_object_backs_off_alone(bench: Bench, error: Exception) -> None:
    bench.backend.failures["chat--local"] = error  # type: ignore[assignment]
    bench.repo.commit({"more.yaml": deployment("more"), "third.yaml": deployment("third")})
    await bench.passes(5)
    assert await bench.running() == {"more--local": 1, "third--local": 1}
    assert bench.loop.effects.failures["chat--local"].count == 1, "not tried in every pass"
    status = await bench.write_status()
    assert "Stalled" in conditions(status["status/deployment/chat.yaml"])
    tried = []
    for _ in range(3):
        failure = bench.loop.effects.failures["chat--local"]
        tried.append(failure.until - bench.clock.now)
        bench.clock.now = failure.until + 0.01
        await bench.passes(1)
    assert tried == sorted(tried)
    assert tried[0] < tried[-1] <= 600.0
    del bench.backend.failures["chat--local"]
    # An edit is tried at once, however long the pause was.
    bench.repo.commit({"chat.yaml": function("chat", more="  scaling: {minReplicas: 2}\n")})
    await bench.settle()
    assert (await bench.running())["chat--local"] == 2
    assert not bench.loop.effects.failures


async def test_a_failure_that_no_longer_matters_is_forgotten_and_costs_nothing(
    bench: Bench,
) -> None:
    await bench.settle()
    bench.backend.failures["chat--local"] = NotOurs("not ours")
    bench.repo.commit({"deployments/chat.yaml": None})
    await bench.passes()
    assert "chat--local" in bench.loop.effects.failures
    bench.backend._told.clear()  # gone by itself
    bench.clock.now += 3600
    await bench.passes(1)
    assert not bench.loop.effects.failures
    assert bench.loop._pause_s() > 10


async def test_what_waits_for_an_unknown_backend_does_not_spin(bench: Bench) -> None:
    bench.backend.failures["chat--local"] = Transient("busy")
    await bench.passes(1)
    bench.backend.broken = "no answer"
    bench.clock.now += 3600
    await bench.passes(1)
    assert bench.loop._pause_s() > 10


# --- routes


async def test_nothing_is_applied_before_it_can_be_published(bench: Bench) -> None:
    await bench.settle()
    applied = len(bench.backend.applied)
    assert bench.valkey.pid is not None
    os.kill(bench.valkey.pid, signal.SIGSTOP)
    try:
        bench.repo.commit({"more.yaml": deployment("more"), "deployments/chat.yaml": None})
        bench.loop.wake(fetch=True)
        await bench.loop.one_pass()
        assert len(bench.backend.applied) == applied
        assert bench.loop._pause_s() <= 1.0, "tried again soon, not at the next resync"
    finally:
        os.kill(bench.valkey.pid, signal.SIGCONT)
    await bench.settle()
    assert await bench.running() == {"more--local": 1}
    assert set(await bench.routed()) == {"more"}


async def test_a_disk_that_takes_no_table_is_said_in_status(bench: Bench) -> None:
    await bench.settle()
    await bench.write_status()
    applied = len(bench.backend.applied)
    table = bench.folder / "state" / "routes.table"
    content = table.read_bytes()
    table.unlink()
    table.mkdir()
    bench.repo.commit({"more.yaml": deployment("more")})
    await bench.passes()
    assert len(bench.backend.applied) == applied
    assert "routes.table" in (await bench.write_status())["status/summary.yaml"]
    table.rmdir()
    table.write_bytes(content)
    await bench.settle()
    assert await bench.running() == {"chat--local": 1, "more--local": 1}
    assert "routes.table" not in (await bench.write_status())["status/summary.yaml"]


async def test_routes_are_published_only_when_they_may_differ(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.settle()
    published = []
    publish = bench.routes.publish

    async def counted(*args: Any, **kwargs: Any) -> int:
        published.append(await publish(*args, **kwargs))
        return published[-1]

    monkeypatch.setattr(bench.routes, "publish", counted)
    await bench.passes(3)
    assert not published
    (replica,) = (await bench.seen())["chat--local"].replicas
    bench.backend.set_phase(replica.id, Phase.NOT_READY, "sick")
    await bench.passes(3)
    assert len(published) == 1
    bench.repo.commit({"acme.yaml": tenant("acme", models="chat")})
    await bench.passes(3)
    assert len(published) == 2


async def test_a_draining_replica_is_released_when_every_router_is_through_with_it(
    bench: Bench,
) -> None:
    await bench.settle()
    (replica,) = (await bench.seen())["chat--local"].replicas
    old = (await bench.table()).generation
    bench.routers.serve(old)
    bench.repo.commit({"deployments/chat.yaml": None})

    async def draining() -> bool:
        seen = (await bench.seen()).get("chat--local")
        return seen is not None and [r.phase for r in seen.replicas] == [Phase.DRAINING]

    await bench.passes(4)
    new = (await bench.table()).generation
    assert new > old
    assert await draining(), "a router still serves the table before"
    bench.routers.serve(new, **{replica.id: 1})
    await bench.passes(2)
    assert await draining(), "a request is still on it"
    bench.routers.beats = None
    await bench.passes(2)
    assert await draining(), "nobody knows what routers do"
    bench.routers.serve(new)
    await bench.passes(2)
    assert await bench.seen() == {}


# --- leading


async def test_who_does_not_lead_writes_nothing(bench: Bench) -> None:
    bench.leadership.held = None
    await bench.passes()
    bench.status.offer(bench.world)
    assert await bench.status.write() is None
    assert bench.backend.applied == []
    assert await bench.routes.current() is None
    assert bench.repo.git("branch", "--list", "detoserve/status") == ""


async def test_who_leads_again_puts_its_own_table_and_status_back(bench: Bench) -> None:
    await bench.settle()
    await bench.write_status()
    mine = await bench.routed()
    bench.leadership.held = None
    table = await bench.table()
    other = type(bench.routes)(bench.redis, bench.key, bench.folder / "other.table")
    theirs = type(table)(
        generation=0, revision="theirs", published_at=0.0, functions=(), tenants=(), clusters=()
    )
    lease = type(bench.leadership)(generation=2).held
    assert lease is not None
    await other.publish(theirs, lease=lease)
    await bench.branch.write({}, revision="0" * 40, plan_digest="x", lease=lease)
    assert await bench.routed() == {}
    bench.leadership.lead(3)
    await bench.settle()
    assert await bench.routed() == mine
    assert "status/deployment/chat.yaml" in await bench.write_status()


async def test_status_that_nobody_could_write_is_written_later(bench: Bench) -> None:
    await bench.settle()
    await bench.write_status()
    stop = asyncio.Event()
    task = asyncio.create_task(bench.status.run(stop))
    bench.leadership.held = None
    bench.repo.commit({"more.yaml": deployment("more")})
    await bench.passes()
    bench.status.offer(bench.world)
    bench.leadership.lead(2)

    async def told() -> bool:
        return "status/deployment/more.yaml" in await bench.branch.read()

    await eventually(told)
    stop.set()
    await task


async def test_live_after_a_restart_means_what_routers_serve_now(bench: Bench) -> None:
    await bench.settle()
    generation = (await bench.table()).generation
    bench.start()
    bench.routers.serve(generation - 1)
    await bench.passes(1)
    assert bench.world.routing.behind("chat") == ["r"]
    bench.routers.serve(generation)
    await bench.passes(1)
    assert bench.world.routing.behind("chat") == []


# --- what survives


def damaged(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def from_the_future(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))


def with_kinds_unknown_here(path: Path) -> None:
    state = json.loads(path.read_text())
    for item in state["objects"]:
        item["kind"] = "Galaxy"
    path.write_text(json.dumps(state))


def with_fields_unknown_here(path: Path) -> None:
    state = json.loads(path.read_text())
    for item in state["objects"]:
        item["value"]["spec"]["color"] = "blue"
    path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        damaged(""),
        damaged("not JSON"),
        damaged('{"version": 1}'),
        damaged("[1]"),
        from_the_future,
        with_kinds_unknown_here,
        with_fields_unknown_here,
    ],
)
async def test_a_state_file_that_is_lost_costs_only_caution(
    bench: Bench, damage: Callable[[Path], object]
) -> None:
    bench.repo.commit({"more.yaml": deployment("more")})
    await bench.settle()
    applied = len(bench.backend.applied)
    damage(bench.state_file.path)
    bench.start()
    await bench.settle()
    assert len(bench.backend.applied) == applied
    assert await bench.running() == {"chat--local": 1, "more--local": 1}
    assert bench.loop.platform().prune.max_deletions == 3
    bench.start()
    assert bench.loop.memory.objects is not None, "written anew"


async def test_without_its_state_it_deletes_nothing_that_it_never_saw(bench: Bench) -> None:
    bench.repo.commit({"more.yaml": deployment("more")})
    await bench.settle()
    bench.repo.commit({"more.yaml": None})
    bench.state_file.path.unlink()
    bench.start()
    await bench.settle()
    assert await bench.running() == {"chat--local": 1, "more--local": 1}
    assert any("more--local" in refusal for refusal in bench.world.plan.refusals)


# --- crashes


class Crash(BaseException):
    """As if the process had been killed at this very call."""


EDGES: dict[str, tuple[str, str]] = {
    "fetch": ("config", "read"),
    "observe": ("backend", "observe"),
    "publish": ("routes", "publish"),
    "apply": ("backend", "apply"),
    "release": ("backend", "release"),
    "save": ("state_file", "save"),
}


@pytest.mark.parametrize("after", [False, True], ids=["before it", "after it"])
@pytest.mark.parametrize("edge", EDGES)
async def test_a_crash_at_any_edge_leads_to_the_same_fixpoint(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, edge: str, *, after: bool
) -> None:
    commits: list[dict[str, str | None]] = [
        {"more.yaml": deployment("more"), "third.yaml": deployment("third")},
        {"chat.yaml": function("chat", more="  scaling: {minReplicas: 3}\n")},
        {"chat.yaml": function("chat", model='format: "safetensors"')},
        {"third.yaml": None},
    ]
    expected = [
        {"chat--local": 1, "more--local": 1, "third--local": 1},
        {"chat--local": 3, "more--local": 3, "third--local": 3},
        {"chat--local": 1, "more--local": 1, "third--local": 1},
        {"chat--local": 1, "more--local": 1},
    ]
    await bench.settle()
    holder, method = EDGES[edge]
    for files, wanted in zip(commits, expected, strict=True):
        bench.repo.commit(files)
        for crash_at in range(1, 4):
            await crashing_pass(bench, monkeypatch, holder, method, crash_at, after=after)
            bench.start()
            bench.routers.serve(bench.loop.memory.generation)
        await bench.settle()
        assert await bench.running() == wanted
        routed = await bench.routed()
        assert {f"{name}--local": len(ids) for name, ids in routed.items()} == wanted
        live = {r.id for w in (await bench.seen()).values() for r in w.replicas}
        assert {i for ids in routed.values() for i in ids} == live
        assert len(live) == sum(wanted.values()), "each exactly once"


async def test_what_was_created_before_a_crash_is_deleted_by_the_commit_after_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.settle()
    bench.repo.commit({"more.yaml": deployment("more")})
    await crashing_pass(bench, monkeypatch, "backend", "apply", 1, after=True)
    assert (await bench.running()).keys() == {"chat--local", "more--local"}
    bench.repo.commit({"more.yaml": None})
    bench.start()
    await bench.settle()
    assert await bench.running() == {"chat--local": 1}


async def crashing_pass(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    holder: str,
    method: str,
    crash_at: int,
    *,
    after: bool,
) -> None:
    """Passes, the n-th call of one edge ending in a crash; or three passes where it is not reached."""
    target = getattr(bench, holder)
    original = getattr(target, method)
    calls = 0

    def crashing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != crash_at:
            return original(*args, **kwargs)
        if not after:
            raise Crash
        made = original(*args, **kwargs)
        if not asyncio.iscoroutine(made):
            raise Crash

        async def then_crash() -> None:
            await made
            raise Crash

        return then_crash()

    with monkeypatch.context() as patch:
        # The state file is a slotted record: its class is patched instead.
        if holder == "state_file":
            kind = type(target)
            saved = kind.save
            original = lambda state: saved(target, state)  # noqa: E731
            patch.setattr(kind, "save", lambda _, state: crashing(state))
        else:
            patch.setattr(target, method, crashing)
        with suppress(Crash):
            await bench.passes(3)


async def test_a_cluster_and_its_deployment_move_without_a_gap(bench: Bench) -> None:
    await bench.settle()
    bench.repo.commit(
        {
            "second.yaml": cluster("second"),
            "deployments/chat.yaml": deployment("chat", placement="cluster: second"),
        }
    )
    for _ in range(6):
        await bench.passes(1)
        bench.routers.serve(bench.loop.memory.generation)
        assert any(
            r.state == "ready"
            for f in (await bench.table()).functions
            for arm in f.arms
            for r in arm.replicas
        )
    await bench.settle()
    assert await bench.running() == {"chat--second": 1}
