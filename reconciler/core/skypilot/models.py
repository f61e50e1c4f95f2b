"""Where a replica gets its model from: what the engine is told, and what is fetched before. Pure.

Nothing is mounted through SkyPilot: a service with file mounts replaces every replica at every change,
also where only their number changed. Not here: credentials, which are the machine's own or secrets.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Final

from reconciler.core.engine_command import model_argument
from reconciler.core.skypilot.script import HOME
from reconciler.core.workload import Template

FOLDER: Final = f"{HOME}/detoserve-model"
_FOLDER: Final = '"$HOME"/detoserve-model'


@dataclass(frozen=True, slots=True)
class ModelSource:
    """`setup` are lines for bash, before the engine starts; `flags` are vLLM's."""

    argument: str
    revision: str | None = None
    flags: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


def model_source(template: Template) -> ModelSource:
    """hf:// and paths as they stand; buckets streamed by vLLM, read by Triton, fetched for others; oci:// fetched."""
    model = template.model
    uri, engine = model.uri, template.runtime.engine
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme in ("s3", "gs"):
        if engine in ("vllm", "llm-d") and model.format in (None, "safetensors"):
            return ModelSource(uri, flags=("--load-format", "runai_streamer"))
        if engine == "triton":
            return ModelSource(uri)
        return ModelSource(FOLDER, setup=_fetch_bucket(uri, scheme))
    if scheme == "oci":
        return ModelSource(FOLDER, setup=_fetch_oci(uri))
    argument, revision = model_argument(uri)
    return ModelSource(argument, revision)


def _fetch_bucket(uri: str, scheme: str) -> tuple[str, ...]:
    source = shlex.quote(uri)
    if scheme == "s3":
        tool, fetch = "awscli", f"aws s3 sync --only-show-errors {source} {_FOLDER}"
    else:
        tool, fetch = "gsutil", f"gsutil -m -q rsync -r {source} {_FOLDER}"
    return (f"python3 -m pip install --quiet {tool}", f"mkdir -p {_FOLDER}", fetch)


def _fetch_oci(uri: str) -> tuple[str, ...]:
    target = uri.removeprefix("oci://")
    code = "import os, sys, oras.client as c; c.OrasClient().pull(target=sys.argv[1], outdir=sys.argv[2])"
    return (
        "python3 -m pip install --quiet oras",
        f"mkdir -p {_FOLDER}",
        f"python3 -c {shlex.quote(code)} {shlex.quote(target)} {_FOLDER}",
    )
