"""From commits to SkyServe services and to what routers are told, with the whole loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from reconciler.backends.skypilot import ApiSettings, SkyPilotBackend
from reconciler.backends.skypilot.backend import Pace
from reconciler.loop.reconciler import Reconciler
from tests.behaviour.loop_fixtures import Bench, running_bench
from tests.config_text import deployment, function, tenant
from tests.sky_api_server import SkyApiServer
from tests.support import eventually

CAMPUS = """\
apiVersion: detoserve.ai/v1alpha1
kind: Cluster
metadata: {name: campus}
spec:
  provider: {type: slurm, cluster: campus}
"""
PLATFORM = """\
apiVersion: detoserve.ai/v1alpha1
kind: Platform
metadata: {name: platform}
spec: {prune: {orphans: delete}}
"""
NAME = "chat--campus"


def on_campus(name: str = "chat", replicas: int = 1) -> str:
    more = f"  replicas: {replicas}\n"
    return deployment(name, placement="cluster: campus", more=more)


FILES = {
    "chat.yaml": function("chat"),
    "campus.yaml": CAMPUS,
    "acme.yaml": tenant("acme"),
    "deployments/chat.yaml": on_campus(),
}


@dataclass
class Fleet:
    bench: Bench
    server: SkyApiServer
    backend: SkyPilotBackend
    loop: Reconciler = field(init=False)
    in_flight: dict[str, int] = field(default_factory=dict)
    """Replica -> requests that the router still has on it."""

    def start(self) -> None:
        self.bench.start()
        self.loop = self.bench.loop = Reconciler(
            config=self.bench.config,
            backends={"skypilot": self.backend},
            routes=self.bench.routes,
            routers=self.bench.routers,
            leadership=self.bench.leadership,
            state_file=self.bench.state_file,
            on_world=self.bench.worlds.append,
            on_source_problem=self.bench.source_problems.append,
            clock=self.bench.clock,
        )
        self.loop.restore()

    async def until(self, true: Callable[[], Awaitable[Any]], *, step: bool = True) -> None:
        """Passes, with routers that follow and time that passes in SkyPilot, until it is so."""

        async def passed() -> bool:
            if step:
                self.server.step()
            self.bench.routers.serve(self.loop.memory.generation, **self.in_flight)
            self.loop.wake(fetch=True)
            await self.loop.one_pass()
            return bool(await true())

        await eventually(passed, timeout_s=30)

    async def routed(self) -> dict[str, str]:
        """Replica -> state, as routers are told of the one function."""
        table = await self.bench.routes.current()
        arms = [arm for f in (table.functions if table else ()) for arm in f.arms]
        return {r.id: r.state for arm in arms for r in arm.replicas}

    async def is_routed(self, **wanted: str) -> bool:
        """By the replica's number: n1="ready"."""
        found = {f"n{name.split('-')[-2]}": state for name, state in (await self.routed()).items()}
        return found == wanted

    async def conditions(self) -> dict[str, tuple[str, str]]:
        """Of the deployment: type -> (status, message)."""
        documents = await self.bench.write_status()
        text = documents["status/deployment/chat.yaml"]
        status = YAML(typ="safe").load(text)["status"]
        return {c["type"]: (c["status"], c["message"]) for c in status["conditions"]}

    def replica(self, number: int, status: str) -> None:
        for replica in self.server.services[NAME].replicas:
            if replica.id == number:
                replica.status = status


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        bench = await stack.enter_async_context(running_bench(tmp_path))
        server = await stack.enter_async_context(SkyApiServer().running())
        pace = Pace(idle_s=0.02, moving_s=0.02, least_s=0.01, first_look_s=30)
        backend = SkyPilotBackend(
            ApiSettings(server.url), tmp_path / "state", "me", notify=lambda: None, pace=pace
        )
        await backend.start()
        stack.push_async_callback(backend.close)
        made = Fleet(bench, server, backend)
        made.start()
        yield made


async def test_a_commit_runs_and_its_removal_leaves_nothing(fleet: Fleet) -> None:
    fleet.bench.repo.commit(FILES)
    await fleet.until(lambda: fleet.is_routed(n1="ready"))
    assert fleet.server.count("/serve/up") == 1

    async def ready() -> bool:
        return (await fleet.conditions())["Ready"][0] == "True"

    await fleet.until(ready)

    (replica,) = await fleet.routed()
    fleet.in_flight = {replica: 1}
    fleet.bench.repo.commit({"deployments/chat.yaml": None})
    await fleet.until(fleet.is_routed)
    for _ in range(5):
        await fleet.until(fleet.is_routed)
    assert fleet.server.count("/serve/down") == 0, "a request is still on it"
    fleet.in_flight = {}

    async def gone() -> bool:
        return not fleet.server.services

    await fleet.until(gone)
    assert fleet.server.count("/serve/down") == 1


async def test_what_is_not_ready_gets_no_requests_and_what_leaves_drains(fleet: Fleet) -> None:
    fleet.bench.repo.commit(FILES | {"deployments/chat.yaml": on_campus(replicas=2)})
    await fleet.until(lambda: fleet.is_routed(n1="ready", n2="ready"))
    fleet.replica(1, "NOT_READY")
    await fleet.until(lambda: fleet.is_routed(n2="ready"), step=False)
    assert "fails its readiness probe" in (await fleet.conditions())["Degraded"][1]
    fleet.replica(1, "READY")
    fleet.replica(2, "SHUTTING_DOWN")
    await fleet.until(lambda: fleet.is_routed(n1="ready", n2="draining"), step=False)
    await fleet.until(lambda: fleet.is_routed(n1="ready", n3="ready"))


async def test_a_preempted_replica_rolls_nothing(fleet: Fleet) -> None:
    fleet.bench.repo.commit(FILES)
    await fleet.until(lambda: fleet.is_routed(n1="ready"))
    fleet.replica(1, "PREEMPTED")
    await fleet.until(fleet.is_routed, step=False)
    conditions = await fleet.conditions()
    assert "Degraded" not in conditions
    assert conditions["Ready"][0] == "False"
    await fleet.until(lambda: fleet.is_routed(n2="ready"))
    assert fleet.server.count("/serve/update") == 0
    assert fleet.server.count("/serve/up") == 1


async def test_an_outage_keeps_routes_and_is_told(fleet: Fleet) -> None:
    fleet.bench.repo.commit(FILES)
    await fleet.until(lambda: fleet.is_routed(n1="ready"))
    fleet.server.down = True

    async def unknown() -> bool:
        return (await fleet.conditions())["Ready"][0] == "Unknown"

    await fleet.until(unknown)
    assert await fleet.is_routed(n1="ready")
    fleet.bench.repo.commit({"deployments/chat.yaml": on_campus(replicas=3)})
    await fleet.until(unknown)
    fleet.server.down = False
    await fleet.until(lambda: fleet.is_routed(n1="ready", n2="ready", n3="ready"))


@pytest.mark.parametrize("status", ["FAILED_CLEANUP", "CONTROLLER_FAILED"])
async def test_a_quarantine_is_told_and_keeps_what_still_serves(fleet: Fleet, status: str) -> None:
    fleet.bench.repo.commit(FILES)
    await fleet.until(lambda: fleet.is_routed(n1="ready"))
    fleet.server.services[NAME].status = status
    fleet.bench.repo.commit(
        {"deployments/chat.yaml": None, "deployments/more.yaml": on_campus("more")}
    )

    async def other() -> bool:
        return len(await fleet.routed()) == 2

    await fleet.until(other)
    assert fleet.server.count("/serve/down") == 0
    fleet.bench.repo.commit({"deployments/chat.yaml": on_campus(replicas=2)})

    async def stalled() -> bool:
        return "--purge chat--campus" in (await fleet.conditions()).get("Stalled", ("", ""))[1]

    await fleet.until(stalled)
    assert fleet.server.count("/serve/update") == 0


@pytest.mark.parametrize("policy", ["report", "delete"])
async def test_an_orphan_is_reported_or_removed_as_the_policy_says(
    fleet: Fleet, policy: str
) -> None:
    """A new host: what no commit names, and nobody here remembers."""
    fleet.bench.repo.commit(FILES | {"deployments/old.yaml": on_campus("old")})

    async def both() -> bool:
        return len(await fleet.routed()) == 2

    await fleet.until(both)
    fleet.bench.repo.commit(
        {"deployments/old.yaml": None, "platform.yaml": PLATFORM.replace("delete", policy)}
    )
    (fleet.bench.folder / "state" / "last-good.json").unlink()
    fleet.start()

    async def settled() -> bool:
        if policy == "delete":
            return "old--campus" not in fleet.server.services
        return any("orphans" in refusal for refusal in fleet.bench.world.plan.refusals)

    await fleet.until(settled)
    assert ("old--campus" in fleet.server.services) == (policy == "report")
    assert NAME in fleet.server.services


async def test_what_skypilot_refuses_is_told_in_its_words(fleet: Fleet) -> None:
    fleet.server.refuse["optimize"] = ("ResourcesUnavailableError", "Nobody has H100:16.")
    fleet.bench.repo.commit(FILES)

    async def stalled() -> bool:
        return "Nobody has H100:16." in (await fleet.conditions()).get("Stalled", ("", ""))[1]

    await fleet.until(stalled)
