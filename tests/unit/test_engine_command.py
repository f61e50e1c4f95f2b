"""Argv and environment of each engine, and what is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reconciler.core.engine_command import Place, engine_argv, engine_environ
from reconciler.core.workload import Template
from reconciler.errors import Stalled
from router.settings import Settings
from schemas.function import Model, Readiness, Resources, Runtime

HERE = Place(host="127.0.0.1", port=8123, replica="chat--here-1", python="/venv/bin/python")


def template(engine: str, uri: str = "hf://org/name", **runtime: Any) -> Template:
    model = {"uri": uri, **runtime.pop("model", {})}
    return Template(
        model=Model.model_validate(model),
        served_name="chat",
        runtime=Runtime.model_validate({"engine": engine, **runtime}),
        resources=Resources(),
        readiness=Readiness(),
    )


def argv(engine: str, uri: str = "hf://org/name", **runtime: Any) -> str:
    return " ".join(engine_argv(template(engine, uri, **runtime), HERE))


def test_the_simulated_engine_runs_with_our_own_python() -> None:
    assert argv("simulated", "sim://chat", args=["--itl-s=0.02"]) == (
        "/venv/bin/python -m agent.simulated --host 127.0.0.1 --port 8123 "
        "--served-model-name chat --kv-events-endpoint tcp://127.0.0.1:* "
        "--kv-events-replay-endpoint tcp://127.0.0.1:* --itl-s=0.02"
    )
    assert argv("simulated", "sim://chat", maxModelLen=4096, prefixCaching=False).endswith(
        "--max-model-len 4096 --no-enable-prefix-caching"
    )


def test_vllm() -> None:
    assert argv("vllm") == (
        "vllm serve org/name --host 127.0.0.1 --port 8123 --served-model-name chat "
        "--tensor-parallel-size 1 --enable-prefix-caching --enable-prompt-tokens-details "
        '--kv-events-config {"enable_kv_cache_events": true, "publisher": "zmq", '
        '"endpoint": "ipc://@detoserve-chat--here-1-8123-events", '
        '"replay_endpoint": "ipc://@detoserve-chat--here-1-8123-replay"}'
    )
    assert argv(
        "vllm",
        "hf://org/name@abc",
        tensorParallel=4,
        pipelineParallel=2,
        maxModelLen=8192,
        prefixCaching=False,
        args=["--enforce-eager"],
        model={"quantization": "fp8"},
    ) == (
        "vllm serve org/name --host 127.0.0.1 --port 8123 --served-model-name chat "
        "--tensor-parallel-size 4 --pipeline-parallel-size 2 --max-model-len 8192 "
        "--quantization fp8 --revision abc --no-enable-prefix-caching "
        "--enable-prompt-tokens-details --enforce-eager"
    )


@pytest.mark.parametrize(
    "own", [["--kv-events-config", "{}"], ["--data-parallel-size=2"], ["--kv-events-config={}"]]
)
def test_what_the_function_says_of_events_stands_alone(own: list[str]) -> None:
    assert argv("vllm", args=own).count("kv-events-config") == "".join(own).count("kv-events")
    assert "ipc://" not in argv("vllm", args=own)


def test_sglang() -> None:
    assert argv("sglang", "/models/m", tensorParallel=2, maxModelLen=8192, prefixCaching=False) == (
        "python3 -m sglang.launch_server --model-path /models/m --host 127.0.0.1 --port 8123 "
        "--served-model-name chat --tp-size 2 --context-length 8192 --disable-radix-cache "
        "--enable-metrics --enable-cache-report"
    )


def test_a_command_replaces_any_engines_own_and_braces_of_json_stay() -> None:
    command = ["serve", "{model}", "--bind={host}:{port}", '{"a": {"b": 1}}']
    for engine in ("custom", "vllm", "triton"):
        assert engine_argv(template(engine, command=command, args=["{replica}"]), HERE) == [
            *("serve", "org/name", "--bind=127.0.0.1:8123", '{"a": {"b": 1}}', "chat--here-1")
        ]


@pytest.mark.parametrize("engine", ["triton", "dynamo", "llm-d"])
def test_engines_that_need_more_than_a_process_say_so(engine: str) -> None:
    with pytest.raises(Stalled, match=rf"{engine} is not started .* give runtime.command"):
        argv(engine)


@pytest.mark.parametrize("uri", ["sim://chat", "oci://registry/model:1"])
def test_a_model_that_an_engine_cannot_load_is_refused(uri: str) -> None:
    with pytest.raises(Stalled, match=uri):
        argv("vllm", uri)


def test_an_empty_program_is_refused() -> None:
    with pytest.raises(Stalled, match="name a program"):
        argv("custom", command=["", "x"])


def test_the_environment_is_inherited_but_for_what_is_ours() -> None:
    inherited = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "0",
        "DETOSERVE_REDIS_URL": "redis://:password@host",
        "GIT_ASKPASS": "/x",
        "SSH_AUTH_SOCK": "/y",
        "LEVEL": "low",
    }
    made = engine_environ(
        template("vllm", env={"LEVEL": "high", "WHERE": "{port}"}), HERE, inherited, {"TOKEN": "t"}
    )
    assert made == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "0",
        "LEVEL": "high",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
        "WHERE": "8123",
        "TOKEN": "t",
    }


@pytest.mark.parametrize(
    ("engine", "name"),
    [("vllm", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"), ("sglang", "SGLANG_TIMEOUT_KEEP_ALIVE")],
)
def test_engines_keep_connections_longer_than_routers_do(engine: str, name: str) -> None:
    kept = engine_environ(template(engine), HERE, {}, {})
    assert float(kept[name]) > Settings(routes=Path("r")).upstream_keepalive_s
    assert engine_environ(template(engine, env={name: "7"}), HERE, {}, {}) == {name: "7"}


def test_a_secret_is_never_filled_in() -> None:
    made = engine_environ(template("vllm"), HERE, {}, {"TOKEN": "{port}"})
    assert made["TOKEN"] == "{port}"
