"""Load and canaries over SkyPilot's REST API: the whole loop, real Git and Valkey, the server at the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from reconciler.backends.skypilot import ApiSettings, SkyPilotBackend
from reconciler.backends.skypilot.backend import Pace
from schemas.wire.signals import ArmSignals, FunctionSignals, RouterSignals
from tests.behaviour.loop_fixtures import Bench, running_bench
from tests.config_text import HEAD, cluster, deployment
from tests.sky_api_server import SkyApiServer
from tests.support import eventually

PACE = Pace(idle_s=0.02, moving_s=0.02, least_s=0.01, retry_s=0.05)
CAMPUS = cluster("campus", provider="type: slurm, cluster: campus")


def function(args: str = "", *, scaling: str = "") -> str:
    return (
        HEAD.format(kind="Function", name="chat")
        + f'  model: {{uri: "hf://a/b"}}\n  runtime: {{engine: vllm, args: [{args}]}}\n'
        + "  resources: {gpu: {types: [H100], count: 1}}\n"
        + scaling
    )


@asynccontextmanager
async def sky(folder: Path) -> AsyncIterator[tuple[SkyApiServer, Bench]]:
    async with SkyApiServer().running() as server, running_bench(folder) as bench:
        backend = SkyPilotBackend(
            ApiSettings(server.url), folder / "sky", "me", notify=lambda: None, pace=PACE
        )
        await backend.start()
        bench.backends = {"skypilot": backend}
        bench.start()
        try:
            yield server, bench
        finally:
            await backend.close()


def shown(server: SkyApiServer) -> dict[str, tuple[int, int]]:
    """Service -> replicas wanted and ready."""
    return {
        name: (service.wanted, sum(r.status == "READY" for r in service.replicas))
        for name, service in server.services.items()
        if service.shown_status() != "SHUTTING_DOWN"
    }


class Clockwork:
    """One second of everybody's time after another."""

    def __init__(self, server: SkyApiServer, bench: Bench) -> None:
        self.server, self.bench = server, bench
        self.flying = 0
        self.counts: dict[str, list[int]] = {}
        self.seq = 0

    async def until(self, wanted: dict[str, tuple[int, int]]) -> bool:
        async def tick() -> bool:
            self.bench.clock.now += 1
            self._say()
            self.server.step()
            self.bench.routers.serve(self.bench.loop.memory.generation)
            await self.bench.passes(1)
            return shown(self.server) == wanted

        return await eventually(tick, timeout_s=30, what=f"services {wanted}")

    def _say(self) -> None:
        self.seq += 1
        arms = []
        for workload in self.bench.loop.memory.desired.workloads.values():
            have = self.counts.setdefault(workload.routed_as + workload.spec_digest, [0, 0])
            have[0] += 5
            have[1] += 5 if workload.arm and "--bad" in workload.template.runtime.args else 0
            arms.append(
                ArmSignals(
                    "chat",
                    workload.routed_as,
                    "campus",
                    workload.spec_digest,
                    *have,
                    in_flight=self.flying,
                )
            )
        message = RouterSignals(
            router="r", seq=self.seq, arms=tuple(arms), functions=(FunctionSignals("chat"),)
        )
        self.bench.signals.take(message, self.bench.clock.now)


async def test_load_takes_a_service_from_one_to_three_and_back_without_a_roll(tmp_path: Path):
    scaling = (
        "  scaling: {minReplicas: 1, maxReplicas: 3, metric: concurrency, target: 2.0, "
        "upscaleDelay: 2s, downscaleDelay: 5s}\n"
    )
    async with sky(tmp_path) as (server, bench):
        bench.repo.commit(
            {
                "f.yaml": function(scaling=scaling),
                "c.yaml": CAMPUS,
                "d.yaml": deployment("chat", placement="cluster: campus"),
            }
        )
        time = Clockwork(server, bench)
        await time.until({"chat--campus": (1, 1)})
        first = server.services["chat--campus"].replicas[0].id
        time.flying = 6
        await time.until({"chat--campus": (3, 3)})
        time.flying = 0
        await time.until({"chat--campus": (1, 1)})
        assert server.count("/serve/up") == 1
        running = [r.id for r in server.services["chat--campus"].replicas if r.status == "READY"]
        assert running == [first]
        assert server.services["chat--campus"].born == 3


async def test_a_canary_is_a_second_service_and_a_bad_one_is_taken_down(tmp_path: Path):
    rollout = (
        "  replicas: 2\n  rollout: {strategy: canary, steps: [{weightPercent: 50, hold: 5s}], "
        "gates: {minRequests: 10}}\n"
    )
    files = {
        "c.yaml": CAMPUS,
        "d.yaml": deployment("chat", placement="cluster: campus", more=rollout),
    }
    async with sky(tmp_path) as (server, bench):
        good = bench.repo.commit({**files, "f.yaml": function()})
        time = Clockwork(server, bench)
        await time.until({"chat--campus": (2, 2)})
        bench.repo.commit({"f.yaml": function("--better")})
        await time.until({"chat--campus": (2, 2), "chat--campus--canary": (1, 1)})
        await time.until({"chat--campus": (2, 2)})
        better = bench.loop.memory.steering.canaries["chat--campus"].stable
        assert better is not None
        assert better.revision != good
        version = server.services["chat--campus"].version
        assert version == 2
        bench.repo.commit({"f.yaml": function("--bad")})
        await time.until({"chat--campus": (2, 2), "chat--campus--canary": (1, 1)})
        await time.until({"chat--campus": (2, 2)})
        canary = bench.loop.memory.steering.canaries["chat--campus"]
        assert "100.0 % of" in canary.why
        assert server.services["chat--campus"].version == version
        (task,) = [t for v, t in server.services["chat--campus"].tasks.items() if v == version]
        assert "--better" in task["run"]
