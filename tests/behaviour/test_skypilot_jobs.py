"""Jobs as managed jobs, over SkyPilot's REST API as it is spoken: launched once, whoever restarts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from reconciler.backends.skypilot import ApiSettings, SkyPilotApi, SkyPilotJobs
from reconciler.core.action import Create, Delete, Update
from reconciler.core.observed import Observation, ObservedWorkload, Phase, Unknown
from reconciler.core.skypilot.job import PHASES
from reconciler.core.workload import Workload
from reconciler.errors import Stalled
from tests.sky_api_server import SkyApiServer
from tests.support import eventually
from tests.unit.core.worlds import config_object, deployment, desired_of, function

SLURM = {"provider": {"type": "slurm", "cluster": "campus"}}


def job(run: str = "1", **spec: Any) -> Workload:
    tune = function(
        "tune",
        model={"uri": "hf://org/base"},
        runtime={"engine": "custom", "command": ["python", "tune.py"], **spec},
        resources={"gpu": {"types": ["H100"], "count": 2}},
        job={"kind": "fineTune", "run": run, "retries": 3, "timeout": "2h"},
    )
    made = desired_of(tune, config_object("Cluster", "c", SLURM), deployment("a", of="tune"))
    return made.workloads["a--c"]


@dataclass
class Bench:
    server: SkyApiServer
    start: Callable[[], SkyPilotJobs]

    async def seen(self, jobs: SkyPilotJobs) -> ObservedWorkload | None:
        observation = await jobs.observe()
        assert isinstance(observation, Observation)
        return observation.workloads.get("a--c")

    def becomes(self, status: str, **more: Any) -> None:
        self.server.jobs[-1] |= {"status": status, **more}


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with running(tmp_path) as made:
        yield made


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Bench]:
    async with SkyApiServer().running() as server:
        apis: list[SkyPilotApi] = []

        def start() -> SkyPilotJobs:
            apis.append(SkyPilotApi(ApiSettings(server.url), "me"))
            return SkyPilotJobs(apis[-1], folder, "me", environ={"TOKEN": "t0p"}, look_every_s=0)

        try:
            yield Bench(server, start)
        finally:
            for api in apis:
                await api.close()


async def test_a_job_is_launched_once_and_followed_to_its_end(bench: Bench):
    jobs, wanted = bench.start(), job()
    assert await bench.seen(jobs) is None
    await jobs.apply(Create(wanted, "new"))
    await eventually(lambda: bench.server.jobs)
    await jobs.apply(Create(wanted, "again"))
    assert bench.server.count("/jobs/launch") == 1
    for status, phase in (("RUNNING", Phase.RUNNING), ("SUCCEEDED", Phase.SUCCEEDED)):
        bench.becomes(status)
        current = await bench.seen(jobs)
        assert current is not None
        assert [r.phase for r in current.replicas] == [phase]
        assert current.spec_digest == wanted.spec_digest
    await jobs.apply(Create(wanted, "after its end"))
    assert bench.server.count("/jobs/launch") == 1


async def test_what_is_sent_is_a_task_with_retries_and_a_deadline_and_no_service(bench: Bench):
    jobs = bench.start()
    await jobs.apply(Create(job(secrets={"HF": {"fromEnv": "TOKEN"}}), "new"))
    body = bench.server.last("/jobs/launch")
    task = YAML(typ="safe").load(body["task"])
    assert "service" not in task
    assert "ports" not in task["resources"]
    assert task["resources"]["accelerators"] == "H100:2"
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 3}
    assert task["run"].startswith("timeout --kill-after=10 7200 bash <<")
    assert "tune.py" in task["run"]
    assert task["secrets"] == {"HF": "t0p"}
    assert body["name"] == task["name"]


async def test_a_restart_at_any_time_launches_nothing_twice(bench: Bench):
    wanted = job()
    await bench.start().apply(Create(wanted, "new"))
    await bench.start().apply(Create(wanted, "the request is under way"))
    await eventually(lambda: bench.server.jobs)
    for status in ("STARTING", "RUNNING", "SUCCEEDED"):
        bench.becomes(status)
        jobs = bench.start()
        await jobs.apply(Create(wanted, "after a restart"))
        current = await bench.seen(jobs)
        assert current is not None
        assert [r.phase for r in current.replicas] == [PHASES[status]]
    assert bench.server.count("/jobs/launch") == 1


async def test_another_run_cancels_what_runs_and_launches_anew(bench: Bench):
    jobs = bench.start()
    await jobs.apply(Create(job(), "new"))
    await eventually(lambda: bench.server.jobs)
    bench.becomes("RUNNING")
    second = job(run="2")
    await jobs.apply(Update(second, "roll", "another run"))
    await eventually(lambda: len(bench.server.jobs) == 2)
    await eventually(lambda: bench.server.jobs[0]["status"] == "CANCELLING")
    bench.becomes("FAILED", failure_reason="out of memory")
    current = await bench.seen(jobs)
    assert current is not None
    assert [(r.phase, r.detail) for r in current.replicas] == [(Phase.FAILED, "out of memory")]


async def test_suspended_and_deleted_ones_are_cancelled_and_a_resumed_one_runs_again(bench: Bench):
    jobs, wanted = bench.start(), job()
    await jobs.apply(Create(wanted, "new"))
    await eventually(lambda: bench.server.jobs)
    bench.becomes("RUNNING")
    await jobs.apply(Update(replace(wanted, replicas=0), "scale", "suspended"))
    await eventually(lambda: bench.server.jobs[0]["status"] == "CANCELLING")
    bench.becomes("CANCELLED")
    await jobs.apply(Update(wanted, "scale", "resumed"))
    await eventually(lambda: len(bench.server.jobs) == 2)
    bench.becomes("RUNNING")
    await jobs.apply(Delete("a--c", "a", "skypilot-jobs", "gone"))
    await eventually(lambda: bench.server.jobs[1]["status"] == "CANCELLING")
    current = await bench.seen(jobs)
    assert current is not None
    assert current.deleting
    bench.becomes("CANCELLED")
    assert await bench.seen(jobs) is None


async def test_jobs_of_others_are_not_seen_and_an_absent_controller_is_no_end(bench: Bench):
    jobs = bench.start()
    bench.server.jobs.append({"job_id": 1, "job_name": "train", "status": "RUNNING"})
    foreign = "a--c.0123456789abcdef.00000000"
    bench.server.jobs.append({"job_id": 2, "job_name": foreign, "status": "RUNNING"})
    assert await bench.seen(jobs) is None
    await jobs.apply(Create(job(), "new"))
    await eventually(lambda: len(bench.server.jobs) == 3)
    bench.becomes("RUNNING")
    assert await bench.seen(jobs) is not None
    bench.server.refuse["v2"] = ("ClusterNotUpError", "the controller is stopped")
    assert isinstance(await jobs.observe(), Unknown)
    bench.server.down = True
    assert isinstance(await jobs.observe(), Unknown)


async def test_a_controller_that_stopped_when_idle_makes_no_finished_job_run_again(bench: Bench):
    jobs, wanted = bench.start(), job()
    await jobs.apply(Create(wanted, "new"))
    await eventually(lambda: bench.server.jobs)
    bench.becomes("SUCCEEDED")
    await bench.seen(jobs)
    bench.server.refuse["v2"] = ("ClusterNotUpError", "No in-progress managed jobs.")
    for again in (jobs, bench.start()):
        await again.apply(Create(wanted, "after a restart"))
        current = await bench.seen(again)
        assert current is not None
        assert [r.phase for r in current.replicas] == [Phase.SUCCEEDED]
    assert bench.server.count("/jobs/launch") == 1


async def test_a_launch_that_fails_is_told_and_may_be_tried_again(bench: Bench):
    jobs = bench.start()
    bench.server.refuse["launch"] = ("ResourcesUnavailableError", "no H100 anywhere")
    await jobs.apply(Create(job(), "new"))
    with pytest.raises(Stalled, match="no H100 anywhere"):
        await jobs.apply(Create(job(), "again"))
    bench.server.refuse.clear()
    await jobs.apply(Create(job(), "once more"))
    await eventually(lambda: bench.server.jobs)
