"""Engines found as pods: the real Kubernetes client against a server that speaks its list API.

No cluster runs here; the answers are as Kubernetes' API reference has them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from kubernetes import client

from agent.finding import Address, FindingFailed
from agent.finding.kubernetes_pods import KubernetesPods
from tests.support import free_port


def pod(
    name: str, ip: str | None, *, ready: bool = True, ports: Any = ((8000, "http"),), **meta: Any
) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "models", "labels": {"app": "vllm"}, **meta},
        "spec": {
            "containers": [
                {
                    "name": "engine",
                    "ports": [{"containerPort": number, "name": label} for number, label in ports],
                }
            ]
        },
        "status": {
            "phase": "Running",
            "podIP": ip,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


class ApiServer:
    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.status = 200
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        self.asked.append((request.path, request.query.get("labelSelector", "")))
        if self.status != 200:
            return web.json_response({"kind": "Status", "code": self.status}, status=self.status)
        listed = {"apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": "7"}}
        return web.json_response({**listed, "items": self.pods})


@asynccontextmanager
async def api_server() -> AsyncIterator[tuple[ApiServer, client.CoreV1Api]]:
    server = ApiServer()
    runner = web.ServerRunner(web.Server(server))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    try:
        with client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{port}")) as connection:
            yield server, client.CoreV1Api(connection)
    finally:
        await runner.cleanup()


async def test_ready_pods_with_the_label() -> None:
    async with api_server() as (server, api):
        server.pods = [
            pod("a", "10.0.0.1", ports=((9090, "metrics"), (8000, "http"))),
            pod("b", "10.0.0.2", ports=((8080, None),)),
            pod("six", "fd00::1"),
            pod("starting", "10.0.0.3", ready=False),
            pod("pending", None),
            pod("leaving", "10.0.0.4", deletionTimestamp="2026-11-23T12:00:00Z"),
            pod("unclear", "10.0.0.5", ports=((1, "x"), (2, "y"))),
        ]
        found = await KubernetesPods("app=vllm", namespace="models", api=api).engines()
        assert list(found) == [
            Address("http://10.0.0.1:8000"),
            Address("http://10.0.0.2:8080"),
            Address("http://[fd00::1]:8000"),
        ]
        assert server.asked == [("/api/v1/namespaces/models/pods", "app=vllm")]
        await KubernetesPods("app=vllm", api=api).engines()
        assert server.asked[-1][0] == "/api/v1/pods"


async def test_an_api_that_refuses_is_not_an_empty_cluster() -> None:
    async with api_server() as (server, api):
        server.status = 403
        with pytest.raises(FindingFailed, match="answers 403"):
            await KubernetesPods("app=vllm", namespace="models", api=api).engines()


async def test_an_api_that_is_away_is_not_an_empty_cluster() -> None:
    options = client.Configuration(host=f"http://127.0.0.1:{free_port()}")
    options.retries = False
    with client.ApiClient(options) as connection:
        pods = KubernetesPods("app=vllm", api=client.CoreV1Api(connection))
        with pytest.raises(FindingFailed, match="does not answer"):
            await pods.engines()
