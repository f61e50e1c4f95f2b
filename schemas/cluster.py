"""Cluster: a place where functions can run, or where engines already do."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Annotated, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from schemas.base import (
    GpuType,
    Name,
    ObjectModel,
    Sha256Hex,
    StrictModel,
    Unique,
    Word,
    also,
    given,
)
from schemas.quantities import Duration

URL_PATTERN: Final = r"^https?://[^\s/?#@\\]+(/[^\s?#@\\]*)?$"
_URL: Final = re.compile(URL_PATTERN)


class LocalProvider(StrictModel):
    """Processes on the reconciler's own machine."""

    type: Literal["local"]
    """Always local."""
    max_processes: Annotated[int, Field(ge=1, le=1024)] = 64
    """At most so many engines at once, rolling updates included."""


class KubernetesProvider(StrictModel):
    """A Kubernetes cluster, through SkyPilot."""

    type: Literal["kubernetes"]
    """Always kubernetes."""
    context: Annotated[str, Field(min_length=1, max_length=253)]
    """As in the kubeconfig of the SkyPilot API server."""
    namespace: Name | None = None
    """Where replicas run; the context's own where unset."""


class SlurmProvider(StrictModel):
    """A Slurm cluster, through SkyPilot."""

    type: Literal["slurm"]
    """Always slurm."""
    cluster: Word
    """Host name in the `~/.slurm/config` of the SkyPilot API server."""
    partition: Word | None = None
    """The cluster's default partition where unset."""


class CloudProvider(StrictModel):
    """A cloud's region, through SkyPilot."""

    model_config = also(
        {"if": given("zone", {"type": "string"}), "then": given("region", {"type": "string"})}
    )

    type: Literal["cloud"]
    """Always cloud."""
    cloud: Literal[
        "aws",
        "gcp",
        "azure",
        "oci",
        "lambda",
        "runpod",
        "nebius",
        "fluidstack",
        "cudo",
        "paperspace",
        "vast",
        "do",
        "ibm",
    ]
    """As SkyPilot names it."""
    region: Word | None = None
    """As the cloud names it; any where unset."""
    zone: Word | None = None
    """Within the region; any where unset."""

    @model_validator(mode="after")
    def _zone_in_region(self) -> Self:
        if self.zone and not self.region:
            raise ValueError(f"zone {self.zone} needs its region")
        return self


class ExternalEndpoint(StrictModel):
    """An engine that somebody else runs."""

    url: Annotated[
        str, Field(max_length=500), WithJsonSchema({"type": "string", "pattern": URL_PATTERN})
    ]
    """Base of the OpenAI API without its `/v1/...`: http://10.0.0.5:8000 or https://host/base."""
    function: Name
    """The Function it serves."""

    @field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        if "@" in url:
            raise ValueError(
                "a URL in Git must not hold credentials; leave out what stands before @"
            )
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if "?" in url or "#" in url:
            raise ValueError("an endpoint has no query and no fragment")
        if not _URL.fullmatch(url) or not parts.hostname or port == 0:
            raise ValueError(f"{url!r} is no endpoint; write http://host:port or https://host/base")
        return url.rstrip("/")


class ExternalProvider(StrictModel):
    """Engines that are run elsewhere; DetoServe only routes to them."""

    type: Literal["external"]
    """Always external."""
    endpoints: Annotated[list[ExternalEndpoint], Field(min_length=1, max_length=4096), Unique()]
    """The engines, and what each serves."""


Provider = Annotated[
    LocalProvider | KubernetesProvider | SlurmProvider | CloudProvider | ExternalProvider,
    Field(discriminator="type"),
]


class GpuInventory(StrictModel):
    """A hint of what is there, for plans and quota checks; the cluster itself is the truth."""

    type: GpuType
    """As functions name it: H100, A100-80GB."""
    count: Annotated[int, Field(ge=0)]
    """In the whole cluster."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """USD a GPU, where SkyPilot's catalogue does not know it."""
    spot_price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """The same for spot instances, where the cluster has them."""


class Kai(StrictModel):
    """KAI Scheduler on this cluster."""

    enabled: bool = False
    """Replicas are scheduled by KAI: in the queue named like their tenant, or in `shared` where several share them."""
    parent_queue: Name | None = None
    """The queue under which tenants' queues stand."""
    topology: (
        Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=253)] | None
    ) = None
    """Name of the Topology that keeps the pods of one replica near each other."""

    @model_validator(mode="after")
    def _enabled_if_set(self) -> Self:
        if not self.enabled and (self.parent_queue or self.topology):
            raise ValueError("parentQueue and topology have no effect without enabled: true")
        return self


class ClusterSpec(StrictModel):
    """What the place is, where it is, and what may be routed to in it."""

    provider: Provider
    """What runs engines there; `type` says which."""
    region: Word | None = None
    """Where it is, for placement constraints; compared as it stands."""
    rtt: Duration | None = None
    """Round trip from the routers, as a first guess until it is measured."""
    gpus: list[GpuInventory] = Field(default_factory=list)
    """What is there, one entry a type."""
    kai: Kai = Field(default_factory=Kai)
    """KAI Scheduler, where the cluster has it."""
    agent_key_sha256: Sha256Hex | None = None
    """SHA-256 of a key, in lower-case hex; authenticates this cluster's agent when it reports over HTTPS."""
    endpoint_cidrs: Annotated[list[str], Unique()] = Field(default_factory=list)
    """Endpoints outside these networks are never routed to. Empty: any that is not link-local."""
    residency: Annotated[list[Word], Unique()] = Field(default_factory=list)
    """Labels such as eu or de, for placement constraints."""

    @field_validator("endpoint_cidrs")
    @classmethod
    def _networks(cls, cidrs: list[str]) -> list[str]:
        for cidr in cidrs:
            try:
                ip_network(cidr)
            except ValueError as error:
                raise ValueError(
                    f"{cidr!r} is no network ({error}); write it like 10.0.0.0/8"
                ) from None
        return cidrs

    @field_validator("gpus")
    @classmethod
    def _one_entry_a_type(cls, gpus: list[GpuInventory]) -> list[GpuInventory]:
        types = [gpu.type for gpu in gpus]
        if twice := sorted({t for t in types if types.count(t) > 1}):
            raise ValueError(f"GPU type {twice[0]} stands twice; give one entry with the sum")
        return gpus

    @model_validator(mode="after")
    def _kai_on_kubernetes(self) -> Self:
        if self.kai.enabled and not isinstance(self.provider, KubernetesProvider):
            raise ValueError(f"kai runs on provider kubernetes, not {self.provider.type}")
        return self


class Cluster(ObjectModel):
    """A place where functions can run."""

    kind: Literal["Cluster"]
    """Always Cluster."""
    spec: ClusterSpec
    """What the place is."""
