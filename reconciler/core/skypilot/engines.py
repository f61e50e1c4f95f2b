"""How each engine is started inside a replica: its image, what is set up first, and the script. Pure.

A replica is one machine or pod, and one port answers for all of it, also where prefill and decode are
separate processes in it. Not here: resources and the service around it (render).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from reconciler.core.engine_command import Place, filled_args, filled_env, serve_argv
from reconciler.core.skypilot.models import HOME, ModelSource
from reconciler.core.workload import Template
from reconciler.errors import Stalled
from schemas.function import Stage

KV_EVENTS_PORT: Final = 5557
KV_REPLAY_PORT: Final = 5558
_REPLICA: Final = "@replica@"
# What only the replica's own shell knows.
_SHELL: Final[Mapping[str, str]] = {_REPLICA: '"$SKYPILOT_SERVE_REPLICA_ID"', HOME: '"$HOME"'}

IMAGES: Final[Mapping[str, str]] = {
    "vllm": "vllm/vllm-openai:v{version}",
    "sglang": "lmsysorg/sglang:v{version}",
    "triton": "nvcr.io/nvidia/tritonserver:{version}-vllm-python-py3",
    "dynamo": "nvcr.io/nvidia/ai-dynamo/vllm-runtime:{version}",
    "llm-d": "ghcr.io/llm-d/llm-d-cuda:v{version}",
}
_LATEST: Final[Mapping[str, str]] = {
    "vllm": "vllm/vllm-openai:latest",
    "sglang": "lmsysorg/sglang:latest",
}


@dataclass(frozen=True, slots=True)
class Start:
    """`script` is for bash; `env` besides the function's own."""

    script: str
    env: Mapping[str, str] = field(default_factory=dict)


def image_of(template: Template) -> str | None:
    """The container to run in; None: the machine as it is.

    Raises:
        Stalled: the engine needs one and neither `version` nor `image` says which.
    """
    runtime = template.runtime
    if runtime.image:
        return runtime.image
    pattern = IMAGES.get(runtime.engine)
    if pattern is None or runtime.command:
        return None
    if runtime.version:
        return pattern.format(version=runtime.version.removeprefix("v"))
    if latest := _LATEST.get(runtime.engine):
        return latest
    raise Stalled(
        f"engine {runtime.engine} has no newest image; give runtime.version, which means "
        f"{pattern.format(version='VERSION')}, or runtime.image"
    )


def start(template: Template, model: ModelSource, name: str, port: int) -> Start:
    """The script that serves `model` on `port` in the foreground.

    Raises:
        Stalled: it cannot be served like this; says what to do instead.
    """
    place, runtime = _place(name, port, model), template.runtime
    if not runtime.command:
        match runtime.engine:
            case "triton":
                return _triton(template, model, place)
            case "dynamo":
                return _dynamo(template, model, place)
            case "llm-d":
                return _llm_d(template, model, place)
            case _:
                pass
    argv = serve_argv(template, place, model.argument, model.revision)
    if not runtime.command and runtime.engine == "vllm":
        argv += [*model.flags, *_kv_events(template)]
    argv += filled_args(template, place)
    return Start(_exports(template, place) + "exec " + _lines(argv))


def env_of(template: Template, name: str, port: int) -> dict[str, str]:
    """The function's own environment; what only the replica knows is exported by the script instead."""
    filled = filled_env(template, _place(name, port, ModelSource("")))
    return {k: v for k, v in filled.items() if not _for_shell(v)}


def _place(name: str, port: int, model: ModelSource) -> Place:
    # On every address: routers are on other machines.
    return Place("0.0.0.0", port, f"{name}-{_REPLICA}", "python3", model.argument)  # noqa: S104


def _kv_events(
    template: Template, *, port: int = KV_EVENTS_PORT, replay_port: int = KV_REPLAY_PORT
) -> list[str]:
    """Has vLLM tell which blocks its prefix cache holds; without that cache there is nothing to tell."""
    if not template.runtime.prefix_caching:
        return []
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{port}",
        "replay_endpoint": f"tcp://*:{replay_port}",
        "topic": "kv-events",
    }
    return ["--kv-events-config", json.dumps(config, separators=(",", ":"))]


def _triton(template: Template, model: ModelSource, place: Place) -> Start:
    """Triton's own OpenAI front end over its vLLM backend, from a model repository made on the spot."""
    runtime = template.runtime
    engine: dict[str, object] = {
        "model": model.argument,
        "served_model_name": template.served_name,
        "tensor_parallel_size": runtime.tensor_parallel,
        "enable_prefix_caching": runtime.prefix_caching,
    }
    if runtime.pipeline_parallel > 1:
        engine["pipeline_parallel_size"] = runtime.pipeline_parallel
    if runtime.max_model_len is not None:
        engine["max_model_len"] = runtime.max_model_len
    if template.model.quantization:
        engine["quantization"] = template.model.quantization
    if model.revision:
        engine["revision"] = model.revision
    repository = f"{HOME}/triton-models"
    folder = f"{repository}/{template.served_name.replace('/', '--')}"
    serve = [
        "python3",
        "/opt/tritonserver/python/openai/openai_frontend/main.py",
        "--model-repository",
        repository,
        "--tokenizer",
        model.argument,
        "--host",
        place.host,
        "--openai-port",
        str(place.port),
        *filled_args(template, place),
    ]
    return Start(
        _exports(template, place)
        + f"mkdir -p {_quote(folder + '/1')}\n"
        + f"printf '%s\\n' {_quote(json.dumps(engine))} > {_quote(folder + '/1/model.json')}\n"
        + """printf '%s\\n' 'backend: "vllm"' 'instance_group [{ count: 1, kind: KIND_MODEL }]' \\\n"""
        + f"  > {_quote(folder + '/config.pbtxt')}\n"
        + "exec "
        + _lines(serve)
    )


@dataclass(frozen=True, slots=True)
class _Worker:
    """One process of a disaggregated replica, with its own GPUs."""

    role: Literal["prefill", "decode"]
    index: int
    """Over all workers."""
    gpus: str
    """As CUDA_VISIBLE_DEVICES has it."""
    stage: Stage


def _workers(template: Template) -> list[_Worker]:
    """Prefill first; GPUs are given out in order."""
    plan = template.runtime.disaggregation
    if plan is None:
        count = template.resources.gpu.count if template.resources.gpu else 1
        tensor = template.runtime.tensor_parallel
        whole = Stage(replicas=1, gpus=count, tensor_parallel=tensor)
        stages: list[tuple[Literal["prefill", "decode"], Stage]] = [("decode", whole)]
    else:
        stages = [("prefill", plan.prefill), ("decode", plan.decode)]
    workers: list[_Worker] = []
    first = 0
    for role, stage in stages:
        for _ in range(stage.replicas):
            gpus = ",".join(str(n) for n in range(first, first + stage.gpus))
            workers.append(_Worker(role, len(workers), gpus, stage))
            first += stage.gpus
    return workers


_CONNECTORS: Final[Mapping[str, str]] = {
    "nixl": "NixlConnector",
    "mooncake": "MooncakeConnector",
    "lmcache": "LMCacheConnectorV1",
}


def _transfer(template: Template, role: str) -> list[str]:
    """How vLLM hands KV blocks from prefill to decode."""
    plan = template.runtime.disaggregation
    if plan is None:
        return []
    # NIXL's two sides are alike; the others are told which one they are.
    sides = {"prefill": "kv_producer", "decode": "kv_consumer"}
    config = {
        "kv_connector": _CONNECTORS[plan.transfer],
        "kv_role": "kv_both" if plan.transfer == "nixl" else sides[role],
    }
    return ["--kv-transfer-config", json.dumps(config, separators=(",", ":"))]


def _vllm_flags(template: Template, model: ModelSource, worker: _Worker) -> list[str]:
    runtime = template.runtime
    flags = ["--tensor-parallel-size", str(worker.stage.tensor_parallel)]
    if runtime.pipeline_parallel > 1:
        flags += ["--pipeline-parallel-size", str(runtime.pipeline_parallel)]
    if runtime.max_model_len is not None:
        flags += ["--max-model-len", str(runtime.max_model_len)]
    if template.model.quantization:
        flags += ["--quantization", template.model.quantization]
    if model.revision:
        flags += ["--revision", model.revision]
    flags.append(
        "--enable-prefix-caching" if runtime.prefix_caching else "--no-enable-prefix-caching"
    )
    flags += _transfer(template, worker.role)
    # Each publishes on ports of its own.
    flags += _kv_events(
        template,
        port=KV_EVENTS_PORT + 2 * worker.index,
        replay_port=KV_REPLAY_PORT + 2 * worker.index,
    )
    return flags


def _dynamo(template: Template, model: ModelSource, place: Place) -> Start:
    """Dynamo's front end before its vLLM workers, which find one another through files: no etcd, no NATS."""
    lines = [f'mkdir -p "$DYN_FILE_KV"{_NL}']
    for worker in _workers(template):
        argv = ["python3", "-m", "dynamo.vllm", "--model", model.argument]
        argv += ["--served-model-name", template.served_name]
        if template.runtime.disaggregation:
            argv += ["--disaggregation-mode", worker.role]
        argv += _vllm_flags(template, model, worker)
        argv += [*_fill_stage(worker, template, place), *filled_args(template, place)]
        lines.append(_background(worker, argv))
    front = ["python3", "-m", "dynamo.frontend", "--http-port", str(place.port)]
    return Start(
        _exports(template, place)
        + "".join(lines)
        + _lines(front).rstrip()
        + " &\n"
        + _UNTIL_ONE_ENDS,
        {
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": "/tmp/detoserve-dynamo",  # noqa: S108 - within the replica's own container
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq",
        },
    )


def _llm_d(template: Template, model: ModelSource, place: Place) -> Start:
    """llm-d's vLLM workers; with prefill apart, vLLM's router sends each request to one of each.

    llm-d's own scheduler needs a Kubernetes gateway; between replicas, DetoServe's router does its work.
    """
    workers = _workers(template)
    apart = template.runtime.disaggregation is not None
    first = place.port + 1 if apart else place.port
    lines, router = [], ["vllm-router", "--vllm-pd-disaggregation"]
    if apart and template.runtime.disaggregation:
        router += ["--kv-connector", template.runtime.disaggregation.transfer]
    for worker in workers:
        port = first + worker.index
        host = "127.0.0.1" if apart else place.host
        argv = ["vllm", "serve", model.argument, "--host", host, "--port", str(port)]
        argv += ["--served-model-name", template.served_name, *model.flags]
        argv += [*_vllm_flags(template, model, worker), "--enable-prompt-tokens-details"]
        argv += [*_fill_stage(worker, template, place), *filled_args(template, place)]
        if not apart:
            return Start(_exports(template, place) + "exec " + _lines(argv))
        lines.append(_background(worker, argv))
        router += [f"--{worker.role}", f"http://127.0.0.1:{port}"]
    router += ["--host", place.host, "--port", str(place.port)]
    return Start(
        _exports(template, place)
        + "".join(lines)
        + _lines(router).rstrip()
        + " &\n"
        + _UNTIL_ONE_ENDS
    )


def _fill_stage(worker: _Worker, template: Template, place: Place) -> list[str]:
    runtime = template.runtime.model_copy(update={"args": list(worker.stage.args)})
    return filled_args(replace(template, runtime=runtime), place)


def _background(worker: _Worker, argv: Sequence[str]) -> str:
    side = f"VLLM_NIXL_SIDE_CHANNEL_PORT={5600 + worker.index} "
    return f"CUDA_VISIBLE_DEVICES={worker.gpus} {side}" + _lines(argv).rstrip() + " &\n"


_NL: Final = "\n"
# One part that ends takes the replica down, and SkyServe replaces it whole.
_UNTIL_ONE_ENDS: Final = "wait -n\nkill $(jobs -p) 2> /dev/null\nexit 1\n"


def _exports(template: Template, place: Place) -> str:
    """What of the function's environment only the replica's shell can fill in."""
    filled = filled_env(template, place)
    return "".join(f"export {k}={_quote(v)}\n" for k, v in filled.items() if _for_shell(v))


def _lines(argv: Sequence[str]) -> str:
    """A command with a flag and its values on each line."""
    lines: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("-") and not _NUMBER.fullmatch(word) and len(lines[-1]) > 0:
            lines.append([])
        lines[-1].append(_quote(word))
    return " \\\n  ".join(" ".join(line) for line in lines) + "\n"


_NUMBER: Final = re.compile(r"-\d+(\.\d+)?")


def _for_shell(text: str) -> bool:
    return any(mark in text for mark in _SHELL)


def _quote(word: str) -> str:
    """One word for bash; what only its shell knows is put in there."""
    if not _for_shell(word):
        return shlex.quote(word)
    parts = re.split(f"({_REPLICA}|{HOME})", word)
    return "".join(_SHELL.get(part) or shlex.quote(part) for part in parts if part)
