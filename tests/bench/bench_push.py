"""From `git push` to the router serving the new table: `python tests/bench/bench_push.py`.

A bare repository on this machine, a clone that pushes, and `detoserve reconcile`, `detoserve-router`,
Valkey and an engine as processes of their own. Each push gives a function one more alias; a client
asks for /v1/models every millisecond over one connection until it is there. The engine is there all
along (provider `external`), except in the last figure: there each push brings a function with an
engine of its own, and it ends with that engine's first token.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from redis import Redis

from reconciler.publish.valkey import EmbeddedValkey
from schemas import api_keys
from schemas.wire import redis_keys
from schemas.wire.envelope import unseal
from schemas.wire.routing import RoutingTable
from tests import config_text
from tests.git_repo import GitRepo, git

PUSHES: Final = 50
ENGINE_STARTS: Final = 5
DEADLINE_S: Final = 30.0
LOADED: Final = re.compile(
    r"^(\S+ \S+) detoserve.reconciler INFO config ([0-9a-f]{12}):", re.MULTILINE
)


@contextlib.contextmanager
def process(
    *argv: str, stderr: Path
) -> Iterator[tuple[subprocess.Popen[str], Callable[[], Mapping[str, Any]]]]:
    """A program, ended with SIGTERM; the function reads its next line of JSON."""
    with (
        stderr.open("w") as errors,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True) as running,
    ):
        assert running.stdout is not None
        lines = running.stdout
        try:
            yield running, lambda: json.loads(lines.readline())
        finally:
            running.terminate()
            running.wait(20)


class Client:
    """One keep-alive connection to the router."""

    def __init__(self, url: str, key: str) -> None:
        place = urlsplit(url)
        self._connection = http.client.HTTPConnection(str(place.hostname), place.port)
        self._headers = {"Authorization": f"Bearer {key}"}

    def models(self) -> set[str]:
        self._connection.request("GET", "/v1/models", headers=self._headers)
        answer = json.load(self._connection.getresponse())
        return {model["id"] for model in answer.get("data", ())}

    def first_token(self, model: str) -> bool:
        """Whether a streamed completion began; what follows is read and dropped."""
        body = {"model": model, "prompt": "Once", "max_tokens": 1, "stream": True}
        headers = {**self._headers, "Content-Type": "application/json"}
        self._connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = self._connection.getresponse()
        begun = answer.status == 200 and answer.readline().startswith(b"data: {")
        answer.read()
        return begun


def until(probe: Callable[[], bool], *, pause_s: float = 0.001) -> float:
    """When it became true, in Unix seconds."""
    deadline = time.monotonic() + DEADLINE_S
    while not probe():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing within {DEADLINE_S:g} s; see the reconciler's log")
        time.sleep(pause_s)
    return time.time()


class Bench:
    """A clone that pushes, and everything that can be seen of the way from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.log = folder / "reconciler.log"
        self.key = api_keys.create()
        self.clone = GitRepo(folder / "clone")
        self.bare = folder / "config.git"

    def start_files(self, engine_url: str) -> dict[str, str | bytes | None]:
        key = f'  keys: [{{id: {self.key.id}, sha256: "{self.key.sha256}"}}]\n'
        elsewhere = f"type: external, endpoints: [{{url: '{engine_url}', function: chat}}]"
        # Nothing but the watch may tell of a push.
        intervals = "  intervals: {poll: 1h, resync: 1h}\n"
        platform = config_text.HEAD.format(kind="Platform", name="main") + intervals
        return {
            "platform.yaml": platform,
            "tenants/acme.yaml": config_text.tenant(more=key),
            "clusters/here.yaml": config_text.cluster("here"),
            "clusters/elsewhere.yaml": config_text.cluster("elsewhere", provider=elsewhere),
            "functions/chat.yaml": config_text.function(),
            "deployments/chat.yaml": config_text.deployment(placement="cluster: elsewhere"),
        }

    def push(
        self, files: Mapping[str, str | bytes | None], message: str
    ) -> tuple[str, float, float]:
        """(revision, just before the push, when it returned)."""
        revision = self.clone.commit(files, message)
        before = time.time()
        git(self.clone.path, "push", "--quiet", str(self.bare), "main")
        return revision, before, time.time()

    def alias(self, number: int, client: Client, tables: Callable[[], RoutingTable]) -> list[float]:
        """Moments of one push: before, ref moved, fetching, fetched, loaded, publishing, served;
        and last, when the push returned."""
        name = f"chat-{number}"
        function = config_text.function(model=f"aliases: [{name}]")
        revision, before, returned = self.push({"functions/chat.yaml": function}, name)
        served = until(lambda: name in client.models())
        table = tables()
        assert table.revision == revision
        moments = [
            before,
            self.touched(self.bare / "refs/heads/main"),
            self.touched(self.state / "config.git.lock"),
            self.touched(self.state / "config.git/refs/detoserve/fetched"),
            self.loaded(revision),
            table.published_at,
            served,
            returned,
        ]
        # The next push begins when everything that this one set off is over.
        until(lambda: not self.status_behind(revision), pause_s=0.05)
        return moments

    def status_behind(self, revision: str) -> bool:
        told = subprocess.run(
            ["git", "-C", str(self.bare), "log", "-1", "--format=%B", "detoserve/status"],
            check=False,
            capture_output=True,
            text=True,
        )
        return revision not in told.stdout

    @staticmethod
    def touched(path: Path) -> float:
        return path.stat().st_mtime

    def loaded(self, revision: str) -> float:
        for when, short in LOADED.findall(self.log.read_text()):
            if revision.startswith(short):
                return datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()
        raise AssertionError(f"the reconciler's log does not tell of {revision}")

    def engine(self, number: int, client: Client) -> float:
        """Seconds from a push to the first token of the engine that it asks for."""
        name = f"new-{number}"
        files: dict[str, str | bytes | None] = {
            f"functions/{name}.yaml": config_text.function(
                name, more="  readiness: {interval: 1s}\n"
            ),
            f"deployments/{name}.yaml": config_text.deployment(
                name,
                function=name,
                placement="cluster: here",
                more="  rollout: {drainTimeout: 0s}\n",
            ),
        }
        _, before, _ = self.push(files, name)
        begun = until(lambda: client.first_token(name), pause_s=0.005)
        self.push(dict.fromkeys(files), f"remove {name}")
        until(lambda: not self.engines(), pause_s=0.1)
        return begun - before

    def engines(self) -> list[psutil.Process]:
        """Those that the reconciler started: they would outlive it."""
        found = []
        for one in psutil.process_iter(["cmdline", "environ"]):
            words = [*(one.info["cmdline"] or ()), *(one.info["environ"] or {}).values()]
            if "agent.simulated" in words and any(str(self.state) in word for word in words):
                found.append(one)
        return found


def show(moments: list[list[float]], starts: list[float]) -> None:
    stages = ["git push until the ref moves", "notice", "fetch", "load", "compile, observe, plan"]
    stages += ["publish, and the router serves it"]

    def row(name: str, seconds: list[float]) -> None:
        p99 = statistics.quantiles(seconds, n=100, method="inclusive")[98]
        cells = [f"{1000 * cell:.0f}" for cell in (statistics.median(seconds), p99, max(seconds))]
        if len(seconds) < PUSHES:
            cells[1] = ""  # too few to tell
        print(f"| {name} | {' | '.join(cells)} |")

    print(f"| {len(moments)} pushes, ms | median | p99 | max |\n|---|--:|--:|--:|")
    row("**from before `git push` to the router serving it**", [m[6] - m[0] for m in moments])
    row("from when `git push` returned", [m[6] - m[7] for m in moments])
    for number, stage in enumerate(stages):
        row(f"- {stage}", [m[number + 1] - m[number] for m in moments])
    row(f"push of a new function until its engine's first token ({len(starts)} pushes)", starts)


def measure(bench: Bench, redis_url: str) -> None:
    command = Path(sys.executable).parent
    errors = bench.folder / "stderr.txt"
    python = [sys.executable, "-m", "agent.simulated", "--port", "0", "--served-model-name", "chat"]
    with process(*python, stderr=errors) as (_, engine_line):
        bench.clone.commit(bench.start_files(engine_line()["url"]))
        bench.clone.bare_clone(bench.bare)
        reconcile = ["reconcile", str(bench.bare), "--redis-url", redis_url]
        reconcile += ["--state-dir", str(bench.state)]
        with process(str(command / "detoserve"), *reconcile, stderr=bench.log) as (_, line):
            public_key = line()["routes_public_key"]
            router = ["--redis-url", redis_url, "--routes-public-key", public_key]
            router += ["--port", "0", "--admin-port", "0"]
            with process(str(command / "detoserve-router"), *router, stderr=errors) as (_, ready):
                client = Client(ready()["url"], bench.key.text)
                redis = Redis.from_url(redis_url)
                key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))

                def table() -> RoutingTable:
                    return unseal(redis.get(redis_keys.ROUTES_CURRENT), RoutingTable, key)

                until(lambda: "chat" in client.models())
                until(lambda: client.first_token("chat"))
                moments = [bench.alias(number, client, table) for number in range(PUSHES)]
                starts = [bench.engine(number, client) for number in range(ENGINE_STARTS)]
                redis.close()
    show(moments, starts)


async def main() -> None:
    os.environ.pop("GIT_DIR", None)
    with tempfile.TemporaryDirectory() as name:
        async with EmbeddedValkey(Path(name) / "valkey") as valkey:
            await asyncio.to_thread(measure, Bench(Path(name)), valkey.url)


if __name__ == "__main__":
    asyncio.run(main())
