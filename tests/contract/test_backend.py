"""What every backend promises, run over each of them."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from aiohttp import web

from reconciler.backends.base import Backend
from reconciler.backends.external import ExternalBackend
from reconciler.backends.local import LocalBackend
from reconciler.backends.skypilot import ApiSettings, SkyPilotBackend
from reconciler.backends.skypilot.backend import Pace
from reconciler.core.action import Create, Delete, Update
from reconciler.core.observed import Observation, ObservedWorkload, Phase, Unknown
from reconciler.core.skypilot.render import service_task
from reconciler.core.workload import Workload
from reconciler.errors import NotOurs, Transient, Waiting
from tests.engines import external_workload, local_workload, sky_workload
from tests.fake_backend import FakeBackend
from tests.sky_api_server import FakeService, SkyApiServer
from tests.support import eventually


class World(Protocol):
    """One implementation with what the suite needs around it."""

    backend: Backend

    async def open(self) -> None: ...
    async def reopen(self) -> None: ...
    def workload(self, *, replicas: int = 1, spec: str = "one") -> Workload: ...
    def make_foreign(self, workload: Workload) -> None: ...
    def break_it(self) -> None: ...
    def move(self) -> None: ...
    async def end(self) -> None: ...


class LocalWorld:
    def __init__(self, path: Path) -> None:
        self.path, self.owner = path, f"test-{uuid.uuid4().hex}"

    async def open(self) -> None:
        self.backend = LocalBackend(self.path / "state", self.owner, notify=lambda: None)
        await self.backend.start()

    async def reopen(self) -> None:
        await self.backend.close()
        await self.open()

    def workload(self, *, replicas: int = 1, spec: str = "one") -> Workload:
        return local_workload(self.path / "engine.py", spec, replicas=replicas)

    def make_foreign(self, workload: Workload) -> None:
        folder = self.path / "state" / "workloads" / workload.name
        record = (folder / "workload.json").read_text()
        (folder / "workload.json").write_text(record.replace(self.owner, "somebody-else"))

    def break_it(self) -> None:
        shutil.move(self.path / "state" / "workloads", self.path / "state" / "moved-away")

    def move(self) -> None:
        pass

    async def end(self) -> None:
        await self.backend.stop_all(grace_s=1)


class ExternalWorld:
    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._urls: list[str] = []

    async def open(self) -> None:
        async def healthy(_: web.Request) -> web.Response:
            return web.Response(text="ok")

        app = web.Application()
        app.router.add_get("/health", healthy)
        runner = web.AppRunner(app)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        for _ in range(3):
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
        self._urls = [f"http://127.0.0.1:{address[1]}" for address in runner.addresses]
        self.backend = ExternalBackend(notify=lambda: None)

    def workload(self, *, replicas: int = 1, spec: str = "one") -> Workload:
        return external_workload(self._urls[:replicas], replicas=replicas, spec=spec)

    def move(self) -> None:
        pass

    async def end(self) -> None:
        await self.backend.close()
        await self._stack.aclose()


class FakeWorld:
    async def open(self) -> None:
        self.backend = FakeBackend()

    async def reopen(self) -> None:
        pass

    def workload(self, *, replicas: int = 1, spec: str = "one") -> Workload:
        return local_workload(Path("/dev/null"), spec, replicas=replicas)

    def make_foreign(self, workload: Workload) -> None:
        self.backend.foreign.add(workload.name)

    def break_it(self) -> None:
        self.backend.broken = "it is on fire"

    def move(self) -> None:
        self.backend.step()

    async def end(self) -> None:
        await self.backend.close()


class SkyPilotWorld:
    """Against SkyPilot's REST API with state, in memory; the real one is in the lab."""

    def __init__(self, path: Path) -> None:
        self.path, self.server = path, SkyApiServer()
        self._stack = AsyncExitStack()

    async def open(self) -> None:
        if not self.server.url:
            await self._stack.enter_async_context(self.server.running())
        pace = Pace(idle_s=0.02, moving_s=0.02, least_s=0.01, first_look_s=30)
        self.backend = SkyPilotBackend(
            ApiSettings(self.server.url), self.path, "test", notify=lambda: None, pace=pace
        )
        await self.backend.start()

    async def reopen(self) -> None:
        await self.backend.close()
        await self.open()

    def workload(self, *, replicas: int = 1, spec: str = "one") -> Workload:
        return sky_workload(replicas=replicas, spec=spec)

    def make_foreign(self, workload: Workload) -> None:
        # Another one's, made at the same time or before.
        task = service_task(workload, "somebody-else")
        self.server.services[workload.name] = FakeService(workload.name, {1: task})

    def break_it(self) -> None:
        self.server.down = True

    def move(self) -> None:
        self.server.step()

    async def end(self) -> None:
        await self.backend.close()
        await self._stack.aclose()


@pytest.fixture(params=["local", "external", "fake", "skypilot"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    made: Any = {
        "local": lambda: LocalWorld(tmp_path),
        "external": ExternalWorld,
        "fake": FakeWorld,
        "skypilot": lambda: SkyPilotWorld(tmp_path),
    }[request.param]()
    await made.open()
    yield made
    await made.end()


async def seen(world: World, name: str) -> ObservedWorkload | None:
    observation = await world.backend.observe()
    assert isinstance(observation, Observation)
    return observation.workloads.get(name)


async def until_ready(world: World, workload: Workload) -> ObservedWorkload:
    """All wanted replicas ready, none else."""

    async def ready() -> ObservedWorkload | None:
        world.move()
        now = await seen(world, workload.name)
        assert now is not None
        await world.backend.release([r.id for r in now.replicas if r.phase is Phase.DRAINING])
        fits = now.count(Phase.READY) == len(now.replicas) == workload.replicas
        return (
            now
            if fits and {r.spec_digest for r in now.replicas} <= {workload.spec_digest}
            else None
        )

    found = await eventually(ready, what="ready")
    assert found is not None
    return found


async def test_nothing_exists_before_something_is_created(world: World) -> None:
    observation = await world.backend.observe()
    assert isinstance(observation, Observation)
    assert observation.workloads == {}
    assert observation.foreign == frozenset()


async def test_create_is_seen_at_once_and_becomes_ready(world: World) -> None:
    workload = world.workload(replicas=2)
    await world.backend.apply(Create(workload, "new"))
    now = await seen(world, workload.name)
    assert now is not None
    assert (now.spec_digest, now.replicas_wanted) == (workload.spec_digest, 2)
    assert now.deployment == workload.deployment
    assert now.template["runtime"]["engine"] == "custom"
    ready = await until_ready(world, workload)
    assert len({r.id for r in ready.replicas}) == 2
    assert all(r.url for r in ready.replicas)


async def test_the_same_action_twice_equals_once(world: World) -> None:
    workload = world.workload(replicas=2)
    for _ in range(3):
        await world.backend.apply(Create(workload, "new"))
    first = await until_ready(world, workload)
    await world.backend.apply(Create(workload, "again"))
    await world.backend.apply(Update(workload, "scale", "again"))
    assert await until_ready(world, workload) == first


async def test_applying_at_once_from_two_sides_equals_once(world: World) -> None:
    workload = world.workload(replicas=2)
    await asyncio.gather(*(world.backend.apply(Create(workload, "new")) for _ in range(5)))
    assert len((await until_ready(world, workload)).replicas) == 2


async def test_scaling_keeps_the_ids_of_those_that_stay(world: World) -> None:
    two, three = world.workload(replicas=2), world.workload(replicas=3)
    await world.backend.apply(Create(two, "new"))
    before = {r.id for r in (await until_ready(world, two)).replicas}
    await world.backend.apply(Update(three, "scale", "more"))
    more = {r.id for r in (await until_ready(world, three)).replicas}
    assert before < more
    await world.backend.apply(Update(two, "scale", "less"))
    assert {r.id for r in (await until_ready(world, two)).replicas} < more


# Not external: what it watches is not its to replace.
@pytest.mark.parametrize("world", ["local", "fake", "skypilot"], indirect=True)
async def test_a_roll_ends_with_new_replicas_under_new_ids(world: World) -> None:
    old, new = world.workload(spec="one"), world.workload(spec="two")
    await world.backend.apply(Create(old, "new"))
    before = {r.id for r in (await until_ready(world, old)).replicas}
    await world.backend.apply(Update(new, "roll", "changed"))
    now = await seen(world, new.name)
    assert now is not None
    assert now.spec_digest == new.spec_digest
    assert now.count(Phase.READY) == 1, "the old one serves on until the new one is ready"
    assert not before & {r.id for r in (await until_ready(world, new)).replicas}


async def test_no_replicas_wanted_is_no_absence(world: World) -> None:
    one = world.workload()
    await world.backend.apply(Create(one, "new"))
    await until_ready(world, one)
    none = replace(one, replicas=0)
    await world.backend.apply(Update(none, "scale", "suspended"))
    now = await until_ready(world, none)
    assert now.replicas == ()
    assert not now.deleting


async def test_a_draining_replica_stays_until_it_is_released(world: World) -> None:
    workload = world.workload()
    await world.backend.apply(Create(workload, "new"))
    await until_ready(world, workload)
    await world.backend.apply(Delete(workload.name, workload.deployment, "local", "gone"))
    now = await seen(world, workload.name)
    assert now is not None
    assert now.deleting
    assert [r.phase for r in now.replicas] == [Phase.DRAINING]
    assert now.replicas[0].url, "routers must still know where their streams are"
    await world.backend.release(["somebody-else", "nobody"])
    assert (await seen(world, workload.name)) == now

    await world.backend.release([now.replicas[0].id])

    async def gone() -> bool:
        world.move()
        return await seen(world, workload.name) is None

    await eventually(gone)


async def test_releasing_a_replica_that_serves_does_nothing(world: World) -> None:
    workload = world.workload()
    await world.backend.apply(Create(workload, "new"))
    ready = await until_ready(world, workload)
    await world.backend.release([r.id for r in ready.replicas])
    assert await until_ready(world, workload) == ready


async def test_delete_twice_and_delete_of_nothing_are_done_already(world: World) -> None:
    workload = world.workload()
    await world.backend.apply(Create(workload, "new"))
    await until_ready(world, workload)
    delete = Delete(workload.name, workload.deployment, "local", "gone")
    await world.backend.apply(delete)
    await world.backend.apply(delete)
    await world.backend.apply(Delete("never-was", "never", "local", "gone"))


async def test_a_name_that_is_being_deleted_must_wait(world: World) -> None:
    workload = world.workload()
    await world.backend.apply(Create(workload, "new"))
    ready = await until_ready(world, workload)
    await world.backend.apply(Delete(workload.name, workload.deployment, "local", "gone"))
    with pytest.raises(Waiting) as caught:
        await world.backend.apply(Create(workload, "again"))
    assert caught.value.retry_after_s > 0

    await world.backend.release([r.id for r in ready.replicas])

    async def created() -> bool:
        world.move()
        try:
            await world.backend.apply(Create(workload, "again"))
        except Waiting:
            return False
        return True

    await eventually(created)
    await until_ready(world, workload)


# Not external: it is told again after a restart.
@pytest.mark.parametrize("world", ["local", "fake", "skypilot"], indirect=True)
async def test_what_runs_is_found_again_unchanged(world: World) -> None:
    workload = world.workload(replicas=2)
    await world.backend.apply(Create(workload, "new"))
    before = await until_ready(world, workload)
    await world.reopen()
    assert await seen(world, workload.name) == before


# Not external: nothing of it can be another's.
@pytest.mark.parametrize("world", ["local", "fake", "skypilot"], indirect=True)
async def test_a_foreign_name_is_shown_and_refused(world: World) -> None:
    workload = world.workload(replicas=0)
    await world.backend.apply(Create(workload, "new"))
    world.make_foreign(workload)
    await world.reopen()
    observation = await world.backend.observe()
    assert isinstance(observation, Observation)
    assert observation.foreign == {workload.name}
    for action in (
        Create(workload, "mine"),
        Delete(workload.name, workload.deployment, "local", "not mine"),
    ):
        with pytest.raises(NotOurs):
            await world.backend.apply(action)


# Not external: it holds everything in memory.
@pytest.mark.parametrize("world", ["local", "fake", "skypilot"], indirect=True)
async def test_what_cannot_be_asked_is_unknown_and_takes_nothing_on(world: World) -> None:
    workload = world.workload()
    await world.backend.apply(Create(workload, "new"))
    await until_ready(world, workload)
    world.break_it()

    async def unknown() -> Unknown | None:
        answer = await world.backend.observe()
        return answer if isinstance(answer, Unknown) else None

    answer = await eventually(unknown)
    assert answer is not None
    assert answer.reason
    with pytest.raises(Transient):
        await world.backend.apply(Create(replace(world.workload(), name="other--here"), "new"))
