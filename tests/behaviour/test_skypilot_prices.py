"""Prices from SkyPilot's catalogue, over its REST API as it is spoken, and what they decide."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from reconciler.backends.skypilot import ApiSettings, SkyPilotApi, SkyPilotPrices
from reconciler.core.placement import GpuPrice
from reconciler.core.price_questions import Question, price_questions
from reconciler.errors import BackendUnreachable
from tests.behaviour.loop_fixtures import running_bench
from tests.config_text import cluster, deployment, function
from tests.fake_backend import FakeBackend
from tests.sky_api_server import SkyApiServer
from tests.support import eventually
from tests.unit.core.worlds import by_key, config_object
from tests.unit.core.worlds import deployment as deployment_object
from tests.unit.core.worlds import function as function_object

NAN = math.nan
TYPES: list[list[Any]] = [
    ["AWS", "p5.48xlarge", "H100", 8.0, 192, 80.0, 2048.0, 55.04, 20.8, "us-east-1"],
    ["AWS", "p5.4xlarge", "H100", 1.0, 16, 80.0, 256.0, 7.2, NAN, "us-east-1"],
    ["AWS", "p5.48xlarge", "H100", 8.0, 192, 80.0, 2048.0, 60.0, 16.0, "eu-west-1"],
    ["GCP", "a3-highgpu-8g", "H100", 8.0, 208, 80.0, 1872.0, 46.0, 24.0, "us-central1"],
    ["AWS", "g6.xlarge", "L4", 1.0, 4, 24.0, 16.0, 0.8, 0.3, "us-east-1"],
    ["AWS", "p4d", "A100-80GB", 8.0, 96, 80.0, 1152.0, NAN, NAN, "us-east-1"],
]
EAST = Question("east", "aws", "us-east-1", "H100")
ANY_GCP = Question("any-gcp", "gcp", "", "h100")
NOWHERE = Question("east", "aws", "us-east-1", "A100-80GB")


@asynccontextmanager
async def catalogue() -> AsyncIterator[tuple[SkyApiServer, SkyPilotPrices]]:
    async with SkyApiServer().running() as server:
        server.instance_types = TYPES
        api = SkyPilotApi(ApiSettings(server.url), "me")
        try:
            yield server, SkyPilotPrices(api)
        finally:
            await api.close()


async def test_the_cheapest_gpu_of_a_type_where_it_was_asked_for():
    async with catalogue() as (server, prices):
        assert await prices.prices({EAST, ANY_GCP, NOWHERE}) == {
            ("east", "h100"): GpuPrice(6.88, 2.6),
            ("any-gcp", "h100"): GpuPrice(5.75, 3.0),
        }
        assert server.count("/list_accelerators") == 1
        assert await prices.prices(()) == {}
        assert server.count("/list_accelerators") == 1


async def test_a_catalogue_that_does_not_answer_is_no_price():
    async with catalogue() as (server, prices):
        server.refuse["list_accelerators"] = ("CloudError", "raw.githubusercontent.com")
        with pytest.raises(BackendUnreachable, match=r"raw\.githubusercontent\.com"):
            await prices.prices({EAST})
        server.refuse.clear()
        server.instance_types = [["AWS", "odd"] + [None] * 8]
        server.instance_types[0][2] = "H100"
        with pytest.raises(BackendUnreachable, match="cannot be read"):
            await prices.prices({EAST})


def test_only_what_git_leaves_open_is_asked_for():
    aws = {"type": "cloud", "cloud": "aws", "region": "us-east-1"}

    def asked(**more: Any) -> set[str]:
        objects = by_key(
            function_object("f", resources={"gpu": {"types": ["H100", "L4"]}}),
            config_object("Cluster", "c", {"provider": aws} | more),
            deployment_object("a"),
        )
        return {question.gpu_type for question in price_questions(objects)}

    assert asked() == {"H100", "L4"}
    assert asked(gpus=[{"type": "H100", "count": 8, "pricePerHour": 3.0}]) == {"L4"}
    assert asked(provider={"type": "slurm", "cluster": "x"}) == set()


async def test_a_deployment_waits_for_prices_and_goes_where_they_say(tmp_path: Path):
    clouds = {
        "east.yaml": cluster("east", provider="type: cloud, cloud: aws, region: us-east-1"),
        "gcp.yaml": cluster("any-gcp", provider="type: cloud, cloud: gcp"),
        "chat.yaml": function("chat", more="  resources: {gpu: {types: [H100], count: 1}}\n"),
        "deployments/chat.yaml": deployment("chat", placement="anyOf: [east, any-gcp]"),
    }
    async with catalogue() as (server, prices), running_bench(tmp_path) as bench:
        server.hung.clear()
        bench.repo.commit(clouds)
        bench.backends, bench.prices = {"skypilot": FakeBackend("skypilot", instant=True)}, prices
        bench.start()
        await bench.passes(3)
        assert not bench.loop.memory.desired.workloads
        status = await bench.write_status()
        assert "waiting for SkyPilot's prices" in status["status/deployment/chat.yaml"]
        server.hung.set()

        async def placed() -> bool:
            await bench.passes(1)
            return "chat--any-gcp" in bench.loop.memory.desired.workloads

        await eventually(placed)
        workload = bench.loop.memory.desired.workloads["chat--any-gcp"]
        assert workload.price_per_hour == 5.75
        assert workload.placement.why == "the cheapest that will do"


async def test_without_prices_it_goes_to_the_first_all_the_same(tmp_path: Path):
    async with catalogue() as (server, prices), running_bench(tmp_path) as bench:
        server.down = True
        bench.repo.commit(
            {
                "east.yaml": cluster("east", provider="type: cloud, cloud: aws"),
                "gcp.yaml": cluster("any-gcp", provider="type: cloud, cloud: gcp"),
                "chat.yaml": function("chat", more="  resources: {gpu: {types: [H100]}}\n"),
                "deployments/chat.yaml": deployment("chat", placement="anyOf: [east, any-gcp]"),
            }
        )
        bench.backends, bench.prices = {"skypilot": FakeBackend("skypilot", instant=True)}, prices
        bench.start()

        async def placed() -> bool:
            await bench.passes(1)
            return "chat--east" in bench.loop.memory.desired.workloads

        await eventually(placed)
        assert bench.loop.memory.desired.workloads["chat--east"].price_per_hour is None
