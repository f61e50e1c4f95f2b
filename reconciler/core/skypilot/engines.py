"""How each engine is started inside a replica: in which image, by which script. Pure.

A replica is one machine or pod, and one port answers for all of it. Not here: prefill and decode as
processes of their own (disaggregated), resources and the service around it (render).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from reconciler.core.engine_command import Place, filled_args, filled_env, serve_argv
from reconciler.core.skypilot import disaggregated
from reconciler.core.skypilot.models import ModelSource
from reconciler.core.skypilot.script import HOME, REPLICA, Start, command, exports, for_shell, quote
from reconciler.core.workload import Template
from reconciler.errors import Stalled

IMAGES: Final[Mapping[str, str]] = {
    "vllm": "vllm/vllm-openai:v{version}",
    "sglang": "lmsysorg/sglang:v{version}",
    "triton": "nvcr.io/nvidia/tritonserver:{version}-vllm-python-py3",
    "dynamo": "nvcr.io/nvidia/ai-dynamo/vllm-runtime:{version}",
    "llm-d": "ghcr.io/llm-d/llm-d-cuda:v{version}",
}
_LATEST: Final = ("vllm", "sglang")
"""Whose makers keep a tag `latest`."""


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
    if runtime.engine in _LATEST:
        return f"{pattern.partition(':')[0]}:latest"
    raise Stalled(
        f"engine {runtime.engine} has no newest image; give runtime.version, which stands for "
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
                return disaggregated.dynamo(template, model, place)
            case "llm-d":
                return disaggregated.llm_d(template, model, place)
            case _:
                pass
    argv = serve_argv(template, place, model.argument, model.revision)
    if not runtime.command and runtime.engine == "vllm":
        argv += [*model.flags, *disaggregated.kv_events(template, port)]
    argv += filled_args(template, place)
    return Start(f"{exports(template, place)}exec {command(argv)}\n")


def env_of(template: Template, name: str, port: int) -> dict[str, str]:
    """The function's own environment; what only the replica knows is exported by the script instead."""
    filled = filled_env(template, _place(name, port, ModelSource("")))
    return {k: v for k, v in filled.items() if not for_shell(v)}


def _place(name: str, port: int, model: ModelSource) -> Place:
    # On every address: routers are on other machines.
    return Place("0.0.0.0", port, f"{name}-{REPLICA}", "python3", model.argument)  # noqa: S104


def _triton(template: Template, model: ModelSource, place: Place) -> Start:
    """hf:// behind Triton's own OpenAI front end and vLLM; anything else is a model repository."""
    if not template.model.uri.startswith("hf://"):
        argv = ["tritonserver", f"--model-repository={model.argument}"]
        argv += [f"--http-port={place.port}", *filled_args(template, place)]
        return Start(f"{exports(template, place)}exec {command(argv)}\n")
    if "/" in template.served_name:
        raise Stalled(
            f"Triton names a model by its folder, which cannot be {template.served_name!r}; give "
            "model.servedName without a slash, and the full name as an alias"
        )
    repository = f"{HOME}/triton-models"
    folder = f"{repository}/{template.served_name}"
    argv = ["python3", "/opt/tritonserver/python/openai/openai_frontend/main.py"]
    argv += ["--model-repository", repository, "--tokenizer", model.argument]
    argv += ["--host", place.host, "--openai-port", str(place.port)]
    argv += filled_args(template, place)
    engine = json.dumps(_triton_vllm(template, model))
    config = """'backend: "vllm"' 'instance_group [{ count: 1, kind: KIND_MODEL }]'"""
    lines = [
        f"mkdir -p {quote(folder + '/1')}",
        f"printf '%s\\n' {quote(engine)} > {quote(folder + '/1/model.json')}",
        f"printf '%s\\n' {config} > {quote(folder + '/config.pbtxt')}",
        f"exec {command(argv)}",
    ]
    return Start(exports(template, place) + "\n".join(lines) + "\n")


def _triton_vllm(template: Template, model: ModelSource) -> dict[str, object]:
    """VLLM's engine arguments, as its backend in Triton reads them."""
    runtime = template.runtime
    engine: dict[str, object] = {
        "model": model.argument,
        "revision": model.revision,
        "quantization": template.model.quantization,
        "tensor_parallel_size": runtime.tensor_parallel,
        "pipeline_parallel_size": runtime.pipeline_parallel,
        "max_model_len": runtime.max_model_len,
        "enable_prefix_caching": runtime.prefix_caching,
    }
    return {name: value for name, value in engine.items() if value is not None}
