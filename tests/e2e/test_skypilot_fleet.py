"""500 services: what a pass of the whole reconciler costs us, and what it asks of SkyPilot.

The API server is a process of its own, so that the CPU measured here is ours alone.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reconciler.backends.skypilot import ApiSettings, SkyPilotBackend
from reconciler.backends.skypilot.backend import Pace
from reconciler.core.observed import Observation, Phase
from reconciler.loop.reconciler import Reconciler
from tests.behaviour.loop_fixtures import Bench, running_bench
from tests.config_text import deployment, function, tenant
from tests.support import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

SERVICES = 500
CLUSTER = """\
apiVersion: detoserve.ai/v1alpha1
kind: Cluster
metadata: {name: campus}
spec:
  provider: {type: slurm, cluster: campus}
"""


@pytest.fixture
async def server() -> AsyncIterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.sky_api_server"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield (await asyncio.to_thread(process.stdout.readline)).strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with running_bench(tmp_path) as made:
        yield made


def fleet() -> dict[str, str]:
    text = {"chat.yaml": function("chat"), "campus.yaml": CLUSTER, "acme.yaml": tenant("acme")}
    for n in range(SERVICES):
        text[f"deployments/d{n}.yaml"] = deployment(f"d{n}").replace(
            "cluster: local", "cluster: campus"
        )
    return text


def loop_of(bench: Bench, backend: SkyPilotBackend) -> Reconciler:
    return Reconciler(
        config=bench.config,
        backends={"skypilot": backend},
        routes=bench.routes,
        routers=bench.routers,
        leadership=bench.leadership,
        state_file=bench.state_file,
        on_world=bench.worlds.append,
        on_source_problem=bench.source_problems.append,
        clock=bench.clock,
    )


async def test_a_pass_over_500_services(
    bench: Bench, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.repo.commit(fleet())
    pace = Pace(idle_s=0.3, moving_s=0.3, least_s=0.2, first_look_s=30)
    backend = SkyPilotBackend(
        ApiSettings(server, call_timeout_s=60.0),
        bench.folder / "state",
        "me",
        notify=lambda: None,
        pace=pace,
    )
    await backend.start()
    loop = loop_of(bench, backend)

    async def counts() -> tuple[int, int]:
        seen = await backend.observe()
        assert isinstance(seen, Observation), seen
        return len(seen.workloads), sum(w.count(Phase.READY) for w in seen.workloads.values())

    began_s, cpu_s = time.monotonic(), time.process_time()
    while loop.memory.effective is None:
        # On a slow disk several: a pass does not wait long for Git.
        await loop.one_pass()
    create_cpu_s = time.process_time() - cpu_s
    assert (await counts())[0] == SERVICES, "all are on their way once the pass is over"
    await eventually(lambda: _is(counts, (SERVICES, SERVICES)), timeout_s=120, what="all ready")
    up_s = time.monotonic() - began_s
    assert backend.api.calls["/serve/up"] == SERVICES

    up_cpu_s = time.process_time() - cpu_s

    await loop.one_pass()
    costs = []
    for _ in range(5):
        cpu_s, asked = time.process_time(), backend.api.calls["/serve/status"]
        await loop.one_pass()
        # With what the backend does by itself meanwhile: a whole round, from one status to the next.
        await eventually(lambda n=asked: backend.api.calls["/serve/status"] >= n + 2, timeout_s=60)
        costs.append((time.process_time() - cpu_s) / (backend.api.calls["/serve/status"] - asked))
    assert backend.api.calls["/serve/up"] == SERVICES
    assert "/serve/update" not in backend.api.calls
    with capsys.disabled():
        print(
            f"\n{SERVICES} services: {create_cpu_s:.2f} s CPU for the pass that creates them, {up_cpu_s:.1f} s "
            f"CPU and {up_s:.1f} s until all are ready; then {min(costs):.2f} to {max(costs):.2f} s CPU a pass"
        )
    assert create_cpu_s < 2.0
    assert max(costs) < 2.0

    # At its own pace, passes share looks.
    await backend.close()
    backend = SkyPilotBackend(
        ApiSettings(server), bench.folder / "state", "me", notify=lambda: None
    )
    await backend.start()
    bench.start()
    loop = loop_of(bench, backend)
    for _ in range(10):
        await loop.one_pass()
    assert backend.api.calls["/serve/status"] <= 10
    assert set(backend.api.calls) == {"/serve/status", "/api/get"}, "and nothing else is asked"

    await backend.close()


async def _is(counts: object, wanted: object) -> bool:
    return await counts() == wanted  # type: ignore[operator]
