"""The skypilot backend against SkyPilot's REST API with state: crashes, outages, ownership, repair."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reconciler.backends.skypilot import ApiSettings, SkyPilotBackend, api_settings
from reconciler.backends.skypilot.backend import Pace
from reconciler.backends.skypilot.notes import Flight, Note, NoteDir
from reconciler.core.action import Create, Delete, Update
from reconciler.core.observed import Observation, ObservedWorkload, Phase, Unknown
from reconciler.core.plan import PlanPolicy, plan
from reconciler.core.skypilot.render import service_task
from reconciler.core.workload import Desired, Workload
from reconciler.errors import BackendUnreachable, NotOurs, Stalled, Transient
from tests.engines import sky_workload
from tests.sky_api_server import FakeService, SkyApiServer
from tests.support import eventually

OWNER = "test"
PACE = Pace(idle_s=0.02, moving_s=0.02, least_s=0.01, first_look_s=30, retry_s=0.05)


@dataclass
class Lab:
    path: Path
    server: SkyApiServer
    stack: AsyncExitStack
    lease: list[int | None] = field(default_factory=lambda: [1])
    told: list[int] = field(default_factory=list)
    clock: Callable[[], float] | None = None
    environ: dict[str, str] = field(default_factory=dict)

    async def backend(self, state: str = "state", **settings: Any) -> SkyPilotBackend:
        made = SkyPilotBackend(
            ApiSettings(self.server.url, call_timeout_s=settings.pop("call_timeout_s", 5.0)),
            self.path / state,
            settings.pop("owner", OWNER),
            notify=lambda: self.told.append(1),
            environ=self.environ,
            leading=lambda: self.lease[0],
            pace=settings.pop("pace", PACE),
            **settings,
        )
        await made.start()
        self.stack.push_async_callback(made.close)
        return made


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(SkyApiServer().running())
        yield Lab(tmp_path, server, stack)


async def seen(backend: SkyPilotBackend, name: str = "chat--gpus") -> ObservedWorkload | None:
    observation = await backend.observe()
    assert isinstance(observation, Observation)
    return observation.workloads.get(name)


async def looks(lab: Lab, count: int = 3) -> None:
    """So many status calls later."""
    before = lab.server.count("/serve/status")
    await eventually(lambda: lab.server.count("/serve/status") >= before + count)


async def ready(lab: Lab, backend: SkyPilotBackend, workload: Workload) -> ObservedWorkload:
    async def fits() -> ObservedWorkload | None:
        lab.server.step()
        now = await seen(backend, workload.name)
        assert now is not None
        fine = now.count(Phase.READY) == len(now.replicas) == workload.replicas
        fine = fine and not now.detail
        return (
            now
            if fine and all(r.spec_digest == workload.spec_digest for r in now.replicas)
            else None
        )

    found = await eventually(fits, what="ready")
    assert found is not None
    return found


async def test_a_lost_answer_makes_no_second_service(lab: Lab) -> None:
    lab.server.swallow_answers = True
    lab.server.latency_s = 0.3
    backend, workload = await lab.backend(), sky_workload()
    await backend.apply(Create(workload, "new"))
    await eventually(lambda: lab.server.count("/serve/up") == 1)
    lab.server.swallow_answers = False
    await ready(lab, backend, workload)
    assert lab.server.count("/serve/up") == 1
    assert lab.server.services[workload.name].controllers == 1


@pytest.mark.parametrize("killed", ["before it is sent", "before its id is known", "while it runs"])
async def test_a_reconciler_killed_at_any_step_of_a_create_leaves_one_service(
    lab: Lab, killed: str
) -> None:
    workload = sky_workload()
    flight = Flight("up", workload.deployment, workload.spec_digest, workload.replicas)
    files = NoteDir(lab.path / "state")
    list(files.read())
    lab.server.held.clear()
    if killed != "before it is sent":
        other = await lab.backend("other")
        await other.apply(Create(workload, "new"))
        await eventually(lambda: lab.server.count("/serve/up") == 1)
        await other.close()
    if killed == "while it runs":
        (up,) = [r for r in lab.server.requests.values() if r.name == "sky.serve.up"]
        flight = msgspec.structs.replace(flight, request_id=up.id)
    files.write(workload.name, Note(flight=flight))

    backend = await lab.backend()
    now = await seen(backend)
    assert now is not None, "what may be under way counts as there"
    assert (now.spec_digest, now.replicas_wanted) == (workload.spec_digest, 1)
    await backend.apply(Create(workload, "asked for again"))
    await looks(lab)
    assert lab.server.count("/serve/up") == 1
    lab.server.held.set()
    await ready(lab, backend, workload)
    assert lab.server.services[workload.name].controllers == 1
    assert lab.server.count("/serve/up") == 1


async def test_a_second_reconciler_waits_for_the_up_of_the_first(lab: Lab) -> None:
    """Nothing of the first one's state is known to it, as on another machine."""
    lab.server.held.clear()
    first, second, workload = await lab.backend("a"), await lab.backend("b"), sky_workload()
    await first.apply(Create(workload, "new"))
    await eventually(lambda: lab.server.count("/serve/up") == 1)
    await first.close()
    await second.apply(Create(workload, "new"))
    await looks(lab)
    assert lab.server.count("/serve/up") == 1
    now = await seen(second)
    assert now is not None
    assert "under way" in now.detail
    lab.server.held.set()
    await ready(lab, second, workload)
    assert lab.server.count("/serve/up") == 1


async def test_a_request_under_way_is_resumed_after_a_restart(lab: Lab) -> None:
    first, workload = await lab.backend(), sky_workload()
    lab.server.held.clear()
    await first.apply(Create(workload, "new"))
    await eventually(lambda: lab.server.count("/serve/up") == 1)
    before = await seen(first)
    await first.close()
    second = await lab.backend()
    now = await seen(second)
    assert now == before
    await looks(lab)
    lab.server.held.set()
    await ready(lab, second, workload)
    assert lab.server.count("/serve/up") == 1


async def test_what_an_accepted_action_leads_to_shows_until_it_is_there(lab: Lab) -> None:
    """The loop wakes after it has applied: what did not show would be asked for again at once."""
    backend, workload = await lab.backend(), sky_workload()
    lab.server.held.clear()
    desired = Desired(workloads={workload.name: workload})
    for _ in range(5):
        observed = await backend.observe()
        for action in plan(desired, [observed], PlanPolicy(), 0.0).effects:
            await backend.apply(action)
        await looks(lab, 1)
    assert lab.server.count("/serve/up") == 1


async def test_an_api_that_hangs_is_unknown_and_changes_nothing(lab: Lab) -> None:
    backend, workload = await lab.backend(call_timeout_s=0.2), sky_workload(replicas=2)
    await backend.apply(Create(workload, "new"))
    before = await ready(lab, backend, workload)
    lab.server.hung.clear()

    async def unknown() -> bool:
        return isinstance(await backend.observe(), Unknown)

    await eventually(unknown)
    observed = await backend.observe()
    assert plan(Desired(), [observed], PlanPolicy(known=frozenset({"chat"})), 0.0).empty
    with pytest.raises(Transient):
        await backend.apply(Delete(workload.name, "chat", "skypilot", "gone"))
    lab.server.hung.set()

    async def again() -> bool:
        return not await unknown() and await seen(backend) == before

    await eventually(again)
    assert lab.server.count("/serve/up") == 1
    assert lab.server.count("/serve/down") == 0


async def test_an_api_server_that_restarts_in_the_middle_is_asked_again(lab: Lab) -> None:
    lab.server.refuse["up"] = ("RequestInterruptedError", "interrupted by an API server restart")
    backend, workload = await lab.backend(), sky_workload()
    await backend.apply(Create(workload, "new"))
    await eventually(lambda: lab.server.count("/serve/up") == 1)
    del lab.server.refuse["up"]
    await ready(lab, backend, workload)
    assert lab.server.services[workload.name].controllers == 1


async def test_a_server_that_forgot_a_request_is_asked_again(lab: Lab) -> None:
    lab.server.held.clear()
    backend, workload = await lab.backend(), sky_workload()
    await backend.apply(Create(workload, "new"))
    await eventually(lambda: lab.server.count("/serve/up") == 1)
    await looks(lab)
    lab.server.forget()
    lab.server.held.set()
    await ready(lab, backend, workload)
    assert len(lab.server.services) == 1


async def test_a_foreign_service_of_our_name_is_never_touched(lab: Lab) -> None:
    mine, wanted = sky_workload(), sky_workload(spec="another")
    lab.server.services[mine.name] = FakeService(mine.name, {1: service_task(mine, "somebody")})
    lab.server.services["by-hand"] = FakeService("by-hand", {1: {"service": {"replicas": 1}}})
    backend = await lab.backend()
    observation = await backend.observe()
    assert isinstance(observation, Observation)
    assert observation.workloads == {}
    assert observation.foreign == {mine.name, "by-hand"}
    for action in (
        Create(wanted, ""),
        Update(wanted, "roll", ""),
        Delete(mine.name, "chat", "", ""),
    ):
        with pytest.raises(NotOurs, match="another owner"):
            await backend.apply(action)
    await looks(lab)
    assert {path for path, _ in lab.server.posts} == {"/serve/status"}


async def test_an_orphan_of_ours_is_seen_with_its_deployment(lab: Lab) -> None:
    """What no commit names: the plan reports it, or removes it where the policy says so."""
    old = sky_workload(name="old--gpus")
    lab.server.services[old.name] = FakeService(old.name, {1: service_task(old, OWNER)})
    backend = await lab.backend()
    now = await seen(backend, old.name)
    assert now is not None
    assert (now.deployment, now.spec_digest, now.replicas_wanted) == ("old", "one", 1)
    made = plan(Desired(), [await backend.observe()], PlanPolicy(known=frozenset()), 0.0)
    assert made.empty
    assert "orphans" in made.refusals[0]


async def test_state_lost_here_is_read_back_from_skypilot(lab: Lab) -> None:
    first, workload = await lab.backend("state"), sky_workload(replicas=2)
    await first.apply(Create(workload, "new"))
    before = await ready(lab, first, workload)
    await first.close()
    second = await lab.backend("a-new-machine")
    now = await seen(second)
    assert now is not None
    assert replace(now, template=before.template) == before
    desired = Desired(workloads={workload.name: workload})
    assert plan(desired, [await second.observe()], PlanPolicy(), 0.0).empty


async def test_state_lost_by_skypilot_is_built_again(lab: Lab) -> None:
    """skypilot#8563: `~/.sky` is gone, and every service with it."""
    backend, workload = await lab.backend(), sky_workload()
    await backend.apply(Create(workload, "new"))
    first = await ready(lab, backend, workload)
    lab.server.services.clear()

    async def planned() -> bool:
        made = plan(
            Desired(workloads={workload.name: workload}),
            [await backend.observe()],
            PlanPolicy(),
            0.0,
        )
        return any(isinstance(a, Create) for a in made.effects)

    await eventually(planned)
    await backend.apply(Create(workload, "missing"))
    again = await ready(lab, backend, workload)
    assert not {r.id for r in first.replicas} & {r.id for r in again.replicas}, "ids are new"
    assert lab.server.services[workload.name].controllers == 1


async def test_there_is_an_upsert(lab: Lab) -> None:
    """skypilot#8128, #8129: `up` or `update`, whichever it takes, from what is there."""
    backend = await lab.backend()
    for action in (Update(sky_workload(), "roll", ""), Create(sky_workload(spec="two"), "")):
        await backend.apply(action)
        await ready(lab, backend, action.workload)
    assert [p for p, _ in lab.server.posts if p in ("/serve/up", "/serve/update")] == [
        "/serve/up",
        "/serve/update",
    ]


async def test_a_changed_image_or_argument_always_rolls_and_the_same_spec_never(lab: Lab) -> None:
    """skypilot#4301: an update changed nothing where SkyServe saw no difference."""
    cloud = {"type": "cloud", "cloud": "aws"}
    one = sky_workload(provider=cloud, spec="one", image="org/engine:1")
    two = sky_workload(provider=cloud, spec="two", image="org/engine:2")
    backend = await lab.backend()
    await backend.apply(Create(one, ""))
    before = await ready(lab, backend, one)
    await backend.apply(Update(two, "roll", ""))
    after = await ready(lab, backend, two)
    assert not {r.id for r in before.replicas} & {r.id for r in after.replicas}
    body = lab.server.last("/serve/update")
    assert '"image_id":"docker:org/engine:2"' in body["task"]
    assert body["mode"] == "rolling"
    await backend.apply(Update(two, "roll", "again"))
    await looks(lab)
    assert lab.server.count("/serve/update") == 1


async def test_a_scale_keeps_what_runs_and_a_blue_green_roll_says_so(lab: Lab) -> None:
    backend, one = await lab.backend(), sky_workload()
    await backend.apply(Create(one, ""))
    before = await ready(lab, backend, one)
    three = replace(one, replicas=3)
    await backend.apply(Update(three, "scale", ""))
    after = await ready(lab, backend, three)
    assert {r.id for r in before.replicas} < {r.id for r in after.replicas}
    blue = sky_workload(spec="two", replicas=3, rollout={"strategy": "blueGreen"})
    await backend.apply(Update(blue, "roll", ""))
    await ready(lab, backend, blue)
    modes = [b["mode"] for p, b in lab.server.posts if p == "/serve/update"]
    assert modes == ["rolling", "blue_green"]


async def test_replicas_before_a_roll_keep_their_spec_also_over_a_restart(lab: Lab) -> None:
    backend, one, two = await lab.backend(), sky_workload(), sky_workload(spec="two")
    await backend.apply(Create(one, ""))
    await ready(lab, backend, one)
    await backend.apply(Update(two, "roll", ""))
    await eventually(lambda: lab.server.count("/serve/update") == 1)

    async def rolling() -> ObservedWorkload | None:
        now = await seen(backend)
        assert now is not None
        return now if len(now.replicas) == 2 and not now.detail else None

    now = await eventually(rolling)
    assert now is not None
    assert {r.spec_digest: r.phase for r in now.replicas} == {
        "one": Phase.READY,
        "two": Phase.PENDING,
    }
    await backend.close()
    assert await seen(await lab.backend()) == now


async def test_a_version_that_has_no_task_yet_takes_no_replica_away(lab: Lab) -> None:
    backend, workload = await lab.backend(), sky_workload()
    await backend.apply(Create(workload, ""))
    before = await ready(lab, backend, workload)
    service = lab.server.services[workload.name]
    service.numbered = True
    await looks(lab)
    assert await seen(backend) == before
    await backend.close()

    # Also after a restart; and an update that was cut off there for good is made up for.
    backend = await lab.backend()
    await looks(lab)
    assert await seen(backend) == before
    two = sky_workload(spec="two")
    await backend.apply(Update(two, "roll", ""))
    await eventually(lambda: lab.server.count("/serve/update") == 1)
    service.numbered = False
    await ready(lab, backend, two)


async def test_a_refusal_is_told_retried_and_superseded_at_once(lab: Lab) -> None:
    lab.server.refuse["chat--gpus"] = ("ValueError", "\x1b[31mCluster lab not found\x1b[0m\nin it")
    backend, workload = await lab.backend(), sky_workload()
    await backend.apply(Create(workload, "new"))

    async def stalled() -> str:
        now = await seen(backend)
        assert now is not None
        return now.stalled

    assert "ValueError: Cluster lab not found in it" in await eventually(stalled)
    ups = lab.server.count("/serve/up")
    await looks(lab, 5)
    assert lab.server.count("/serve/up") == ups, "not hammered: it waits for a human"
    lab.server.refuse.clear()
    better = sky_workload(spec="better")
    await backend.apply(Update(better, "roll", "changed"))
    await ready(lab, backend, better)
    assert not await stalled()


async def test_what_skyserve_gave_up_on_is_tried_again_and_ever_more_seldom(lab: Lab) -> None:
    """It stops for good once a replica fails before one was ready, as when a hub was down for an hour."""
    now_s = [0.0]
    backend = await lab.backend(clock=lambda: now_s[0])
    workload = sky_workload()
    await backend.apply(Create(workload, ""))
    await eventually(lambda: lab.server.services)

    async def fail() -> None:
        for replica in lab.server.services[workload.name].replicas:
            replica.status = "FAILED_INITIAL_DELAY"
        await looks(lab)

    async def due() -> bool:
        await looks(lab, 1)
        made = plan(
            Desired(workloads={workload.name: workload}),
            [await backend.observe()],
            PlanPolicy(),
            0.0,
        )
        for action in made.effects:
            await backend.apply(action)
        return bool(made.effects)

    for tries in range(3):
        await fail()
        assert not await due()
        now_s[0] += PACE.again_after_s * 2**tries - 1
        assert not await due()
        now_s[0] += 2
        await eventually(due)
        await eventually(lambda n=tries: lab.server.count("/serve/update") == n + 1)
        await looks(lab)
        assert not await due(), "one try at a time"
    assert lab.server.count("/serve/up") == 1
    await ready(lab, backend, workload)
    assert not await due()


async def test_what_cannot_run_anywhere_is_refused_before_anything_starts(lab: Lab) -> None:
    lab.server.refuse["optimize"] = ("ResourcesUnavailableError", "no H100:16 anywhere")
    backend, workload = await lab.backend(), sky_workload()
    await backend.apply(Create(workload, "new"))

    async def stalled() -> bool:
        now = await seen(backend)
        return now is not None and "no H100:16 anywhere" in now.stalled

    await eventually(stalled)
    assert lab.server.count("/serve/up") == 0


async def test_a_passing_failure_is_tried_again_with_backoff(lab: Lab) -> None:
    lab.server.refuse["up"] = ("RuntimeError", "the controller is busy")
    backend, workload = await lab.backend(), sky_workload()
    await backend.apply(Create(workload, "new"))
    await eventually(lambda: lab.server.count("/serve/up") >= 2)
    now = await seen(backend)
    assert now is not None
    assert not now.stalled
    lab.server.refuse.clear()
    await ready(lab, backend, workload)


@pytest.mark.parametrize("status", ["FAILED_CLEANUP", "CONTROLLER_FAILED"])
async def test_a_broken_service_is_quarantined_and_never_purged(lab: Lab, status: str) -> None:
    backend, workload = await lab.backend(), sky_workload()
    await backend.apply(Create(workload, ""))
    await ready(lab, backend, workload)
    lab.server.services[workload.name].status = status

    async def quarantined() -> ObservedWorkload | None:
        now = await seen(backend)
        return now if now and now.quarantined else None

    now = await eventually(quarantined)
    assert now is not None
    assert f"sky serve down --purge {workload.name}" in now.detail
    desired = Desired(workloads={workload.name: sky_workload(spec="two")})
    for wanted in (desired, Desired()):
        policy = PlanPolicy(known=frozenset({"chat"}))
        assert plan(wanted, [await backend.observe()], policy, 0.0).empty
    await backend.apply(Update(sky_workload(spec="two"), "roll", ""))
    await looks(lab)
    assert lab.server.count("/serve/update") == 0
    assert lab.server.count("/serve/down") == 0


async def test_a_stuck_controller_is_told(lab: Lab) -> None:
    """skypilot#4590: a controller that stays in CONTROLLER_INIT, or answers no more."""
    now_s = [0.0]
    backend = await lab.backend(clock=lambda: now_s[0])
    workload = sky_workload()
    await backend.apply(Create(workload, ""))
    await ready(lab, backend, workload)
    lab.server.services[workload.name].answering = False
    await looks(lab)
    now_s[0] += PACE.stuck_after_s + 1

    async def stuck() -> str:
        now = await seen(backend)
        assert now is not None
        return now.stalled

    assert "sky serve logs --controller chat--gpus" in await eventually(stuck)
    lab.server.services[workload.name].answering = True
    await eventually(lambda: _not(stuck))


async def _not(ask: Callable[[], Any]) -> bool:
    return not await ask()


async def test_a_controller_that_cannot_be_reached_is_unknown(lab: Lab) -> None:
    """skypilot#4590: the controller's pod is lost, and SkyPilot can only say so."""
    backend, workload = await lab.backend(), sky_workload()
    await backend.apply(Create(workload, ""))
    before = await ready(lab, backend, workload)
    lab.server.refuse["status"] = ("ClusterNotUpError", "Failed to connect to serve controller.")

    async def unknown() -> str:
        answer = await backend.observe()
        return answer.reason if isinstance(answer, Unknown) else ""

    assert "Failed to connect to serve controller" in await eventually(unknown)
    del lab.server.refuse["status"]
    await eventually(lambda: _not(unknown))
    assert await seen(backend) == before


async def test_no_live_services_is_believed_unless_a_controller_says_otherwise(lab: Lab) -> None:
    """skypilot#4004: it says so too where it takes a controller that runs for stopped."""
    lab.server.refuse["status"] = ("ClusterNotUpError", "No live services.")
    lab.server.clusters = ["sky-serve-controller-abcd"]
    backend, workload = await lab.backend(), sky_workload()
    assert await seen(backend) is None, "nothing of ours was ever there"
    del lab.server.refuse["status"]
    await backend.apply(Create(workload, ""))
    await ready(lab, backend, workload)
    lab.server.refuse["status"] = ("ClusterNotUpError", "No live services.")

    async def unknown() -> str:
        answer = await backend.observe()
        return answer.reason if isinstance(answer, Unknown) else ""

    assert "sky start" in await eventually(unknown)
    lab.server.clusters = []
    await eventually(lambda: _not(unknown))
    assert await seen(backend) is None, (
        "no controller at all: they are gone, and will be made again"
    )


async def test_a_removal_drains_until_released_or_until_its_time(lab: Lab) -> None:
    backend, workload = await lab.backend(), sky_workload(replicas=2)
    await backend.apply(Create(workload, ""))
    before = await ready(lab, backend, workload)
    await backend.apply(Delete(workload.name, "chat", "skypilot", "gone"))
    await looks(lab)
    await backend.release([before.replicas[0].id])
    await looks(lab)
    assert lab.server.count("/serve/down") == 0, "one may still have requests"
    await backend.release([before.replicas[1].id])
    await eventually(lambda: lab.server.count("/serve/down") == 1)
    assert lab.server.last("/serve/down")["purge"] is False

    async def gone() -> bool:
        lab.server.step()
        return await seen(backend) is None

    await eventually(gone)
    await eventually(lambda: list((lab.path / "state" / "skypilot").iterdir()) == [])


async def test_a_removal_that_nobody_releases_ends_at_the_drain_timeout(lab: Lab) -> None:
    now_s = [0.0]
    backend, workload = await lab.backend(clock=lambda: now_s[0]), sky_workload()
    await backend.apply(Create(workload, ""))
    await ready(lab, backend, workload)
    await backend.apply(Delete(workload.name, "chat", "skypilot", "gone"))
    await looks(lab)
    assert lab.server.count("/serve/down") == 0
    now_s[0] += workload.rollout.drain_timeout + 1
    await eventually(lambda: lab.server.count("/serve/down") == 1)


async def test_without_its_lease_a_reconciler_sends_nothing(lab: Lab) -> None:
    backend, workload = await lab.backend(), sky_workload()
    await seen(backend)
    lab.server.latency_s = 0.1
    await backend.apply(Create(workload, "new"))
    lab.lease[0] = None
    await looks(lab)
    assert lab.server.count("/serve/up") == 0
    with pytest.raises(Transient):
        await backend.apply(Create(workload, "new"))
    lab.lease[0] = 2
    await looks(lab)
    assert lab.server.count("/serve/up") == 0, "what it was told under the old lease is void"
    await backend.apply(Create(workload, "new"))
    await ready(lab, backend, workload)


async def test_secrets_reach_skypilot_and_nothing_else(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    lab.environ["TOKEN_SOURCE"] = "canary-5f2c"
    lab.server.refuse["update"] = ("RuntimeError", "cannot use canary-5f2c in it")
    backend = await lab.backend()
    secret = {"secrets": {"HF_TOKEN": {"fromEnv": "TOKEN_SOURCE"}}}
    one, two = sky_workload(**secret), sky_workload(spec="two", **secret)
    await backend.apply(Create(one, ""))
    now = await ready(lab, backend, one)
    assert "canary-5f2c" in lab.server.last("/serve/up")["task"]
    assert "canary-5f2c" not in lab.server.last("/optimize")["dag"]
    await backend.apply(Update(two, "roll", ""))

    async def refused() -> str:
        found = await seen(backend)
        return found.detail if found and "refused" in found.detail else ""

    detail = await eventually(refused)
    assert "cannot use [secret] in it" in detail
    said = caplog.text + detail + repr(now) + repr(backend.api)
    said += "".join(f.read_text() for f in (lab.path / "state" / "skypilot").glob("*.json"))
    assert "canary-5f2c" not in said


async def test_a_missing_secret_stops_it_before_anything_is_sent(lab: Lab) -> None:
    backend = await lab.backend()
    workload = sky_workload(secrets={"HF_TOKEN": {"fromEnv": "NOT_THERE"}})
    with pytest.raises(Stalled, match="NOT_THERE is not set"):
        await backend.apply(Create(workload, ""))
    assert await seen(backend) is None


async def test_a_service_accounts_token_goes_along_and_a_refused_one_is_told(
    tmp_path: Path,
) -> None:
    server = SkyApiServer()
    server.token = "sky_right"
    async with server.running(), AsyncExitStack() as stack:

        async def observed(token: str) -> Observation | Unknown:
            settings = api_settings(server.url, {"SKYPILOT_SERVICE_ACCOUNT_TOKEN": token})
            assert token not in repr(settings)
            backend = SkyPilotBackend(settings, tmp_path, OWNER, notify=lambda: None, pace=PACE)
            await backend.start()
            stack.push_async_callback(backend.close)
            return await backend.observe()

        assert isinstance(await observed("sky_right"), Observation)
        refused = await observed("sky_wrong")
        assert isinstance(refused, Unknown)
        assert "SKYPILOT_SERVICE_ACCOUNT_TOKEN" in refused.reason
        assert "sky_wrong" not in refused.reason


async def test_each_call_says_who_asks_and_which_version(lab: Lab) -> None:
    await seen(await lab.backend())
    assert lab.server.headers[0]["X-SkyPilot-API-Version"] == "62"
    who = lab.server.posts[0][1]["env_vars"]
    assert len(who["SKYPILOT_USER_ID"]) == 8
    int(who["SKYPILOT_USER_ID"], 16)


async def test_a_namespace_goes_into_the_requests_configuration(lab: Lab) -> None:
    backend = await lab.backend()
    base = sky_workload(provider={"type": "kubernetes", "context": "gpu"})
    scheduling = replace(base.template.scheduling, namespace="acme", workspace="acme")
    workload = replace(base, template=replace(base.template, scheduling=scheduling))
    await backend.apply(Create(workload, ""))
    await ready(lab, backend, workload)
    body = lab.server.last("/serve/up")
    assert body["override_skypilot_config"] == {"kubernetes": {"namespace": "acme"}}
    assert '"active_workspace":"acme"' in body["task"]

    # SkyServe reads it once, when a service is made.
    moved = replace(scheduling, namespace="other")
    elsewhere = replace(base, template=replace(base.template, scheduling=moved), spec_digest="two")
    with pytest.raises(Stalled, match="runs in namespace acme, and SkyPilot moves no service"):
        await backend.apply(Update(elsewhere, "roll", ""))


async def test_no_answer_yet_is_unknown_and_takes_nothing_on(lab: Lab) -> None:
    lab.server.hung.clear()
    backend = await lab.backend(pace=replace(PACE, first_look_s=0.05))
    assert isinstance(await backend.observe(), Unknown)
    with pytest.raises(BackendUnreachable):
        await backend.apply(Create(sky_workload(), ""))
    lab.server.hung.set()


async def test_the_loop_is_told_when_something_changed_and_only_then(lab: Lab) -> None:
    backend, workload = await lab.backend(), sky_workload()
    await backend.apply(Create(workload, ""))
    await ready(lab, backend, workload)
    await looks(lab)
    lab.told.clear()
    await looks(lab, 5)
    assert lab.told == []
    lab.server.services[workload.name].replicas[0].status = "NOT_READY"
    await eventually(lambda: lab.told)
    now = await seen(backend)
    assert now is not None
    assert [r.phase for r in now.replicas] == [Phase.NOT_READY]


async def test_closing_is_quick_while_skypilot_hangs(lab: Lab) -> None:
    backend = await lab.backend()
    await seen(backend)
    lab.server.hung.clear()
    await looks(lab, 1)
    async with asyncio.timeout(2):
        await backend.close()
    lab.server.hung.set()
