"""From a template to the argv and environment of one engine. Pure; no shell is ever involved.

`{port}`, `{host}`, `{model}` and `{replica}` are replaced in command, args and env; any other brace is
left as it is, so that JSON can be written plainly. Not here: whether the program exists, the values
of secrets (secret_values), or starting anything (processes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from reconciler.core.workload import Template
from reconciler.errors import Stalled

_ENGINE_ENV: Final[Mapping[str, Mapping[str, str]]] = {
    "vllm": {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120"},
    "sglang": {"SGLANG_TIMEOUT_KEEP_ALIVE": "120"},
}
"""Both close idle connections after 5 s, where routers keep them for a minute: an end that crosses a request
costs that request another attempt."""


@dataclass(frozen=True, slots=True)
class Place:
    """What differs from one replica to the next. `python` runs engines built into DetoServe.

    `model` is where the model is found there; "" where its URI says that.
    """

    host: str
    port: int
    replica: str
    python: str
    model: str = ""


def engine_argv(template: Template, place: Place) -> list[str]:
    """The program and its arguments; `argv[0]` may have to be looked up on PATH.

    Raises:
        Stalled: this engine or model cannot be run as a process here; says what to do instead.
    """
    runtime = template.runtime
    if runtime.command or runtime.engine == "simulated":
        model, revision = model_argument(template.model.uri)
    elif runtime.engine in ("vllm", "sglang"):
        model, revision = _local_model(template)
    else:
        raise Stalled(
            f"engine {runtime.engine} is not started as a process on a local cluster; give "
            "runtime.command how to start it, or place it on a cluster with containers"
        )
    return [
        *serve_argv(template, place, model, revision),
        *_events_argv(template, place),
        *filled_args(template, place),
    ]


def serve_argv(template: Template, place: Place, model: str, revision: str | None) -> list[str]:
    """The function's own command, or how its engine serves `model`; without `runtime.args`.

    Raises:
        Stalled: the engine has no one command (triton, dynamo, llm-d), or an empty one.
    """
    runtime = template.runtime
    if runtime.command:
        filled = _fill_all(runtime.command, template, place)
        if not filled[0]:
            raise Stalled("runtime.command begins with an empty word; name a program")
        return filled
    match runtime.engine:
        case "simulated":
            return _simulated(template, place)
        case "vllm":
            return _vllm(template, place, model, revision)
        case "sglang":
            return _sglang(template, place, model, revision)
        case engine:
            raise Stalled(f"engine {engine} is not started by one command; give runtime.command")


def _events_argv(template: Template, place: Place) -> list[str]:
    """Has the engine tell an agent on this machine what its cache holds; nobody elsewhere.

    Events carry prompts, so they go by what only this machine can reach.
    """
    runtime = template.runtime
    if runtime.command or not runtime.prefix_caching:
        return []
    if runtime.engine == "simulated":
        anywhere = "tcp://127.0.0.1:*"
        return ["--kv-events-endpoint", anywhere, "--kv-events-replay-endpoint", anywhere]
    own = ("--kv-events-config", "--data-parallel")  # ranks need endpoints with ports
    if runtime.engine != "vllm" or any(argument.startswith(own) for argument in runtime.args):
        return []
    name = f"ipc://@detoserve-{place.replica}-{place.port}"
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"{name}-events",
        "replay_endpoint": f"{name}-replay",
    }
    return ["--kv-events-config", json.dumps(config)]


def filled_args(template: Template, place: Place) -> list[str]:
    """`runtime.args` with what differs from replica to replica filled in."""
    return _fill_all(template.runtime.args, template, place)


def filled_env(template: Template, place: Place) -> dict[str, str]:
    """`runtime.env`, likewise, after what its engine is given without being asked."""
    known = _known(template, place)
    own = {name: _fill(value, known) for name, value in template.runtime.env.items()}
    return {**_ENGINE_ENV.get(template.runtime.engine, {}), **own}


def engine_environ(
    template: Template, place: Place, inherited: Mapping[str, str], secrets: Mapping[str, str]
) -> dict[str, str]:
    """The reconciler's environment without what concerns it alone, then env, then secrets.

    Variables of DetoServe and of Git can hold credentials of the reconciler and do not go along.
    """
    environ = {
        name: value
        for name, value in inherited.items()
        if not name.startswith(("DETOSERVE_", "GIT_", "SSH_"))
    }
    return environ | filled_env(template, place) | dict(secrets)


def model_argument(uri: str) -> tuple[str, str | None]:
    """How engines name the model, and its revision: hf://org/name@rev -> (org/name, rev).

    Paths, s3:// and gs:// are passed on as they stand.
    """
    if uri.startswith("hf://"):
        name, _, revision = uri.removeprefix("hf://").partition("@")
        return name, revision or None
    if uri.startswith("sim://"):
        return uri.removeprefix("sim://"), None
    return uri, None


def _simulated(template: Template, place: Place) -> list[str]:
    runtime = template.runtime
    argv = [place.python, "-m", "agent.simulated", "--host", place.host, "--port", str(place.port)]
    argv += ["--served-model-name", template.served_name]
    if runtime.max_model_len is not None:
        argv += ["--max-model-len", str(runtime.max_model_len)]
    if not runtime.prefix_caching:
        argv += ["--no-enable-prefix-caching"]
    return argv


def _vllm(template: Template, place: Place, model: str, revision: str | None) -> list[str]:
    runtime = template.runtime
    argv = ["vllm", "serve", model, "--host", place.host, "--port", str(place.port)]
    argv += ["--served-model-name", template.served_name]
    argv += ["--tensor-parallel-size", str(runtime.tensor_parallel)]
    if runtime.pipeline_parallel > 1:
        argv += ["--pipeline-parallel-size", str(runtime.pipeline_parallel)]
    if runtime.max_model_len is not None:
        argv += ["--max-model-len", str(runtime.max_model_len)]
    if template.model.quantization:
        argv += ["--quantization", template.model.quantization]
    if revision:
        argv += ["--revision", revision]
    on_or_off = (
        "--enable-prefix-caching" if runtime.prefix_caching else "--no-enable-prefix-caching"
    )
    return [*argv, on_or_off, "--enable-prompt-tokens-details"]


def _sglang(template: Template, place: Place, model: str, revision: str | None) -> list[str]:
    runtime = template.runtime
    argv = ["python3", "-m", "sglang.launch_server", "--model-path", model]
    argv += ["--host", place.host, "--port", str(place.port)]
    argv += ["--served-model-name", template.served_name]
    argv += ["--tp-size", str(runtime.tensor_parallel)]
    if runtime.pipeline_parallel > 1:
        argv += ["--pp-size", str(runtime.pipeline_parallel)]
    if runtime.max_model_len is not None:
        argv += ["--context-length", str(runtime.max_model_len)]
    if template.model.quantization:
        argv += ["--quantization", template.model.quantization]
    if revision:
        argv += ["--revision", revision]
    if not runtime.prefix_caching:
        argv += ["--disable-radix-cache"]
    return [*argv, "--enable-metrics", "--enable-cache-report"]


def _local_model(template: Template) -> tuple[str, str | None]:
    uri, engine = template.model.uri, template.runtime.engine
    if uri.startswith("sim://"):
        raise Stalled(
            f"{uri} is a model of the simulated engine; {engine} needs hf://org/name or a path"
        )
    if uri.startswith("oci://"):
        raise Stalled(
            f"{uri} cannot be fetched on a local cluster; pull it to a folder and write its path"
        )
    return model_argument(uri)


def _known(template: Template, place: Place) -> dict[str, str]:
    return {
        "{port}": str(place.port),
        "{host}": place.host,
        "{model}": place.model or model_argument(template.model.uri)[0],
        "{replica}": place.replica,
    }


def _fill_all(words: Sequence[str], template: Template, place: Place) -> list[str]:
    known = _known(template, place)
    return [_fill(word, known) for word in words]


def _fill(text: str, known: Mapping[str, str]) -> str:
    for placeholder, value in known.items():
        text = text.replace(placeholder, value)
    return text
