"""Workloads for backend tests, and a tiny engine on the standard library to run in them.

The engine serves /health, /pid, and /stream (a chunk every 20 ms until /finish is called or SIGUSR1 comes).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from reconciler.backends.local.processes import Running, all_running, environ_of
from reconciler.core.workload import Template, Workload
from schemas.cluster import ExternalEndpoint, ExternalProvider, LocalProvider, Provider
from schemas.deployment import Rollout
from schemas.function import Model, Readiness, Resources, Runtime

ENGINE = """
import os, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, behaviour = int(sys.argv[1]), sys.argv[2:]
print("engine starts with", *behaviour, flush=True)
if "secret" in behaviour:
    print("the token is", os.environ.get("TOKEN"), flush=True)
if "die" in behaviour:
    print("no such weights", flush=True)
    sys.exit(3)
if "chatty" in behaviour:
    for _ in range(400):
        print("x" * 4095, flush=True)
if "child" in behaviour:
    import subprocess
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if "late" in behaviour:
    time.sleep(600)

state = {"healthy": "sick" not in behaviour, "streams": 0, "finish": False}

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_):
        pass
    def do_GET(self):
        if self.path == "/stream":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            state["streams"] += 1
            while not state["finish"]:
                self.wfile.write(b"1\\r\\n.\\r\\n")
                time.sleep(0.02)
            self.wfile.write(b"3\\r\\nend\\r\\n0\\r\\n\\r\\n")
            state["streams"] -= 1
            return
        if self.path == "/finish":
            state["finish"] = True
        if self.path in ("/sick", "/heal"):
            state["healthy"] = self.path == "/heal"
        body = str(os.getpid()).encode()
        self.send_response(503 if self.path == "/health" and not state["healthy"] else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

class Server(ThreadingHTTPServer):
    allow_reuse_address = False
    daemon_threads = False
    block_on_close = True

server = Server(("127.0.0.1", port), Handler)
def stop(*_):
    threading.Thread(target=server.shutdown).start()
if "stubborn" in behaviour:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, lambda *_: state.update(finish=True))
server.serve_forever(poll_interval=0.02)
server.socket.close()
while state["streams"]:
    time.sleep(0.01)
"""

READINESS = Readiness.model_validate(
    {"initialDelay": "10s", "timeout": "2s", "interval": "100ms", "failureThreshold": 2}
)


def template(
    script: Path, *behaviour: str, readiness: Readiness = READINESS, **runtime: Any
) -> Template:
    """A custom engine that runs the script above."""
    if not script.exists():
        script.write_text(ENGINE)
    command = [sys.executable, "-S", str(script), "{port}", *behaviour]
    return Template(
        model=Model.model_validate({"uri": "sim://test"}),
        served_name="test",
        runtime=Runtime.model_validate({"engine": "custom", "command": command, **runtime}),
        resources=Resources(),
        readiness=readiness,
    )


def local_workload(
    script: Path,
    *behaviour: str,
    name: str = "chat--here",
    replicas: int = 1,
    max_processes: int = 64,
    spec: str | None = None,
    rollout: dict[str, Any] | None = None,
    readiness: Readiness = READINESS,
    **runtime: Any,
) -> Workload:
    """`spec` names the template's digest; by default its behaviour does."""
    return Workload(
        name=name,
        deployment=name.partition("--")[0],
        function="test",
        cluster="here",
        backend="local",
        provider=LocalProvider.model_validate({"type": "local", "maxProcesses": max_processes}),
        template=template(script, *behaviour, readiness=readiness, **runtime),
        spec_digest=spec or ("-".join(behaviour) or "plain"),
        replicas=replicas,
        rollout=Rollout.model_validate({"drainTimeout": "10s", **(rollout or {})}),
    )


def external_workload(
    urls: list[str], *, name: str = "chat--there", replicas: int = 1, spec: str = "plain"
) -> Workload:
    endpoints = [ExternalEndpoint(url=url, function="test") for url in urls]
    return Workload(
        name=name,
        deployment=name.partition("--")[0],
        function="test",
        cluster="there",
        backend="external",
        provider=ExternalProvider.model_validate(
            {"type": "external", "endpoints": [{"url": "http://127.0.0.1:1", "function": "test"}]}
        ),
        template=replace(template(Path("/dev/null")), endpoints=tuple(endpoints)),
        spec_digest=spec,
        replicas=replicas,
        rollout=Rollout.model_validate({"drainTimeout": "10s"}),
    )


def sky_workload(
    *,
    name: str = "chat--gpus",
    replicas: int = 1,
    spec: str = "one",
    provider: dict[str, Any] | None = None,
    rollout: dict[str, Any] | None = None,
    **runtime: Any,
) -> Workload:
    """A custom engine on a Slurm cluster, through SkyPilot. `spec` is the template's digest."""
    where = provider or {"type": "slurm", "cluster": "lab"}
    command = {"engine": "custom", "command": ["serve", "--port", "{port}", spec]}
    return Workload(
        name=name,
        deployment=name.partition("--")[0],
        function="test",
        cluster="gpus",
        backend="skypilot",
        provider=TypeAdapter[Provider](Provider).validate_python(where),
        template=Template(
            model=Model.model_validate({"uri": "sim://test"}),
            served_name="test",
            runtime=Runtime.model_validate({**command, **runtime}),
            resources=Resources(),
            readiness=READINESS,
        ),
        spec_digest=spec,
        replicas=replicas,
        rollout=Rollout.model_validate({"drainTimeout": "10s", **(rollout or {})}),
    )


def processes_of(owner: str) -> list[Running]:
    """Every live process, log writers included, that carries an owner's mark."""
    return [p for p in all_running() if environ_of(p.id.pid).get("DETOSERVE_OWNER") == owner]


def engines_of(owner: str) -> dict[str, int]:
    """Replica id -> pid of every live engine of an owner."""
    return {
        environ_of(p.id.pid)["DETOSERVE_REPLICA"]: p.id.pid
        for p in processes_of(owner)
        if p.leads and "DETOSERVE_REPLICA" in environ_of(p.id.pid)
    }
