"""`detoserve reconcile` as a process of its own, and what a test can see of its work from outside."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from reconciler.backends.local import reaper
from reconciler.backends.local.processes import PLACE_MARK, REPLICA_MARK, environ_of, mark_of
from reconciler.publish import signing_key
from reconciler.publish.redis_edge import connect
from reconciler.publish.status_yaml import parse_document
from schemas.wire import redis_keys
from schemas.wire.envelope import public_key_hex, unseal
from schemas.wire.routing import RoutingTable
from tests.config_text import cluster, deployment, tenant
from tests.e2e.up_process import DETOSERVE
from tests.engines import ENGINE, processes_of
from tests.git_repo import GitRepo
from tests.support import eventually

PLATFORM = """\
apiVersion: detoserve.ai/v1alpha1
kind: Platform
metadata: {name: main}
spec:
  intervals: {poll: 1s, resync: 5s, statusDebounce: 100ms}
"""


def engine_function(script: Path, name: str = "chat", *, replicas: int = 1, word: str = "") -> str:
    """A function on the tiny engine of tests.engines; another `word` is another spec."""
    if not script.exists():
        script.write_text(ENGINE)
    words = ", ".join(["python3", "-S", str(script), '"{port}"', *([word] if word else [])])
    return f"""\
apiVersion: detoserve.ai/v1alpha1
kind: Function
metadata: {{name: {name}}}
spec:
  model: {{uri: "sim://{name}"}}
  runtime: {{engine: custom, command: [{words}]}}
  scaling: {{minReplicas: {replicas}}}
  readiness: {{initialDelay: 20s, timeout: 2s, interval: 100ms}}
"""


def quick_deployment(name: str, *, function: str = "chat") -> str:
    return deployment(name, function=function, more="  rollout: {drainTimeout: 5s}\n")


class Site:
    """A config repo, a Valkey, and the reconcilers that a test starts over them."""

    def __init__(
        self, folder: Path, redis_url: str, *, owner: str, repo: GitRepo | None = None
    ) -> None:
        self.folder = folder
        self.redis_url = redis_url
        self.owner = owner
        self.script = folder / "engine.py"
        self.repo = repo or GitRepo(folder / "repo")
        self.redis: Redis = connect(redis_url)
        self.state_dirs: set[Path] = set()
        self._started: list[subprocess.Popen[bytes]] = []

    def first_commit(self) -> str:
        return self.repo.commit(
            {
                "platform.yaml": PLATFORM,
                "clusters/local.yaml": cluster("local"),
                "tenants/acme.yaml": tenant("acme"),
                "functions/chat.yaml": engine_function(self.script),
                "deployments/chat.yaml": quick_deployment("chat"),
            }
        )

    def start(
        self, name: str = "state", *args: str, repo: str | None = None, env: Mapping[str, str] = {}
    ) -> subprocess.Popen[bytes]:
        state = self.folder / name
        self.state_dirs.add(state)
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    *(DETOSERVE, "reconcile", repo or str(self.repo.path)),
                    *("--state-dir", str(state), "--owner", self.owner, *args),
                ],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={
                    **os.environ,
                    "HOME": str(home),
                    "GIT_CONFIG_NOSYSTEM": "1",
                    "DETOSERVE_REDIS_URL": self.redis_url,
                    **env,
                },
            )
        self._started.append(process)
        return process

    def log(self, name: str = "state") -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def engines(self, state: str = "state") -> dict[str, int]:
        """Replica -> pid of every engine of one state directory; none may be there twice."""
        found = []
        place = str((self.folder / state).resolve())
        for p in processes_of(self.owner):
            environ = environ_of(p.id.pid)
            if p.leads and REPLICA_MARK in environ and environ.get(PLACE_MARK) == place:
                found.append((environ[REPLICA_MARK], p.id.pid))
        twice = [replica for replica, n in Counter(r for r, _ in found).items() if n > 1]
        assert not twice, f"running twice: {twice}"
        return dict(found)

    async def table(self, state: str = "state") -> RoutingTable:
        key = signing_key.load_or_create(self.folder / state / "routes-signing-key.pem")
        envelope = await self.redis.get(redis_keys.ROUTES_CURRENT)
        assert envelope is not None
        return unseal(envelope, RoutingTable, key.public_key())

    def public_key(self, state: str = "state") -> str:
        key = signing_key.load_or_create(self.folder / state / "routes-signing-key.pem")
        return public_key_hex(key)

    async def routed(self) -> dict[str, set[str]]:
        """Deployment -> ready replicas, as routers are told."""
        arms = [arm for f in (await self.table()).functions for arm in f.arms]
        return {a.deployment: {r.id for r in a.replicas if r.state == "ready"} for a in arms}

    def status(self) -> dict[str, Any]:
        """Path -> document at the tip of the status branch."""
        names = self.repo.git("ls-tree", "-r", "--name-only", "detoserve/status").splitlines()
        return {
            name: parse_document(self.repo.git("show", f"detoserve/status:{name}").encode())
            for name in names
        }

    def summary(self) -> dict[str, Any]:
        text = self.repo.git("show", "detoserve/status:status/summary.yaml")
        summary: Any = parse_document(text.encode())
        return dict(summary)

    async def agreed(self, wanted: Mapping[str, int], *, timeout_s: float = 40) -> None:
        """Table and processes agree on `wanted`."""

        async def agreed() -> bool:
            await asyncio.sleep(0.1)
            routed = await self.routed()
            assert {name: len(ids) for name, ids in routed.items()} == wanted, routed
            assert {r for ids in routed.values() for r in ids} == self.engines().keys()
            return True

        await eventually(agreed, timeout_s=timeout_s, what="agreed")

    async def converged(self, wanted: Mapping[str, int], *, timeout_s: float = 40) -> None:
        """Status, table and processes agree on `wanted`, at the newest commit."""

        async def agreed() -> bool:
            await asyncio.sleep(0.1)  # each look costs some git processes
            assert self.summary()["revision"] == self.repo.head
            routed = await self.routed()
            assert {name: len(ids) for name, ids in routed.items()} == wanted, routed
            assert {r for ids in routed.values() for r in ids} == self.engines().keys()
            documents = self.status()
            told = {p.split("/")[-1][:-5] for p in documents if p.startswith("status/deployment/")}
            assert told == wanted.keys()
            for name, count in wanted.items():
                status = documents[f"status/deployment/{name}.yaml"]["status"]
                ready = {c["type"]: c["status"] for c in status["conditions"]}
                assert ready == {"Ready": "True"}, status
                assert status["replicas"] == {"wanted": count, "ready": count, "updated": count}
            return True

        await eventually(agreed, timeout_s=timeout_s, what="converged")

    async def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        for state in self.state_dirs:
            if state.is_dir():
                reaper.end_all(mark_of(self.owner, state), state, grace_s=0.5)
        await self.redis.aclose()

    def lease_story(self) -> Iterator[int]:
        """Lease generations of the status commits, newest first."""
        text = self.repo.git(
            "log", "--format=%(trailers:key=Detoserve-Lease,valueonly)", "detoserve/status"
        )
        return map(int, text.split())
