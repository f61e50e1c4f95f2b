"""A config repo, a reconciler over it, a router that serves from it, and the lab where it all runs."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from reconciler.publish.valkey import EmbeddedValkey
from schemas import api_keys
from tests.config_text import HEAD, cluster, tenant
from tests.e2e.lab.lab import Job, Lab
from tests.e2e.lab.layout import API_URL, CLUSTER, NODES
from tests.e2e.lab.traffic import Traffic, traffic
from tests.e2e.ready_process import ready_process
from tests.e2e.reconcile_process import Site

KEY = api_keys.create()
PLATFORM = """\
apiVersion: detoserve.ai/v1alpha1
kind: Platform
metadata: {name: lab}
spec:
  intervals: {poll: 1s, resync: 5s, statusDebounce: 200ms}
"""
GPU_OF_NODE = {node.name: node.gpu for node in NODES}


def function(
    name: str, *, replicas: int = 1, gpu: str = "H100", itl_s: float = 0.02, by_load: str = ""
) -> str:
    """A simulated engine that asks for a GPU. `by_load`: further fields of its scaling."""
    return (
        HEAD.format(kind="Function", name=name)
        + f"""\
  model: {{uri: "sim://{name}"}}
  runtime: {{engine: simulated, args: ["--itl-s={itl_s}"]}}
  resources: {{gpu: {{types: [{gpu}], count: 1}}, cpu: 2, memory: 4Gi}}
  scaling: {{minReplicas: {replicas}{by_load}}}
  readiness: {{initialDelay: 90s, timeout: 3s, interval: 2s, failureThreshold: 4}}
"""
    )


def deployment(name: str) -> str:
    return HEAD.format(kind="Deployment", name=name) + (
        f"  function: {name}\n  shared: true\n  placement: {{cluster: slurm}}\n"
        "  rollout: {drainTimeout: 10s}\n"
    )


def counts(**wanted: int) -> Callable[[dict[str, set[str]]], bool]:
    """Whether so many replicas of each are routed to."""
    return lambda routed: all(len(routed.get(name, ())) == n for name, n in wanted.items())


class LabSite(Site):
    """`api_url`: where the reconciler is told that SkyPilot is."""

    def __init__(self, folder: Path, redis_url: str, lab: Lab) -> None:
        super().__init__(folder, redis_url, owner=f"lab-{uuid.uuid4().hex[:8]}")
        self.lab = lab
        self.api_url = API_URL
        self.began = time.monotonic()
        self.foreign = lab.services().keys()
        """What was there before, and is not ours."""
        self.repo.commit(
            {
                "platform.yaml": PLATFORM,
                "clusters/slurm.yaml": cluster(
                    "slurm", provider=f"type: slurm, cluster: {CLUSTER}"
                ),
                "tenants/acme.yaml": tenant(
                    "acme", more=f"  keys: [{{id: {KEY.id}, sha256: {KEY.sha256}}}]\n"
                ),
            }
        )

    def say(self, text: str) -> None:
        """Steps are printed with their times."""
        print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    def reconcile(self) -> None:
        self.running = self.start(
            "state", "--lease-ttl-s", "3", env={"SKYPILOT_API_SERVER_ENDPOINT": self.api_url}
        )

    def kill(self) -> None:
        self.running.kill()
        self.running.wait()

    async def services(self) -> dict[str, list[str]]:
        """Name -> states of its replicas, of all services that came since the test began."""
        rows = await asyncio.to_thread(self.lab.services)
        return {
            name: [replica["status"] for replica in row["replica_info"]]
            for name, row in rows.items()
            if name not in self.foreign
        }

    async def jobs(self, gpu: str | None = None) -> list[Job]:
        jobs = await asyncio.to_thread(self.lab.jobs)
        return [job for job in jobs if gpu is None or GPU_OF_NODE.get(job.node) == gpu]

    async def reaches(
        self, what: str, true: Callable[[dict[str, set[str]]], object], *, timeout_s: float
    ) -> dict[str, set[str]]:
        """The routes (deployment -> replicas) for which it is true; prints how long it took."""
        began = time.monotonic()
        routed: dict[str, set[str]] = {}
        while time.monotonic() - began < timeout_s:
            assert self.running.poll() is None, self.log()[-3000:]
            try:
                routed = await self.routed()
            except AssertionError:
                routed = {}  # no table yet
            if true(routed):
                self.say(f"{what}: {time.monotonic() - began:.0f} s")
                return routed
            await asyncio.sleep(0.2)
        services = await self.services()
        raise AssertionError(
            f"not within {timeout_s} s: {what}; routed {routed}; SkyPilot {services}; Slurm "
            f"{await self.jobs()}; {self.log()[-3000:]}"
        )

    async def remove(self, names: list[str]) -> None:
        """Deletes these deployments by one commit that says so, and waits until nothing is left."""
        self.repo.commit(
            {f"deployments/{name}.yaml": None for name in names},
            f"Remove all\n\nDetoserve-Confirm-Deletions: {len(names)} {self.repo.head}",
        )
        for name in names:
            await self.emptied(name)

    async def emptied(self, name: str, *, timeout_s: float = 400) -> None:
        """Nothing of a deployment is left: no route, no service, no job."""
        await self.reaches(f"{name} has no route", lambda r: not r.get(name), timeout_s=timeout_s)
        began = time.monotonic()
        while True:
            left = [n for n in await self.services() if name in n]
            held = [job for job in await self.jobs() if name in job.name]
            if not left and not held:
                break
            assert time.monotonic() - began < timeout_s, (left, held, self.log()[-3000:])
            await asyncio.sleep(1)
        self.say(f"{name} is in neither SkyPilot nor Slurm: {time.monotonic() - began:.0f} s")


@asynccontextmanager
async def lab_site(folder: Path, lab: Lab) -> AsyncIterator[LabSite]:
    async with EmbeddedValkey(folder / "valkey") as valkey:
        site = LabSite(folder, valkey.url, lab)
        try:
            yield site
        finally:
            await site.close()
            # A test that failed leaves its services; the next one wants the nodes.
            if left := list(await site.services()):
                await asyncio.to_thread(lab.run, "sky", "serve", "down", "--yes", *left)


@asynccontextmanager
async def routed_traffic(site: LabSite) -> AsyncIterator[Traffic]:
    """Clients of a router that serves from the site's table."""
    router = ready_process(
        *("router", "--port", 0, "--admin-port", 0, "--redis-url", site.redis_url),
        *("--routes-public-key", site.public_key(), "--state-dir", site.folder / "router"),
    )
    with router as url:
        async with traffic(url, KEY.text) as asking:
            yield asking
