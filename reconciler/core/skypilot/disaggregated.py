"""Dynamo and llm-d: one replica of several processes, prefill and decode apart where asked for. Pure.

All processes are on the replica's one machine, each with GPUs of its own; when one ends, so does the
replica, and SkyServe replaces it whole. `runtime.args` go to what answers the port, a stage's own
to its workers. Not here: engines of one process (engines).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from reconciler.core.engine_command import Place, filled_args
from reconciler.core.skypilot.models import ModelSource
from reconciler.core.skypilot.script import Start, command, exports
from reconciler.core.workload import Template
from schemas.function import Stage

# Beside the port that answers, and beside those of the workers.
_EVENTS_PORTS: Final = 32
_NIXL_PORTS: Final = 48
_UNTIL_ONE_ENDS: Final = "wait -n\nkill $(jobs -p) 2> /dev/null\nexit 1\n"
_CONNECTORS: Final[Mapping[str, str]] = {
    "nixl": "NixlConnector",
    "mooncake": "MooncakeConnector",
    "lmcache": "LMCacheConnectorV1",
}
Role = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class _Worker:
    """One vLLM process. `index` counts over all of them; `gpus` as CUDA_VISIBLE_DEVICES has it."""

    role: Role
    index: int
    gpus: str
    stage: Stage


def kv_events(template: Template, port: int) -> list[str]:
    """Has vLLM tell an agent beside it which blocks its prefix cache holds.

    Over a socket in the file system, because events carry the tokens of prompts: the network gets none.
    `port` tells engines on one machine apart.
    """
    base = f"ipc:///tmp/detoserve-kv-{port}"
    return _kv_events(template, f"{base}.events", f"{base}.replay")


def _kv_events(template: Template, endpoint: str, replay_endpoint: str) -> list[str]:
    if not template.runtime.prefix_caching:
        # Without a cache there is nothing to tell.
        return []
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": endpoint,
        "replay_endpoint": replay_endpoint,
        "topic": "kv-events",
    }
    return ["--kv-events-config", json.dumps(config, separators=(",", ":"))]


def dynamo(template: Template, model: ModelSource, place: Place) -> Start:
    """Dynamo's front end before its vLLM workers, which find one another by files: no etcd, no NATS."""
    parts = ['mkdir -p "$DYN_FILE_KV"']
    for worker in _workers(template):
        argv = ["python3", "-m", "dynamo.vllm", "--model", model.argument]
        argv += ["--served-model-name", template.served_name]
        if template.runtime.disaggregation:
            argv += ["--disaggregation-mode", worker.role]
        argv += _flags(template, model, worker)
        # Dynamo itself listens to them, over TCP alone.
        port = place.port + _EVENTS_PORTS + 2 * worker.index
        argv += _kv_events(template, f"tcp://*:{port}", f"tcp://*:{port + 1}")
        parts.append(_background(worker, [*argv, *_own_args(worker, template, place)], place))
    front = ["python3", "-m", "dynamo.frontend", "--http-host", place.host]
    front += ["--http-port", str(place.port), *filled_args(template, place)]
    parts.append(f"{command(front)} &")
    return Start(
        exports(template, place) + "\n".join(parts) + "\n" + _UNTIL_ONE_ENDS,
        {
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": f"/tmp/detoserve-dynamo-{place.port}",  # noqa: S108 - of one replica
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq",
        },
    )


def llm_d(template: Template, model: ModelSource, place: Place) -> Start:
    """llm-d's build of vLLM; with prefill apart, vLLM's router sends each request through one of each.

    llm-d's scheduler needs a Kubernetes gateway; between replicas, DetoServe's router does its work.
    """
    workers, plan = _workers(template), template.runtime.disaggregation
    if plan is None:
        argv = _serve(template, model, workers[0], place.host, place.port)
        argv += filled_args(template, place)
        return Start(f"{exports(template, place)}exec {command(argv)}\n")
    front = ["vllm-router", "--vllm-pd-disaggregation", "--kv-connector", plan.transfer]
    parts = []
    for worker in workers:
        port = place.port + 1 + worker.index
        argv = _serve(template, model, worker, "127.0.0.1", port)
        parts.append(_background(worker, [*argv, *_own_args(worker, template, place)], place))
        front += [f"--{worker.role}", f"http://127.0.0.1:{port}"]
    front += ["--host", place.host, "--port", str(place.port), *filled_args(template, place)]
    parts.append(f"{command(front)} &")
    return Start(exports(template, place) + "\n".join(parts) + "\n" + _UNTIL_ONE_ENDS)


def _workers(template: Template) -> list[_Worker]:
    """Prefill first; GPUs are given out in order."""
    runtime, gpu = template.runtime, template.resources.gpu
    stages: list[tuple[Role, Stage]]
    if runtime.disaggregation is None:
        whole = Stage.model_validate(
            {"gpus": gpu.count if gpu else 1, "tensorParallel": runtime.tensor_parallel}
        )
        stages = [("decode", whole)]
    else:
        stages = [
            ("prefill", runtime.disaggregation.prefill),
            ("decode", runtime.disaggregation.decode),
        ]
    workers: list[_Worker] = []
    first = 0
    for role, stage in stages:
        for _ in range(stage.replicas):
            gpus = ",".join(str(n) for n in range(first, first + stage.gpus))
            workers.append(_Worker(role, len(workers), gpus, stage))
            first += stage.gpus
    return workers


def _serve(
    template: Template, model: ModelSource, worker: _Worker, host: str, port: int
) -> list[str]:
    argv = ["vllm", "serve", model.argument, "--host", host, "--port", str(port)]
    argv += ["--served-model-name", template.served_name, *model.flags]
    argv += [*_flags(template, model, worker), "--enable-prompt-tokens-details"]
    return [*argv, *kv_events(template, port)]


def _flags(template: Template, model: ModelSource, worker: _Worker) -> list[str]:
    """vLLM's, for one worker."""
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
    caching = "--enable-prefix-caching" if runtime.prefix_caching else "--no-enable-prefix-caching"
    return [*flags, caching, *_transfer(template, worker.role)]


def _transfer(template: Template, role: Role) -> list[str]:
    """How KV blocks travel from prefill to decode."""
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


def _own_args(worker: _Worker, template: Template, place: Place) -> list[str]:
    runtime = template.runtime.model_copy(update={"args": list(worker.stage.args)})
    return filled_args(replace(template, runtime=runtime), place)


def _background(worker: _Worker, argv: Sequence[str], place: Place) -> str:
    side_channel = place.port + _NIXL_PORTS + worker.index
    own = f"CUDA_VISIBLE_DEVICES={worker.gpus} VLLM_NIXL_SIDE_CHANNEL_PORT={side_channel}"
    return f"{own} {command(argv)} &"
