"""What is shown of workloads and of the routing table."""

from __future__ import annotations

import shlex

from ruamel.yaml import YAML

from reconciler.cli.render import routes_data, workload_data
from reconciler.cli.yaml_text import yaml_text
from reconciler.core.compile import compile_workloads
from reconciler.core.routes import compile_routes
from tests.unit.cli.config_repo import BASE, effective_of

SECRET = BASE.replace(
    "args: [--a=1, --b=2]",
    "env: {MODE: fast}, secrets: {HF_TOKEN: {fromEnv: TOKEN}}, args: ['--note=a b', '--p={port}']",
)


def data_of(text: str, workload: str) -> dict[str, object]:
    return workload_data(compile_workloads(effective_of(text)).workloads[workload], python="python")


def test_local_shows_the_very_command() -> None:
    data = data_of(SECRET, "chat--here")
    argv = data["argv"]
    assert isinstance(argv, list)
    assert argv[:3] == ["python", "-m", "agent.simulated"]
    assert argv[-2:] == ["--note=a b", "--p=8000"]
    assert shlex.split(str(data["command"])) == argv
    assert data["env"] == {"MODE": "fast"}
    assert data["secrets"] == {"HF_TOKEN": {"fromEnv": "TOKEN"}}
    assert data["probe"] == {
        "path": "/health",
        "initialDelay": "20m",
        "timeout": "15s",
        "interval": "10s",
        "failureThreshold": 3,
    }


def test_local_says_what_cannot_be_run() -> None:
    data = data_of(BASE.replace("cluster: west", "cluster: here"), "big--here")
    assert data["argv"][:3] == ["vllm", "serve", "org/big"]  # type: ignore[index]
    dynamo = BASE.replace("cluster: west", "cluster: here").replace(
        "engine: vllm", "engine: triton"
    )
    stalled = data_of(dynamo, "big--here")["stalled"]
    assert "engine triton is not started as a process" in str(stalled)


def test_external_shows_its_endpoints() -> None:
    external = BASE.replace(
        "{type: local}", "{type: external, endpoints: [{url: 'http://e:1', function: chat}]}"
    )
    data = data_of(external, "chat--here")
    assert data["backend"] == "external"
    assert data["endpoints"] == ["http://e:1"]


def test_skypilot_shows_the_very_task_and_no_value_of_a_secret() -> None:
    secret = BASE.replace(
        "engine: vllm,", "engine: vllm, secrets: {HF_TOKEN: {fromFile: /run/token}},"
    )
    data = data_of(secret, "big--west")
    task = data["task"]
    assert isinstance(task, dict)
    assert task["resources"]["infra"] == "k8s/west"
    assert task["service"]["replicas"] == 2
    assert task["secrets"] == {"HF_TOKEN": None}
    assert data["secrets"] == {"HF_TOKEN": {"fromFile": "/run/token"}}
    text = yaml_text([data])
    assert "  run: |\n    exec vllm serve org/big \\\n" in text, "as a script, not as escapes"
    assert YAML(typ="safe").load(text) == data


def test_skypilot_says_what_cannot_be_run() -> None:
    data = data_of(BASE.replace("engine: vllm", "engine: triton"), "big--west")
    assert "give runtime.version" in str(data["stalled"])


def test_routes_hold_hashes_in_hex_and_no_replicas() -> None:
    wanted = effective_of(BASE)
    table = compile_routes(wanted.objects, compile_workloads(wanted), (), None, revision="rev")
    data = routes_data(table)
    assert data["revision"] == "rev"
    assert "generation" not in data
    assert data["tenants"][0]["keys"][0]["sha256"] == "a" * 64
    assert data["functions"][1]["arms"] == [{"deployment": "chat", "cluster": "here"}]
