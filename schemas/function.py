"""Function: a model and how to run it. Where and for whom is a Deployment's business."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, Self

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from schemas.base import GpuType, ObjectModel, StrictModel, Unique, also, given
from schemas.limits import Limits
from schemas.quantities import Duration, PositiveDuration, Size
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
_W: Final = "[A-Za-z0-9_.-]+"
URI_PATTERN: Final = (
    rf"^(hf://{_W}/{_W}(@[A-Za-z0-9_./-]+)?|(s3|gs)://{_W}/\S+|oci://{_W}\S+|sim://{_W}|\.?/\S*)$"
)
_URI: Final = re.compile(URI_PATTERN)
ServedName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./:@-]+$", max_length=200)]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]


class Model(StrictModel):
    """Which weights, and the names clients call them by."""

    uri: Annotated[str, WithJsonSchema({"type": "string", "pattern": URI_PATTERN})]
    """hf://org/name[@revision], s3://bucket/path, gs://bucket/path, oci://registry/name:tag, sim://name or a path."""
    format: Literal["safetensors", "gguf", "pytorch", "onnx", "tensorrt", "ggml"] | None = None
    """Of the weights; what the engine finds where unset."""
    quantization: Annotated[str, Field(max_length=40)] | None = None
    """As the engine names it: fp8, awq, gptq, int8."""
    served_name: ServedName | None = None
    """The model name in requests and answers; the function's own name where unset."""
    aliases: Annotated[list[ServedName], Field(max_length=64), Unique()] = Field(
        default_factory=list
    )
    """Further names that requests may use."""
    tasks: Annotated[list[Task], Field(min_length=1), Unique()] = [
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
        if not _URI.fullmatch(uri):
            raise ValueError(
                f"{uri!r} is no model URI; write hf://org/name, s3://bucket/path, gs://bucket/path, "
                "oci://registry/name:tag, sim://name or a path that starts with / or ./"
            )
        return uri


class SecretRef(StrictModel):
    """Where a secret's value is found at run time; its value is never in Git."""

    model_config = also(
        {
            "oneOf": [
                given(field, {"type": "string"})
                for field in ("fromEnv", "fromFile", "kubernetesSecret")
            ]
        }
    )

    from_env: EnvName | None = None
    """An environment variable of the reconciler."""
    from_file: Annotated[str, Field(pattern=r"^/", max_length=1000)] | None = None
    """A file on the reconciler's machine; its content, stripped."""
    kubernetes_secret: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9_.-]+$")] | None = None
    """`name/key` of a Secret in the tenant's namespace."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(v is not None for v in (self.from_env, self.from_file, self.kubernetes_secret)) != 1:
            raise ValueError("give exactly one of fromEnv, fromFile, kubernetesSecret")
        return self


class Stage(StrictModel):
    """One side of disaggregated serving: its own replicas and GPUs."""

    replicas: Annotated[int, Field(ge=1, le=512)] = 1
    """Workers of this side, within one replica of the function."""
    gpus: Annotated[int, Field(ge=1, le=64)] = 1
    """Of each worker."""
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """GPUs that share each layer; at most `gpus`."""
    args: list[str] = Field(default_factory=list)
    """Added to the command of this side's workers."""

    @model_validator(mode="after")
    def _fits_its_gpus(self) -> Self:
        if self.tensor_parallel > self.gpus:
            raise ValueError(
                f"tensorParallel {self.tensor_parallel} needs as many gpus, not {self.gpus}"
            )
        return self


class Disaggregation(StrictModel):
    """Prefill and decode on separate workers (Dynamo, llm-d)."""

    prefill: Stage
    """Reads prompts."""
    decode: Stage
    """Writes answers."""
    transfer: Literal["nixl", "mooncake", "lmcache"] = "nixl"
    """How KV blocks travel from prefill to decode."""


class Runtime(StrictModel):
    """The engine and its flags."""

    model_config = also(
        {
            "allOf": [
                {
                    "if": given("engine", {"const": "custom"}),
                    "then": given("command", {"minItems": 1}),
                },
                {
                    "if": given("disaggregation", {"type": "object"}),
                    "then": given("engine", {"enum": ["dynamo", "llm-d", "custom"]}),
                },
            ]
        }
    )

    engine: Engine
    """What serves the model. simulated: no model at all, for trying things out."""
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]+$", max_length=40)] | None = None
    """Of the engine; what is installed, or the image's, where unset."""
    image: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./:@-]+$", max_length=300)] | None = None
    """Container image; the engine's own for `version` where unset."""
    command: list[str] = Field(default_factory=list)
    """Replaces the engine's own command. `{port}`, `{host}`, `{model}` and `{replica}` are filled in."""
    args: list[str] = Field(default_factory=list)
    """Added to the command; the same names are filled in. With `disaggregation`: to what answers requests."""
    env: dict[EnvName, str] = Field(default_factory=dict)
    """Environment variables of the engine. Values are text: quote numbers."""
    secrets: dict[EnvName, SecretRef] = Field(default_factory=dict)
    """Environment variable -> where its value is found."""
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """GPUs that share each layer."""
    pipeline_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Groups of layers, one after the other."""
    max_model_len: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Tokens of prompt and answer together; the model's own where unset."""
    prefix_caching: bool = True
    """The engine keeps the KV cache of prompts for those that begin alike."""
    disaggregation: Disaggregation | None = None
    """Prefill and decode on separate workers."""

    @model_validator(mode="after")
    def _fits_the_engine(self) -> Self:
        if self.engine == "custom" and not self.command:
            raise ValueError(
                "engine custom needs a command, for example [python, server.py, --port, '{port}']"
            )
        if self.disaggregation and self.engine not in ("dynamo", "llm-d", "custom"):
            raise ValueError(f"engine {self.engine} has no disaggregation; use dynamo or llm-d")
        if twice := sorted(self.env.keys() & self.secrets.keys()):
            raise ValueError(f"{twice[0]} stands under env and under secrets; keep one")
        return self


class Gpu(StrictModel):
    """GPUs of one replica."""

    types: Annotated[list[GpuType], Field(min_length=1), Unique()]
    """Acceptable types, best first: [H100, A100-80GB]."""
    count: Annotated[int, Field(ge=1, le=64)] = 1
    """All of one replica together."""


class Resources(StrictModel):
    """What one replica needs."""

    gpu: Gpu | None = None
    """GPUs; none where unset."""
    cpu: Annotated[float, Field(gt=0, le=1024)] | None = None
    """Cores, at least."""
    memory: Size | None = None
    """Main memory, at least."""
    disk: Size | None = None
    """Room for images and weights, at least."""


class Scaling(StrictModel):
    """How many replicas, and by what signal."""

    model_config = also(
        {
            "if": given("metric", {"type": "string"}),
            "then": {
                "allOf": [
                    given("target", {"type": "number"}),
                    given("maxReplicas", {"type": "integer"}),
                ]
            },
            "else": {"properties": {"target": {"type": "null"}}},
        }
    )

    min_replicas: Annotated[int, Field(ge=0, le=512)] = 1
    """0, with a maxReplicas: sleeps when nobody asks, and wakes when somebody does."""
    max_replicas: Annotated[int, Field(ge=1, le=512)] | None = None
    """minReplicas where unset: a fixed number."""
    metric: Literal["qps", "queueDepth", "kvUsage", "ttft", "concurrency"] | None = None
    """What is held at the target: requests a second, waiting or running requests, KV cache use, time to first token."""
    target: Annotated[float, Field(gt=0)] | None = None
    """Of the metric, a replica: requests/s for qps, 0 to 1 for kvUsage, seconds for ttft."""
    upscale_delay: Duration = 300.0
    """How long the metric must be above its target before a replica is added."""
    downscale_delay: Duration = 1200.0
    """How long the metric must be below its target before a replica is removed."""
    wake_timeout: PositiveDuration = 300.0
    """How long a request waits for a function that sleeps; as many wait as the queue of its routing allows."""
    standby_replicas: Annotated[int, Field(ge=0, le=512)] = 0
    """More than qps, concurrency or kvUsage ask for, up to maxReplicas: ready before they are needed."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"maxReplicas {self.max_replicas} is below minReplicas {self.min_replicas}"
            )
        if (self.metric is None) != (self.target is None):
            raise ValueError("metric and target belong together: give both or neither")
        if self.metric is not None and self.max_replicas is None:
            raise ValueError("scaling by a metric needs maxReplicas")
        if self.metric == "kvUsage" and self.target is not None and self.target > 1:
            raise ValueError(
                f"kvUsage is a share between 0 and 1; its target cannot be {self.target}"
            )
        return self


class Readiness(StrictModel):
    """When a replica may receive requests."""

    path: Annotated[str, Field(pattern=r"^/[^\s#]*$", max_length=500)] = "/health"
    """Answers 2xx when the engine is ready."""
    initial_delay: Duration = 1200.0
    """How long a new replica may take to become ready before it counts as failed."""
    timeout: PositiveDuration = 15.0
    """Of one probe."""
    interval: PositiveDuration = 10.0
    """Between probes of a ready replica."""
    failure_threshold: Annotated[int, Field(ge=1, le=100)] = 3
    """Failed probes in a row before a ready replica stops counting as ready."""


class Price(StrictModel):
    """USD, for budgets and the ledger."""

    input_per_million: Annotated[float, Field(ge=0)] = 0.0
    """A million prompt tokens."""
    output_per_million: Annotated[float, Field(ge=0)] = 0.0
    """A million answer tokens."""
    cached_input_per_million: Annotated[float, Field(ge=0)] | None = None
    """A million prompt tokens found in the cache; inputPerMillion where unset."""


class Job(StrictModel):
    """A program that runs once to its end, instead of engines that serve."""

    kind: Literal["fineTune", "evaluation", "batch"]
    """What it is for; told in status, and nothing else."""
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]+$", max_length=64)] = "1"
    """Any word; another one runs the job again. So does a change of the runtime, the model or the resources."""
    retries: Annotated[int, Field(ge=0, le=100)] = 0
    """How often it is tried again when it fails."""
    timeout: PositiveDuration = 86400.0
    """How long one attempt may take."""


class FunctionSpec(StrictModel):
    """The model, how it runs, and how requests reach it."""

    model: Model
    """Which weights, and the names clients call them by."""
    runtime: Runtime
    """The engine and its flags."""
    resources: Resources = Field(default_factory=Resources)
    """What one replica needs."""
    scaling: Scaling = Field(default_factory=Scaling)
    """How many replicas."""
    readiness: Readiness = Field(default_factory=Readiness)
    """When a replica may receive requests."""
    routing: Routing = Field(default_factory=Routing)
    """How requests are spread over replicas. Whatever is unset, field by field, comes from Platform."""
    limits: Limits = Field(default_factory=Limits)
    """Over all tenants together."""
    price: Price = Field(default_factory=Price)
    """What tokens cost."""
    job: Job | None = None
    """Runs runtime.command once to its end, where a deployment puts it; no request reaches it."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        runtime, gpu = self.runtime, self.resources.gpu
        if self.job is not None and runtime.engine != "custom":
            raise ValueError(
                f"a job runs its own command: write engine: custom, not {runtime.engine}, and a command"
            )
        if self.model.uri.startswith("sim://") and runtime.engine not in ("simulated", "custom"):
            raise ValueError(
                f"{self.model.uri} is no model for engine {runtime.engine}; use simulated"
            )
        if gpu is None:
            return self
        wanted = runtime.tensor_parallel * runtime.pipeline_parallel
        if runtime.disaggregation:
            stages = (runtime.disaggregation.prefill, runtime.disaggregation.decode)
            wanted = sum(stage.replicas * stage.gpus for stage in stages)
        if wanted > gpu.count:
            raise ValueError(
                f"the runtime spreads one replica over {wanted} GPUs, resources.gpu.count is {gpu.count}"
            )
        return self


class Function(ObjectModel):
    """A model and how to run it."""

    kind: Literal["Function"]
    """Always Function."""
    spec: FunctionSpec
    """The model and how it runs."""
