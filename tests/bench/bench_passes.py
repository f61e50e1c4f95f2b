"""What passes cost over 10, 1,000 and 10,000 deployments: `python tests/bench/bench_passes.py`.

Everything that `detoserve reconcile` does in a pass, with the real Git source, loader, state file,
Valkey and status branch; only the backend is one in memory, whose replicas are ready at once. CPU is
that of the process and of the git processes it waited for; MiB is the peak of the process alone
while it did that step. Each size runs in a process of its own, so that memory is honest.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from reconciler.cli import GARBAGE_EVERY
from reconciler.core.last_good import Objects
from reconciler.core.status import World
from reconciler.loop.config_reader import GitConfig
from reconciler.loop.ports import Reading
from reconciler.loop.reconciler import Reconciler
from reconciler.loop.state import StateFile
from reconciler.loop.status_task import StatusTask
from reconciler.publish.lease import Held, Lease, boottime_s
from reconciler.publish.redis_edge import connect
from reconciler.publish.routes import RoutesPublisher
from reconciler.publish.status_branch import StatusBranch
from reconciler.publish.valkey import EmbeddedValkey
from reconciler.sources.git_source import GitSource
from reconciler.up.progress import deployment_lines
from schemas.wire.events import RouterHeartbeat
from tests.bench.config_repos import commit, deployment_file, files, make_bare
from tests.fake_backend import FakeBackend

SIZES = (10, 1_000, 10_000)
REPEATS = 5


class NoRouters:
    """None live, and Valkey says so."""

    def alive(self) -> Mapping[str, RouterHeartbeat]:
        return {}


class Leading:
    """Whether this reconciler may write: not until told so."""

    held: Held | None = None


class Config(GitConfig):
    """Also tells when it is not being read."""

    def __init__(self, source: GitSource) -> None:
        super().__init__(source)
        self.idle = asyncio.Event()

    async def read(self, last_good: Objects | None) -> Reading:
        self.idle.clear()
        try:
            return await super().read(last_good)
        finally:
            self.idle.set()


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def peak_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmHWM in /proc/self/status")


class Figures:
    """Rows of (step, CPU seconds, wall seconds, peak MiB)."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float, float]] = []

    async def take(self, step: str, work: Callable[[], Awaitable[Any]], times: int = 1) -> None:
        """Runs and notes one step; of several runs the medians."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        used, passed = [], []
        for _ in range(times):
            cpu, wall = cpu_s(), time.perf_counter()
            await work()
            used.append(cpu_s() - cpu)
            passed.append(time.perf_counter() - wall)
        self.rows.append((step, statistics.median(used), statistics.median(passed), peak_mib()))


async def measure(count: int, folder: Path) -> list[tuple[str, float, float, float]]:
    repo = make_bare(folder / "config.git", dict(files(count)))
    state = folder / "state"
    state.mkdir()
    figures = Figures()
    async with EmbeddedValkey(folder / "valkey") as valkey:
        redis = connect(valkey.url)
        leading = Leading()
        backend = FakeBackend(instant=False)
        branch = StatusBranch(state / "status.git", str(repo))
        status = StatusTask(lambda: branch, leading, debounce_s=lambda: 0.0, on_fenced=lambda: None)

        world_now: list[World] = []

        def on_world(world: World) -> None:
            world_now[:] = [world]
            status.offer(world)
            deployment_lines(world)

        config = Config(GitSource(str(repo), state / "config-mirror.git"))
        loop = Reconciler(
            config=config,
            backends={"local": backend},
            routes=RoutesPublisher(redis, Ed25519PrivateKey.generate(), state / "routes.table"),
            routers=NoRouters(),
            leadership=leading,
            state_file=StateFile(state / "last-good.json"),
            on_world=on_world,
        )

        async def fetching() -> None:
            loop.wake(fetch=True)
            await loop.one_pass()
            if not config.idle.is_set():
                # The pass did not wait for the repo; the next one has it.
                await config.idle.wait()
                await loop.one_pass()

        async def edited() -> None:
            await fetching()
            backend.step()
            await loop.one_pass()
            await loop.one_pass()

        await figures.take("full plan: fetch, load, compile, plan", fetching)
        current = loop.memory.effective
        assert current is not None
        assert not current.problems
        leading.held = Lease(1, boottime_s() + 3600, "bench")
        await figures.take("first publish, all created", loop.one_pass)
        backend.step()
        await figures.take("all replicas ready: publish again", loop.one_pass)
        await loop.one_pass()
        await figures.take("first status: all documents, one commit", status.write)

        async def taken_up_anew() -> None:
            again = StatusTask(
                lambda: branch, leading, debounce_s=lambda: 0.0, on_fenced=lambda: None
            )
            again.offer(world_now[0])
            assert await again.write() is None

        await figures.take("restart: status read back, nothing to write", taken_up_anew)
        await figures.take("no change, woken by a notice: fetch, pass", fetching, REPEATS)
        await figures.take("no change: resync pass", loop.one_pass, REPEATS)
        await figures.take("no change: status", status.write, REPEATS)
        commit(repo, dict([deployment_file(3, count, replicas=3)]))
        applied = len(backend.applied)
        await figures.take("one file changed: three passes until ready", edited)
        assert len(backend.applied) == applied + 1
        await figures.take("one file changed: status commit", status.write)
        await redis.aclose()
    return figures.rows


def main() -> None:
    gc.set_threshold(GARBAGE_EVERY)  # as the command does
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(asyncio.run(measure(int(sys.argv[1]), Path(folder)))))
        return
    by_size = {}
    for size in SIZES:
        done = subprocess.run(
            [sys.executable, __file__, str(size)], check=True, capture_output=True, text=True
        )
        by_size[size] = json.loads(done.stdout)
    columns = " | ".join(f"{size:,}: CPU s | wall s | MiB" for size in SIZES)
    print(f"| step | {columns} |")
    print("|---" + "|--:" * 3 * len(SIZES) + "|")
    for rows in zip(*by_size.values(), strict=True):
        cells = " | ".join(f"{cpu:.3f} | {wall:.3f} | {mib:.0f}" for _, cpu, wall, mib in rows)
        print(f"| {rows[0][0]} | {cells} |")


if __name__ == "__main__":
    main()
