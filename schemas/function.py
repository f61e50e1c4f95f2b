"""Function: a model and how to run it. Where and for whom is a Deployment's business."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from schemas.base import ObjectModel, StrictModel
from schemas.quantities import Duration, Size
from schemas.routing_policy import Routing

Engine = Literal["vllm", "sglang", "triton", "dynamo", "llm-d", "custom", "simulated"]
Task = Literal[
    "chat",
    "completions",
    "embeddings",
    "responses",
    "rerank",
    "score",
    "transcription",
    "translation",
    "messages",
    "tokenize",
]
_URI: Final = re.compile(
    r"^(hf://[\w.-]+/[\w.-]+(@[\w.-]+)?|s3://[\w.-]+/\S+|gs://[\w.-]+/\S+|oci://\S+|sim://[\w.-]+|/\S*|\./\S*)$"
)
ServedName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w./:@-]+$")]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]


class Model(StrictModel):
    """Which weights, and the names clients call them by."""

    uri: str
    """hf://org/name[@revision], s3://bucket/path, gs://bucket/path, oci://registry/name:tag, sim://name or a path."""
    format: Literal["safetensors", "gguf", "pytorch", "onnx", "tensorrt", "ggml"] | None = None
    quantization: Annotated[str, Field(max_length=40)] | None = None
    """As the engine names it: fp8, awq, gptq, int8."""
    served_name: ServedName | None = None
    """The model name in requests and answers; the function's own name where unset."""
    aliases: list[ServedName] = Field(default_factory=list, max_length=64)
    """Further names that requests may use."""
    tasks: Annotated[list[Task], Field(min_length=1)] = [
        "chat",
        "completions",
        "responses",
        "messages",
        "tokenize",
    ]
    """Which parts of the OpenAI API the model answers."""

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str) -> str:
        if not _URI.match(uri):
            raise ValueError(
                f"{uri!r} is no model URI; write hf://org/name, s3://bucket/path, gs://bucket/path, "
                "oci://registry/name:tag, sim://name or a path that starts with / or ./"
            )
        return uri


class SecretRef(StrictModel):
    """Where a secret's value is found at run time; its value is never in Git."""

    from_env: EnvName | None = None
    """An environment variable of the reconciler."""
    from_file: Annotated[str, Field(pattern=r"^/")] | None = None
    """A file on the reconciler's machine; its content, stripped."""
    kubernetes_secret: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[\w.-]+$")] | None = None
    """`name/key` of a Secret in the tenant's namespace."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(v is not None for v in (self.from_env, self.from_file, self.kubernetes_secret)) != 1:
            raise ValueError("give exactly one of fromEnv, fromFile, kubernetesSecret")
        return self


class Stage(StrictModel):
    """One side of disaggregated serving: its own replicas and GPUs."""

    replicas: Annotated[int, Field(ge=1, le=512)] = 1
    gpus: Annotated[int, Field(ge=1, le=64)] = 1
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    args: list[str] = Field(default_factory=list)


class Disaggregation(StrictModel):
    """Prefill and decode on separate workers (Dynamo, llm-d)."""

    prefill: Stage
    decode: Stage
    transfer: Literal["nixl", "mooncake", "lmcache"] = "nixl"
    """How KV blocks travel from prefill to decode."""


class Runtime(StrictModel):
    """The engine and its flags."""

    engine: Engine
    version: Annotated[str, Field(max_length=40)] | None = None
    image: Annotated[str, Field(max_length=300)] | None = None
    """Container image; the engine's own for `version` where unset."""
    command: list[str] = Field(default_factory=list)
    """Replaces the engine's own command. `{port}`, `{host}`, `{model}` and `{replica}` are filled in."""
    args: list[str] = Field(default_factory=list)
    """Added to the command."""
    env: dict[EnvName, str] = Field(default_factory=dict)
    secrets: dict[EnvName, SecretRef] = Field(default_factory=dict)
    """Environment variable -> where its value is found."""
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    pipeline_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    max_model_len: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    prefix_caching: bool = True
    disaggregation: Disaggregation | None = None

    @model_validator(mode="after")
    def _fits_the_engine(self) -> Self:
        if self.engine == "custom" and not self.command:
            raise ValueError(
                "engine custom needs a command, for example [python, server.py, --port, '{port}']"
            )
        if self.disaggregation and self.engine not in ("dynamo", "llm-d", "custom"):
            raise ValueError(f"engine {self.engine} has no disaggregation; use dynamo or llm-d")
        return self


class Gpu(StrictModel):
    """GPUs of one replica."""

    types: Annotated[
        list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]], Field(min_length=1)
    ]
    """Acceptable types, best first: [H100, A100-80GB]."""
    count: Annotated[int, Field(ge=1, le=64)] = 1


class Resources(StrictModel):
    """What one replica needs."""

    gpu: Gpu | None = None
    cpu: Annotated[float, Field(gt=0, le=1024)] | None = None
    memory: Size | None = None
    disk: Size | None = None


class Scaling(StrictModel):
    """How many replicas, and by what signal."""

    min_replicas: Annotated[int, Field(ge=0, le=512)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=512)] | None = None
    """minReplicas where unset: a fixed number."""
    metric: Literal["qps", "queueDepth", "kvUsage", "ttft", "concurrency"] | None = None
    target: Annotated[float, Field(gt=0)] | None = None
    """Of the metric, a replica."""
    upscale_delay: Duration = 300.0
    downscale_delay: Duration = 1200.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"maxReplicas {self.max_replicas} is below minReplicas {self.min_replicas}"
            )
        if (self.metric is None) != (self.target is None):
            raise ValueError("metric and target belong together: give both or neither")
        return self


class Readiness(StrictModel):
    """When a replica may receive requests."""

    path: Annotated[str, Field(pattern=r"^/")] = "/health"
    initial_delay: Duration = 1200.0
    """How long a new replica may take to become ready before it counts as failed."""
    timeout: Duration = 15.0
    """Of one probe."""
    interval: Duration = 10.0
    """Between probes of a ready replica."""
    failure_threshold: Annotated[int, Field(ge=1, le=100)] = 3
    """Failed probes in a row before a ready replica stops counting as ready."""


class Price(StrictModel):
    """USD, for budgets and the ledger."""

    input_per_million: Annotated[float, Field(ge=0)] = 0.0
    output_per_million: Annotated[float, Field(ge=0)] = 0.0
    cached_input_per_million: Annotated[float, Field(ge=0)] | None = None
    """inputPerMillion where unset."""


class FunctionSpec(StrictModel):
    model: Model
    runtime: Runtime
    resources: Resources = Field(default_factory=Resources)
    scaling: Scaling = Field(default_factory=Scaling)
    readiness: Readiness = Field(default_factory=Readiness)
    routing: Routing = Field(default_factory=Routing)
    price: Price = Field(default_factory=Price)


class Function(ObjectModel):
    """A model and how to run it."""

    kind: Literal["Function"]
    spec: FunctionSpec
