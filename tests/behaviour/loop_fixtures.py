"""A reconciler in this process on real Git and Valkey, with a backend in memory and made-up routers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from redis.asyncio import Redis

from reconciler.backends.base import Backend
from reconciler.core.observed import Observation, ObservedWorkload, Phase
from reconciler.core.signals import Signals
from reconciler.core.status import World
from reconciler.loop.config_reader import GitConfig
from reconciler.loop.ports import Prices
from reconciler.loop.reconciler import Reconciler
from reconciler.loop.state import StateFile
from reconciler.loop.status_task import StatusTask
from reconciler.publish.lease import Lease, boottime_s
from reconciler.publish.redis_edge import connect
from reconciler.publish.revert_branch import RevertBranches
from reconciler.publish.routes import RoutesPublisher
from reconciler.publish.status_branch import StatusBranch
from reconciler.publish.valkey import EmbeddedValkey
from reconciler.sources.git_source import GitSource
from schemas.wire.events import RouterHeartbeat
from schemas.wire.routing import RoutingTable
from tests.config_text import cluster, deployment, function, tenant
from tests.fake_backend import FakeBackend
from tests.git_repo import GitRepo

FIRST = {
    "chat.yaml": function("chat"),
    "local.yaml": cluster("local"),
    "acme.yaml": tenant("acme"),
    "deployments/chat.yaml": deployment("chat"),
}


class FixedLeadership:
    """Leads until told otherwise."""

    def __init__(self, generation: int = 1) -> None:
        self.held: Lease | None = None
        self.lead(generation)

    def lead(self, generation: int) -> None:
        self.held = Lease(generation, boottime_s() + 600, "test")


class Heartbeats:
    """Routers that say what a test makes them say; `follow`: each serves the newest table."""

    def __init__(self) -> None:
        self.beats: dict[str, RouterHeartbeat] | None = {}

    def alive(self) -> dict[str, RouterHeartbeat] | None:
        return self.beats

    def serve(self, generation: int, **in_flight: int) -> None:
        beat = RouterHeartbeat(id="r", at=0.0, generation=generation, in_flight=in_flight)
        self.beats = {"r": beat}


class Clock:
    """Stands still until moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """One reconciler after another over the same repo, Valkey, backend and state directory."""

    def __init__(self, folder: Path, redis: Redis, valkey: EmbeddedValkey) -> None:
        self.folder = folder
        self.redis = redis
        self.valkey = valkey
        self.repo = GitRepo(folder / "repo")
        self.key = Ed25519PrivateKey.generate()
        self.backend = FakeBackend("local", instant=True)
        self.backends: dict[str, Backend] = {"local": self.backend}
        self.prices: Prices | None = None
        """Both are taken up at the next `start`."""
        self.routers = Heartbeats()
        self.leadership = FixedLeadership()
        self.clock = Clock()
        self.worlds: list[World] = []
        self.source_problems: list[str] = []
        self.start()

    def start(self) -> None:
        """A new reconciler, as after a crash: what only the old one's memory had is gone."""
        state = self.folder / "state"
        self.config = GitConfig(GitSource(str(self.repo.path), state / "config.git"))
        self.routes = RoutesPublisher(self.redis, self.key, state / "routes.table", timeout_s=2.0)
        self.state_file = StateFile(state / "last-good.json")
        self.signals = Signals()
        self.loop = Reconciler(
            config=self.config,
            backends=self.backends,
            routes=self.routes,
            routers=self.routers,
            leadership=self.leadership,
            state_file=self.state_file,
            on_world=self.worlds.append,
            on_source_problem=self.source_problems.append,
            signals=self.signals,
            reverts=RevertBranches(state / "revert.git", str(self.repo.path), "main"),
            prices=self.prices,
            clock=self.clock,
        )
        self.loop.restore()
        self.branch = StatusBranch(state / "status.git", str(self.repo.path))
        self.status = StatusTask(
            lambda: self.branch, self.leadership, debounce_s=lambda: 0.0, on_fenced=lambda: None
        )

    @property
    def world(self) -> World:
        return self.worlds[-1]

    async def passes(self, count: int = 3) -> None:
        """Enough of them for create, publish and release, each with a fetch."""
        for _ in range(count):
            self.loop.wake(fetch=True)
            await self.loop.one_pass()

    async def settle(self) -> None:
        """Passes until one has nothing to do, with routers that follow."""
        for _ in range(20):
            before = (await self.seen(), self.loop.memory.generation)
            self.routers.serve(self.loop.memory.generation)
            await self.passes(1)
            if before == (await self.seen(), self.loop.memory.generation):
                return
        raise AssertionError("no fixpoint in 20 passes")

    async def seen(self) -> dict[str, ObservedWorkload]:
        observation = await self.backend.observe()
        assert isinstance(observation, Observation)
        return dict(observation.workloads)

    async def running(self) -> dict[str, int]:
        """Workload -> replicas that are ready; nothing else may be there."""
        seen = await self.seen()
        for workload in seen.values():
            assert all(r.phase is Phase.READY for r in workload.replicas), workload
        return {name: len(workload.replicas) for name, workload in seen.items()}

    async def table(self) -> RoutingTable:
        table = await self.routes.current()
        assert table is not None
        return table

    async def routed(self) -> dict[str, list[str]]:
        """Deployment -> replica ids as routers are told."""
        return {
            arm.deployment: [r.id for r in arm.replicas]
            for f in (await self.table()).functions
            for arm in f.arms
        }

    async def write_status(self) -> dict[str, str]:
        self.status.offer(self.world)
        await self.status.write()
        return {path: data.decode() for path, data in (await self.branch.read()).items()}

    def status_commits(self) -> int:
        return int(self.repo.git("rev-list", "--count", "detoserve/status"))


@asynccontextmanager
async def running_bench(folder: Path) -> AsyncIterator[Bench]:
    async with EmbeddedValkey(folder / "valkey") as valkey:
        redis = connect(valkey.url)
        try:
            yield Bench(folder, redis, valkey)
        finally:
            await redis.aclose()


@asynccontextmanager
async def running_loop(bench: Bench) -> AsyncIterator[None]:
    """The loop by itself, as in production."""
    stop = asyncio.Event()
    task = asyncio.create_task(bench.loop.run(stop))
    try:
        yield
    finally:
        stop.set()
        await task
