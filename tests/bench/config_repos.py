"""Config repos for benchmarks: a bare repository with one object a file, as large as asked."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

_HEAD = """\
# yaml-language-server: $schema=../.schemas/{schema}.json
# {comment}
apiVersion: detoserve.ai/v1alpha1
kind: {kind}
metadata:
  name: {name}
  labels:
    team: {team}
"""
_FUNCTION = """\
spec:
  model:
    uri: hf://example/{name}
    format: safetensors
    servedName: {name}
    aliases: [{name}-latest]
    tasks: [chat, completions]
  runtime:
    engine: simulated
    args:
      - --prefill-tokens-per-s=8000
      - --itl-s=0.02
    env:
      HF_HUB_OFFLINE: "1"
    maxModelLen: 32768
  scaling:
    minReplicas: 2
    maxReplicas: 8
  readiness:
    initialDelay: 30s
    timeout: 2s
    interval: 1s
"""
_TENANT = """\
spec:
  models: ["*"]
  keys:
    - id: {id}
      sha256: "{sha256}"
  limits:
    requestsPerMinute: 600
"""
_CLUSTER = """\
spec:
  provider:
    type: local
    maxProcesses: 1024
  region: eu
"""
_DEPLOYMENT = """\
spec:
  function: {function}
  tenants: [{tenant}]
  placement:
    cluster: {cluster}
  replicas: {replicas}
  rollout:
    strategy: rolling
    maxSurge: 1
    drainTimeout: 30s
"""


def deployment_file(number: int, count: int, *, replicas: int = 2) -> tuple[str, str]:
    """(path, text) of one of `count` deployments."""
    spec = _DEPLOYMENT.format(
        function=f"f{number % _functions(count)}",
        tenant=f"t{number % _tenants(count)}",
        cluster=f"c{number % 5}",
        replicas=replicas,
    )
    name = f"d{number:05}"
    return f"deployments/{name}.yaml", _head("Deployment", name) + spec


def files(count: int) -> Iterator[tuple[str, str]]:
    """(path, text) of a repo with `count` deployments: a function for every ten, a tenant for every
    hundred, five clusters."""
    platform = "spec:\n  intervals: {poll: 1h, resync: 1h}\n"
    yield "platform.yaml", _head("Platform", "main") + platform
    for number in range(5):
        yield f"clusters/c{number}.yaml", _head("Cluster", f"c{number}") + _CLUSTER
    for number in range(_tenants(count)):
        name = f"t{number}"
        text = _TENANT.format(id=f"k{number:09}", sha256=f"{number:064x}")
        yield f"tenants/{name}.yaml", _head("Tenant", name) + text
    for number in range(_functions(count)):
        name = f"f{number}"
        yield f"functions/{name}.yaml", _head("Function", name) + _FUNCTION.format(name=name)
    for number in range(count):
        yield deployment_file(number, count)


def make_bare(path: Path, content: Mapping[str, str]) -> Path:
    """A bare repository with one commit on main."""
    subprocess.run(["git", "init", "--quiet", "--bare", "-b", "main", str(path)], check=True)
    commit(path, content)
    return path


def commit(repo: Path, content: Mapping[str, str]) -> None:
    """Writes files into main of a bare repository, without a work tree."""
    known = subprocess.run(
        ["git", "-C", str(repo), "rev-parse", "--verify", "--quiet", "main"],
        check=False,
        capture_output=True,
    )
    stream = [b"commit refs/heads/main\ncommitter Ada <ada@example.org> 1700000000 +0000\n"]
    stream.append(b"data 4\nEdit\n")
    if parent := known.stdout.strip():
        stream.append(b"from " + parent + b"\n")
    for name, text in content.items():
        data = text.encode()
        stream.append(b"M 100644 inline %b\ndata %d\n%b\n" % (name.encode(), len(data), data))
    subprocess.run(
        ["git", "-C", str(repo), "fast-import", "--quiet"], input=b"".join(stream), check=True
    )


def _head(kind: str, name: str) -> str:
    return _HEAD.format(
        schema=kind.lower(), comment=f"{kind} {name} of a large config repo.", kind=kind,
        name=name, team=f"team-{len(name)}",
    )  # fmt: skip


def _functions(count: int) -> int:
    return max(1, count // 10)


def _tenants(count: int) -> int:
    return max(1, count // 100)
