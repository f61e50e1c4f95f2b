"""Load and canaries through the whole loop, with real Git and Valkey, and across restarts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from reconciler.core.observed import Phase
from reconciler.publish.status_yaml import parse_document
from schemas.wire.signals import ArmSignals, FunctionSignals, RouterSignals
from tests.behaviour.loop_fixtures import Bench, running_bench
from tests.config_text import cluster, deployment, function, tenant
from tests.support import eventually

SCALED = (
    "  scaling: {minReplicas: 1, maxReplicas: 4, metric: concurrency, target: 2.0, "
    "upscaleDelay: 10s, downscaleDelay: 30s}\n"
)
CANARY = (
    "  replicas: 2\n  rollout: {strategy: canary, steps: [{weightPercent: 25, hold: 10s}], "
    "gates: {minRequests: 10}}\n"
)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with running_bench(tmp_path) as made:
        yield made


def commit(bench: Bench, *, of_function: str = "", of_deployment: str = "", **more: Any) -> str:
    return bench.repo.commit(
        {
            "chat.yaml": function("chat", more=of_function),
            "local.yaml": cluster("local"),
            "acme.yaml": tenant("acme"),
            "deployments/chat.yaml": deployment("chat", more=of_deployment),
            **more,
        }
    )


class Traffic:
    """A router's word on one function, with counters that only grow."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.counts: dict[tuple[str, str], list[int]] = {}
        self.seq = 0

    def say(self, *, in_flight: int = 0, waiting: int = 0) -> None:
        self.seq += 1
        arms = tuple(
            ArmSignals("chat", arm, "local", digest, count[0], count[1], in_flight=in_flight)
            for (arm, digest), count in (self.counts or {("chat", "d"): [0, 0]}).items()
        )
        message = RouterSignals(
            router="r",
            seq=self.seq,
            arms=arms,
            functions=(FunctionSignals("chat", 0, waiting),),
        )
        self.bench.signals.take(message, self.bench.clock.now)

    def serve(self, workload: str, count: int, *, failed: int = 0) -> None:
        wanted = self.bench.loop.memory.desired.workloads[workload]
        have = self.counts.setdefault((wanted.routed_as, wanted.spec_digest), [0, 0])
        have[0] += count
        have[1] += failed


async def over(bench: Bench, traffic: Traffic, seconds: int, **load: int) -> None:
    """So many seconds of this load, in steps of 5."""
    for _ in range(seconds // 5):
        bench.clock.now += 5
        traffic.say(**load)
        bench.routers.serve(bench.loop.memory.generation)
        await bench.passes(1)


async def status_of_chat(bench: Bench) -> dict[str, Any]:
    documents = await bench.write_status()
    parsed: Any = parse_document(documents["status/deployment/chat.yaml"].encode())
    return dict(parsed["status"])


async def test_load_moves_replicas_and_a_restart_keeps_their_number(bench: Bench) -> None:
    commit(bench, of_function=SCALED)
    await bench.settle()
    assert await bench.running() == {"chat--local": 1}
    traffic = Traffic(bench)
    await over(bench, traffic, 20, in_flight=6)
    assert await bench.running() == {"chat--local": 3}
    bench.start()
    traffic = Traffic(bench)
    await bench.settle()
    assert await bench.running() == {"chat--local": 3}
    (bench.folder / "state" / "last-good.json").unlink()
    bench.start()
    traffic = Traffic(bench)
    await bench.settle()
    assert await bench.running() == {"chat--local": 3}
    await over(bench, traffic, 45, in_flight=0)
    await bench.settle()
    assert await bench.running() == {"chat--local": 1}
    status = await status_of_chat(bench)
    assert status["scaling"] == {
        "replicas": 1,
        "min": 1,
        "max": 4,
        "last": "3 -> 1: 0 requests at 2 a replica",
    }
    assert [event["reason"] for event in status["events"]] == ["Scaled"]


async def test_no_word_of_routers_moves_nothing(bench: Bench) -> None:
    commit(bench, of_function=SCALED)
    await bench.settle()
    await over(bench, Traffic(bench), 20, in_flight=6)
    for _ in range(100):
        bench.clock.now += 60
        await bench.passes(1)
    assert await bench.running() == {"chat--local": 3}


async def test_what_sleeps_says_so_to_routers_and_wakes(bench: Bench) -> None:
    commit(bench, of_function="  scaling: {minReplicas: 0, maxReplicas: 1, downscaleDelay: 20s}\n")
    await bench.settle()
    assert await bench.running() == {"chat--local": 0}
    (made,) = (await bench.table()).functions
    assert made.wake_wait_s == 300
    traffic = Traffic(bench)
    await over(bench, traffic, 5, waiting=1)
    await bench.settle()
    assert await bench.running() == {"chat--local": 1}
    await over(bench, traffic, 30)
    await bench.settle()
    assert await bench.running() == {"chat--local": 0}
    assert [c["reason"] for c in (await status_of_chat(bench))["conditions"]] == ["Asleep"]


async def test_a_tenants_gpus_and_a_price_ceiling_bound_the_load(bench: Bench) -> None:
    gpu = SCALED + "  resources: {gpu: {types: [H100], count: 2}}\n"
    commit(
        bench,
        of_function=gpu,
        **{
            "acme.yaml": tenant("acme", more="  gpus: {limit: 5}\n"),
            "deployments/chat.yaml": deployment("chat", tenants="acme"),
            "local.yaml": cluster(more="  gpus: [{type: H100, count: 64, pricePerHour: 2.0}]\n"),
        },
    )
    await bench.settle()
    traffic = Traffic(bench)
    await over(bench, traffic, 20, in_flight=50)
    assert await bench.running() == {"chat--local": 2}
    ceiling = "cluster: local, constraints: {maxPricePerHour: 12.0}"
    bench.repo.commit({"deployments/chat.yaml": deployment("chat", placement=ceiling)})
    await over(bench, traffic, 30, in_flight=50)
    await bench.settle()
    assert await bench.running() == {"chat--local": 3}
    placed = (await status_of_chat(bench))["placement"]
    assert placed == {"reason": "named", "gpus": 6, "gpuType": "H100", "pricePerHour": "12.00 USD"}


async def test_a_good_canary_takes_over_and_leaves_nothing_behind(bench: Bench) -> None:
    commit(bench, of_deployment=CANARY)
    await bench.settle()
    old = bench.loop.memory.desired.workloads["chat--local"].spec_digest
    commit(bench, of_function="  readiness: {path: /ready}\n", of_deployment=CANARY)
    await bench.settle()
    assert await bench.running() == {"chat--local": 2, "chat--local--canary": 1}
    arms = {a.deployment: a.weight for a in (await bench.table()).functions[0].arms}
    assert arms == {"chat": 7500, "chat/canary": 2500}
    status = await status_of_chat(bench)
    assert status["canary"]["weightPercent"] == 25
    assert status["replicas"]["updated"] == 2
    traffic = Traffic(bench)
    for _ in range(3):
        traffic.serve("chat--local", 30)
        traffic.serve("chat--local--canary", 10)
        await over(bench, traffic, 5)
    await over(bench, traffic, 10)
    await bench.settle()
    assert await bench.running() == {"chat--local": 2}
    new = (await bench.seen())["chat--local"].spec_digest
    assert new != old
    assert {a.deployment: a.weight for a in (await bench.table()).functions[0].arms} == {
        "chat": 100
    }
    assert "canary" not in await status_of_chat(bench)


async def test_a_bad_canary_goes_back_proposes_its_revert_and_stays_back(bench: Bench) -> None:
    good = commit(bench, of_deployment=CANARY)
    await bench.settle()
    old = (await bench.seen())["chat--local"].spec_digest
    commit(bench, of_function="  readiness: {path: /ready}\n", of_deployment=CANARY)
    await bench.settle()
    traffic = Traffic(bench)
    traffic.serve("chat--local", 30)
    traffic.serve("chat--local--canary", 10, failed=6)
    await over(bench, traffic, 10)
    await bench.settle()

    async def proposed() -> str:
        await bench.passes(1)
        return bench.repo.git(
            "for-each-ref", "--format=%(refname:short)", "refs/heads/detoserve/revert"
        )

    branch = await eventually(proposed)
    assert bench.repo.git("show", f"{branch}:chat.yaml") == bench.repo.git(
        "show", f"{good}:chat.yaml"
    )
    assert {n: w.spec_digest for n, w in (await bench.seen()).items()} == {"chat--local": old}

    async def told() -> dict[str, Any]:
        await bench.passes(1)
        status = await status_of_chat(bench)
        (stalled,) = [c for c in status["conditions"] if c["type"] == "Stalled"]
        assert stalled["reason"] == "RolledBack"
        assert branch in stalled["message"]
        return status

    status = await eventually(told)
    assert [event["reason"] for event in status["events"]] == ["Canary", "RolledBack"]
    bench.start()
    await bench.settle()
    assert {n: w.spec_digest for n, w in (await bench.seen()).items()} == {"chat--local": old}
    bench.repo.git("merge", "--quiet", "--ff-only", branch)
    await bench.settle()
    assert [c["type"] for c in (await status_of_chat(bench))["conditions"]] == ["Ready"]
    assert {n: w.spec_digest for n, w in (await bench.seen()).items()} == {"chat--local": old}


async def test_a_replica_of_the_canary_that_is_not_ready_is_not_judged(bench: Bench) -> None:
    commit(bench, of_deployment=CANARY)
    await bench.settle()
    bench.backend.instant = False
    commit(bench, of_function="  readiness: {path: /ready}\n", of_deployment=CANARY)
    await bench.passes(2)
    traffic = Traffic(bench)
    traffic.serve("chat--local", 500)
    await over(bench, traffic, 60)
    seen = (await bench.seen())["chat--local--canary"]
    assert [r.phase for r in seen.replicas] == [Phase.STARTING]
    assert bench.loop.memory.steering.canaries["chat--local"].since is None


async def test_where_it_was_put_it_stays_over_a_restart_though_prices_changed(
    bench: Bench,
) -> None:
    def at(price: float) -> str:
        return f"  gpus: [{{type: H100, count: 8, pricePerHour: {price}}}]\n"

    anywhere = deployment("chat", placement="anyOf: [local, other]")
    commit(
        bench,
        of_function="  resources: {gpu: {types: [H100], count: 1}}\n",
        **{
            "local.yaml": cluster("local", more=at(3.0)),
            "other.yaml": cluster("other", more=at(2.0)),
            "deployments/chat.yaml": anywhere,
        },
    )
    await bench.settle()
    assert await bench.running() == {"chat--other": 1}
    bench.repo.commit({"local.yaml": cluster("local", more=at(1.0))})
    await bench.settle()
    bench.start()
    await bench.settle()
    assert await bench.running() == {"chat--other": 1}
    placed = (await status_of_chat(bench))["placement"]
    assert placed["reason"] == "it stays where it is; local would cost $1.00 an hour less"
