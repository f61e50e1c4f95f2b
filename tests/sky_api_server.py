"""SkyPilot's API server as far as the skypilot backend speaks with it: its REST API, with state.

Written after SkyPilot 0.14.1 (its source, and runs against it): requests by id, errors beside pickles,
`up` on an existing name failing *and* starting a second controller, `down` of nothing being fine,
replicas kept over an update that changes `service:` alone. Time passes only in `step`.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import io
import json
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from ruamel.yaml import YAML

READING = ("status", "optimize", "clusters", "list_accelerators", "v2")
STARTING = ("PENDING", "PROVISIONING", "STARTING", "READY")
ENDED = (
    "SHUTTING_DOWN",
    "PREEMPTED",
    "UNKNOWN",
    "FAILED",
    "FAILED_CLEANUP",
    "FAILED_INITIAL_DELAY",
    "FAILED_PROBING",
    "FAILED_PROVISION",
)


@dataclass
class FakeReplica:
    id: int
    version: int
    endpoint: str
    status: str = "PENDING"

    def row(self) -> dict[str, Any]:
        known = self.status not in ("PENDING", "PREEMPTED")
        return {
            "replica_id": self.id,
            "name": f"replica-{self.id}",
            "status": self.status,
            "version": self.version,
            "replica_info_version": 3,
            "endpoint": self.endpoint if known else None,
            "is_spot": False,
            "launched_at": 1,
            # Two kilobytes of pickle stand here in truth.
            "handle": "gASV" + "A" * 2000,
        }


@dataclass
class FakeService:
    name: str
    tasks: dict[int, dict[str, Any]]
    """By version."""
    hash: str = field(default_factory=lambda: str(uuid.uuid4()))
    status: str = ""
    """Where it does not follow from the replicas."""
    replicas: list[FakeReplica] = field(default_factory=list)
    born: int = 0
    mode: str = "rolling"
    answering: bool = True
    ever_ready: int = 0
    """The newest version of which a replica was ready."""
    controllers: int = 1
    user: str = ""
    numbered: bool = False
    """A next version has its number, and no task yet: an update passes through that for seconds."""
    yaml: dict[int, str] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return max(self.tasks)

    @property
    def wanted(self) -> int:
        service = self.tasks[self.version]["service"]
        policy = service.get("replica_policy") or {}
        return int(policy.get("min_replicas", service.get("replicas", 1)))

    def shown_status(self) -> str:
        if self.status:
            return self.status
        statuses = [r.status for r in self.replicas]
        if "READY" in statuses:
            return "READY"
        if any(s.startswith("FAILED") or s == "UNKNOWN" for s in statuses):
            return "FAILED"
        return "REPLICA_INIT" if statuses else "NO_REPLICA"

    def yaml_content(self) -> str:
        version = self.version
        if version not in self.yaml:
            out = io.StringIO()
            whole = {**self.tasks[version], "num_nodes": 1, "file_mounts": {}, "volumes": {}}
            whole["_user_specified_yaml"] = json.dumps(self.tasks[version])
            writer = YAML(typ="safe", pure=False)
            writer.default_flow_style = False
            writer.dump(whole, out)
            self.yaml[version] = out.getvalue()
        return self.yaml[version]


@dataclass
class FakeRequest:
    id: str
    name: str
    user: str
    done: asyncio.Event = field(default_factory=asyncio.Event)
    value: Any = None
    error: tuple[str, str] | None = None


class SkyApiServer:
    """`url` once it runs. `latency_s`: how long a request takes. `held`: none finishes while set."""

    def __init__(self, endpoint: Callable[[str, int], str] | None = None) -> None:
        self.url = ""
        self.latency_s = 0.0
        self.held = asyncio.Event()
        self.held.set()
        self.hung = asyncio.Event()
        """Cleared: connections are taken, and nothing is answered."""
        self.hung.set()
        self.services: dict[str, FakeService] = {}
        self.requests: dict[str, FakeRequest] = {}
        self.posts: list[tuple[str, dict[str, Any]]] = []
        """Every POST taken on, in order: path and body."""
        self.headers: list[dict[str, str]] = []
        self.refuse: dict[str, tuple[str, str]] = {}
        """Verb or service name -> (kind, message) of the error its requests end with."""
        self.clusters: list[str] = []
        self.token: str | None = None
        self.down: bool = False
        """Connections are closed without an answer."""
        self.swallow_answers: bool = False
        """POSTs are taken on, and their answers lost."""
        self.api_version = "62"
        self.jobs: list[dict[str, Any]] = []
        """Rows of managed jobs, as the queue shows them."""
        self.instance_types: list[list[Any]] = []
        """As SkyPilot's InstanceTypeInfo: cloud, type, GPU, GPUs, ..., price, spot price, region."""
        self._endpoint = endpoint or (lambda name, replica: f"http://10.0.0.{replica}:8000")
        self._tasks: set[asyncio.Task[None]] = set()

    def count(self, path: str) -> int:
        return sum(p == path for p, _ in self.posts)

    def last(self, path: str) -> dict[str, Any]:
        """The newest body posted there."""
        return next(body for p, body in reversed(self.posts) if p == path)

    def forget(self) -> None:
        """As a server whose database is gone: no request is known any more, and none will be run."""
        for task in self._tasks:
            task.cancel()
        self.requests.clear()

    def step(self) -> None:
        """Every replica one state further; then what the controllers do about it."""
        for service in list(self.services.values()):
            if service.status == "SHUTTING_DOWN":
                del self.services[service.name]
                continue
            if service.status:
                continue
            service.replicas = [
                r for r in service.replicas if r.status not in ("SHUTTING_DOWN", "PREEMPTED")
            ]
            for replica in service.replicas:
                if replica.status in STARTING[:-1]:
                    replica.status = STARTING[STARTING.index(replica.status) + 1]
            self._control(service)

    def _control(self, service: FakeService) -> None:
        live = [r for r in service.replicas if r.status not in ENDED]
        newest = [r for r in live if r.version == service.version]
        if any(r.status == "READY" for r in newest):
            service.ever_ready = service.version
        hopeless = any(
            r.version == service.version and r.status in ("FAILED", "FAILED_INITIAL_DELAY")
            for r in service.replicas
        )
        if hopeless and service.ever_ready < service.version:
            return
        for _ in range(service.wanted - len(newest)):
            service.born += 1
            endpoint = self._endpoint(service.name, service.born)
            service.replicas.append(FakeReplica(service.born, service.version, endpoint))
        order = ("PENDING", "PROVISIONING", "STARTING", "NOT_READY", "READY")
        for extra in sorted(newest, key=lambda r: (order.index(r.status), -r.id))[
            : max(0, len(newest) - service.wanted)
        ]:
            extra.status = "SHUTTING_DOWN"
        ready = sum(r.status == "READY" for r in newest)
        old = [r for r in live if r.version < service.version]
        keep = service.wanted if service.mode == "blue_green" else service.wanted - ready
        if ready >= service.wanted:
            keep = 0
        for replica in sorted(old, key=lambda r: order.index(r.status))[: len(old) - keep]:
            replica.status = "SHUTTING_DOWN"

    def rows(self, names: list[str] | None) -> list[dict[str, Any]]:
        return [
            {
                "name": s.name,
                "controller_job_id": 1,
                "controller_port": 20001,
                "load_balancer_port": 30001,
                "status": s.shown_status(),
                "uptime": 1,
                "policy": "Fixed-size",
                "version": s.version + s.numbered,
                "active_versions": [s.version],
                "requested_resources_str": "1x",
                "load_balancing_policy": "least_load",
                "tls_encrypted": False,
                "pool": False,
                "controller_pid": 1,
                "controller_ip": None,
                "hash": s.hash,
                "entrypoint": "",
                "user_hash": s.user,
                "yaml_content": None if s.numbered else s.yaml_content(),
                "pool_yaml": "",
                "target_num_replicas": s.wanted if s.answering else None,
                "replica_info": [r.row() for r in s.replicas],
                "endpoint": "http://localhost:30001",
                "user_name": "detoserve",
            }
            for s in self.services.values()
            if names is None or s.name in names
        ]

    # What requests do when their turn comes.

    def _up(self, body: dict[str, Any], user: str) -> Any:
        name = body["service_name"]
        if name in self.services:
            self.services[name].controllers += 1
            raise _Failed("RuntimeError", "Failed to wait for service initialization. Please check")
        self.services[name] = service = FakeService(name, {1: _task(body)}, user=user)
        self._control(service)
        return [name, "http://localhost:30001"]

    def _update(self, body: dict[str, Any], user: str) -> None:
        service = self.services.get(body["service_name"])
        if service is None:
            raise _Failed("RuntimeError", f"Cannot find service {body['service_name']!r}.")
        if service.status in ("CONTROLLER_FAILED", "CONTROLLER_INIT"):
            raise _Failed("RuntimeError", f"Service {service.name!r} has a failed controller")
        new, version = _task(body), service.version + 1
        for replica in service.replicas:
            if replica.status not in ENDED and _runs_alike(service.tasks[replica.version], new):
                replica.version = version
        service.tasks[version] = new
        service.mode = body["mode"]
        self._control(service)

    def _down(self, body: dict[str, Any], user: str) -> None:
        for name in body["service_names"]:
            if name in self.services:
                self.services[name].status = "SHUTTING_DOWN"
                for replica in self.services[name].replicas:
                    replica.status = "SHUTTING_DOWN"

    def _optimize(self, body: dict[str, Any], user: str) -> None:
        assert YAML(typ="safe").load(body["dag"])["resources"]

    def _launch(self, body: dict[str, Any], user: str) -> Any:
        self.jobs.append(
            {"job_id": len(self.jobs) + 1, "job_name": body["name"], "status": "PENDING"}
        )
        return [len(self.jobs), None]

    def _queue(self, body: dict[str, Any], user: str) -> Any:
        if not self.jobs:
            raise _Failed("ClusterNotUpError", "No in-progress managed jobs.")
        return {"jobs": self.jobs, "total": len(self.jobs)}

    def _cancel_jobs(self, body: dict[str, Any], user: str) -> None:
        for job in self.jobs:
            if job["job_id"] in body["job_ids"]:
                job["status"] = "CANCELLING"

    def _list_accelerators(self, body: dict[str, Any], user: str) -> Any:
        found: dict[str, list[Any]] = {}
        for row in self.instance_types:
            matches = re.search(body["name_filter"], row[2], re.IGNORECASE)
            if matches and row[0].lower() in body["clouds"]:
                found.setdefault(row[2], []).append(row)
        return found

    def _status(self, body: dict[str, Any], user: str) -> Any:
        return self.rows(body["service_names"])

    async def _post(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.posts.append((request.path, body))
        await self._gate(request)
        if request.path == "/api/cancel":
            return web.json_response(None, headers={"X-Skypilot-Request-ID": str(uuid.uuid4())})
        verb = "clusters" if request.path == "/status" else request.path.rpartition("/")[2]
        user = body.get("env_vars", {}).get("SKYPILOT_USER_ID", "")
        made = FakeRequest(str(uuid.uuid4()), f"sky.serve.{verb}", user)
        self.requests[made.id] = made
        task = asyncio.create_task(self._run(made, verb, copy.deepcopy(body)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.swallow_answers and verb not in READING:
            _hang_up(request)
        return web.json_response(None, headers={"X-Skypilot-Request-ID": made.id})

    async def _run(self, request: FakeRequest, verb: str, body: dict[str, Any]) -> None:
        if verb not in READING:
            await asyncio.sleep(self.latency_s)
            await self.held.wait()
        refused = self.refuse.get(verb) or self.refuse.get(body.get("service_name", ""))
        act: dict[str, Any] = {
            "clusters": lambda *_: [{"name": name, "status": "STOPPED"} for name in self.clusters],
            "optimize": self._optimize,
            "up": self._up,
            "update": self._update,
            "down": self._down,
            "status": self._status,
            "list_accelerators": self._list_accelerators,
            "launch": self._launch,
            "v2": self._queue,
            "cancel": self._cancel_jobs,
        }
        try:
            if refused is None:
                request.value = act[verb](body, request.user)
            else:
                request.error = refused
        except _Failed as error:
            request.error = (error.kind, str(error))
        request.done.set()

    async def _get(self, request: web.Request) -> web.StreamResponse:
        await self._gate(request)
        found = self.requests.get(request.query["request_id"])
        if found is None:
            return web.json_response({"detail": "not found"}, status=404)
        await found.done.wait()
        payload = {
            "request_id": found.id,
            "name": found.name,
            "return_value": "null",
            "error": "null",
        }
        if found.error is None:
            return web.json_response({**payload, "return_value": json.dumps(found.value)})
        kind, message = found.error
        error = json.dumps({"type": kind, "message": message, "object": "gASVpickle"})
        return web.json_response({"detail": {**payload, "error": error}}, status=500)

    async def _active(self, request: web.Request) -> web.StreamResponse:
        await self._gate(request)
        active = [r for r in self.requests.values() if not r.done.is_set()]
        return web.json_response(
            [{"request_id": r.id, "name": r.name, "user_id": r.user} for r in active]
        )

    async def _health(self, request: web.Request) -> web.StreamResponse:
        await self._gate(request)
        return web.json_response({"status": "healthy", "api_version": self.api_version})

    async def _gate(self, request: web.Request) -> None:
        self.headers.append(dict(request.headers))
        await self.hung.wait()
        if self.down:
            _hang_up(request)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            raise web.HTTPUnauthorized

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[SkyApiServer]:
        app = web.Application(client_max_size=1024**3)
        for path in (
            "/serve/up",
            "/serve/update",
            "/serve/down",
            "/serve/status",
            "/api/cancel",
            "/optimize",
            "/status",
            "/list_accelerators",
            "/jobs/launch",
            "/jobs/queue/v2",
            "/jobs/cancel",
        ):
            app.router.add_post(path, self._post)
        app.router.add_get("/api/get", self._get)
        app.router.add_get("/api/status", self._active)
        app.router.add_get("/api/health", self._health)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            for task in self._tasks:
                task.cancel()
            await runner.cleanup()


class _Failed(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _task(body: dict[str, Any]) -> dict[str, Any]:
    task = YAML(typ="safe").load(body["task"])
    assert isinstance(task, dict)
    return task


def _runs_alike(old: dict[str, Any], new: dict[str, Any]) -> bool:
    def rest(task: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in task.items() if k != "service"}

    return rest(old) == rest(new)


def _hang_up(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()
    raise ConnectionResetError


async def main() -> None:
    """As a process of its own: prints its URL, and steps by itself; until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--step-s", type=float, default=0.2)
    asked = parser.parse_args()
    async with SkyApiServer().running(asked.port) as server:
        print(server.url, flush=True)
        while True:
            await asyncio.sleep(asked.step_s)
            server.step()


if __name__ == "__main__":
    asyncio.run(main())
