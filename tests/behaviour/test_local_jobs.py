"""Jobs on the local backend: run once to their end, whatever happens to the reconciler meanwhile."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from reconciler.backends.local import LocalBackend
from reconciler.core.action import Create, Delete, Update
from reconciler.core.observed import Observation, ObservedReplica, ObservedWorkload, Phase
from reconciler.core.workload import Workload
from reconciler.errors import Stalled
from schemas.function import FunctionSpec
from tests.support import eventually
from tests.unit.core.worlds import deployment, desired_of, function, local

pytestmark = pytest.mark.timeout(60)


def job(folder: Path, program: str, *, retries: int = 0, run: str = "1", **more: Any) -> Workload:
    """A Python program that finds `folder` as its first argument."""
    spec = function(
        "tune",
        runtime={"engine": "custom", "command": [sys.executable, "-c", program, str(folder)]},
        job={"kind": "fineTune", "run": run, "retries": retries, **more},
    )
    return desired_of(spec, local("c"), deployment("a", of="tune")).workloads["a--c"]


COUNT = "import sys, pathlib; p = pathlib.Path(sys.argv[1]) / 'runs'; p.open('a').write('x');"
WAIT = COUNT + "import time\nwhile not (p.parent / 'go').exists(): time.sleep(0.02)\n"


@asynccontextmanager
async def backend(folder: Path) -> AsyncIterator[LocalBackend]:
    made = LocalBackend(folder / "state", "me", notify=lambda: None)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def ended(tmp_path: Path) -> AsyncIterator[None]:
    yield
    made = LocalBackend(tmp_path / "state", "me", notify=lambda: None)
    await made.stop_all(grace_s=0.1)


async def seen(made: LocalBackend) -> ObservedWorkload | None:
    observation = await made.observe()
    assert isinstance(observation, Observation)
    return observation.workloads.get("a--c")


async def run_in(made: LocalBackend, phase: Phase) -> ObservedReplica:
    async def found() -> ObservedReplica | None:
        workload = await seen(made)
        runs = workload.replicas if workload else ()
        return runs[-1] if runs and runs[-1].phase is phase else None

    return await eventually(found, timeout_s=20, what=f"a run {phase}")  # type: ignore[return-value]


def runs(folder: Path) -> int:
    file = folder / "runs"
    return len(file.read_text()) if file.exists() else 0


async def test_it_runs_once_and_its_end_outlives_the_reconciler(tmp_path: Path, ended: None):
    wanted = job(tmp_path, COUNT + "print('tuned')")
    async with backend(tmp_path) as made:
        await made.apply(Create(wanted, "new"))
        done = await run_in(made, Phase.SUCCEEDED)
        assert (done.url, done.restarts) == (None, 0)
        await made.apply(Create(wanted, "again"))
    async with backend(tmp_path) as again:
        await run_in(again, Phase.SUCCEEDED)
        await again.apply(Create(wanted, "again"))
        await asyncio.sleep(0)
    assert runs(tmp_path) == 1
    (log,) = (tmp_path / "state" / "logs" / "engines").glob("a--c-*.log")
    assert log.read_text() == "tuned\n"


async def test_what_runs_while_nobody_watches_is_found_again(tmp_path: Path, ended: None):
    wanted = job(tmp_path, WAIT)
    async with backend(tmp_path) as made:
        await made.apply(Create(wanted, "new"))
        before = await run_in(made, Phase.RUNNING)
        await eventually(lambda: runs(tmp_path) == 1)
    async with backend(tmp_path) as again:
        assert await run_in(again, Phase.RUNNING) == before
        (tmp_path / "go").touch()
        await run_in(again, Phase.SUCCEEDED)
    assert runs(tmp_path) == 1


async def test_its_end_while_nobody_watched_is_known(tmp_path: Path, ended: None):
    async with backend(tmp_path) as made:
        await made.apply(Create(job(tmp_path, WAIT), "new"))
        await run_in(made, Phase.RUNNING)
    (tmp_path / "go").touch()
    exits = tmp_path / "state" / "workloads" / "a--c"
    await eventually(lambda: list(exits.glob("exit-*.json")))
    async with backend(tmp_path) as again:
        await run_in(again, Phase.SUCCEEDED)
    assert runs(tmp_path) == 1


async def test_a_failure_is_tried_again_as_often_as_it_says(tmp_path: Path, ended: None):
    wanted = job(tmp_path, COUNT + "print('no data'); sys.exit(3)", retries=1)
    async with backend(tmp_path) as made:
        await made.apply(Create(wanted, "new"))
        await eventually(lambda: runs(tmp_path) == 2, timeout_s=20)

        async def over() -> bool:
            workload = await seen(made)
            return bool(workload and workload.replicas[0].restarts == 1)

        await eventually(over)
        failed = await run_in(made, Phase.FAILED)
        assert failed.detail.startswith("it ended with code 3")
        assert failed.restarts == 1
    async with backend(tmp_path) as again:
        await run_in(again, Phase.FAILED)
    assert runs(tmp_path) == 2


async def test_another_run_and_another_spec_are_run_again(tmp_path: Path, ended: None):
    async with backend(tmp_path) as made:
        await made.apply(Create(job(tmp_path, COUNT), "new"))
        await run_in(made, Phase.SUCCEEDED)
        second = job(tmp_path, COUNT, run="2")
        await made.apply(Update(second, "roll", "run again"))
        await eventually(lambda: runs(tmp_path) == 2)
        assert (await run_in(made, Phase.SUCCEEDED)).spec_digest == second.spec_digest


async def test_suspending_and_deleting_end_it(tmp_path: Path, ended: None):
    wanted = job(tmp_path, WAIT)
    async with backend(tmp_path) as made:
        await made.apply(Create(wanted, "new"))
        await eventually(lambda: runs(tmp_path) == 1)
        await made.apply(Update(replace(wanted, replicas=0), "scale", "suspended"))

        async def quiet() -> bool:
            workload = await seen(made)
            return workload is not None and not workload.replicas

        await eventually(quiet)
        await made.apply(Update(wanted, "scale", "resumed"))
        await eventually(lambda: runs(tmp_path) == 2)
        await made.apply(Delete("a--c", "a", "local", "gone"))

        async def gone() -> bool:
            return await seen(made) is None

        await eventually(gone)
        assert not (tmp_path / "state" / "workloads" / "a--c").exists()
    marked = [
        p
        for p in psutil.process_iter(["cmdline", "environ", "status"])
        if (p.info["environ"] or {}).get("DETOSERVE_OWNER_DIR") == str(tmp_path / "state")
        and p.info["status"] != psutil.STATUS_ZOMBIE
        and "job_runner" in " ".join(p.info["cmdline"] or ())
    ]
    assert not marked


async def test_what_takes_too_long_is_ended(tmp_path: Path, ended: None):
    async with backend(tmp_path) as made:
        await made.apply(Create(job(tmp_path, WAIT, timeout="1s"), "new"))
        failed = await run_in(made, Phase.FAILED)
        assert "not done within 1 s" in failed.detail


async def test_a_program_that_is_not_there_is_refused(tmp_path: Path, ended: None):
    spec = function(
        "tune",
        runtime={"engine": "custom", "command": ["no-such-program-here"]},
        job={"kind": "batch"},
    )
    wanted = desired_of(spec, local("c"), deployment("a", of="tune")).workloads["a--c"]
    async with backend(tmp_path) as made:
        with pytest.raises(Stalled, match="no-such-program-here"):
            await made.apply(Create(wanted, "new"))


def test_a_job_must_bring_its_command():
    with pytest.raises(ValueError, match="a job runs its own command"):
        FunctionSpec.model_validate(
            {
                "model": {"uri": "sim://m"},
                "runtime": {"engine": "simulated"},
                "job": {"kind": "batch"},
            }
        )
