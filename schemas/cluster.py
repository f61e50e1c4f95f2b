"""Cluster: a place where functions can run, or where engines already do."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from schemas.base import Name, ObjectModel, StrictModel
from schemas.quantities import Duration


class LocalProvider(StrictModel):
    """Processes on the reconciler's own machine."""

    type: Literal["local"]
    max_processes: Annotated[int, Field(ge=1, le=1024)] = 64
    """At most so many engines at once, rolling updates included."""


class KubernetesProvider(StrictModel):
    """A Kubernetes cluster, through SkyPilot."""

    type: Literal["kubernetes"]
    context: Annotated[str, Field(min_length=1, max_length=253)]
    """As in the kubeconfig of the SkyPilot API server."""
    namespace: Name | None = None


class SlurmProvider(StrictModel):
    """A Slurm cluster, through SkyPilot."""

    type: Literal["slurm"]
    cluster: Annotated[str, Field(min_length=1, max_length=64)]
    partition: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class CloudProvider(StrictModel):
    """A cloud's region, through SkyPilot."""

    type: Literal["cloud"]
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
    region: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    zone: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class ExternalEndpoint(StrictModel):
    """An engine that somebody else runs."""

    url: str
    """Base of the OpenAI API without its `/v1/...`: http://10.0.0.5:8000 or https://host/base."""
    function: Name
    """The Function it serves."""

    @field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no endpoint; write http://host:port or https://host/base")
        if parts.username or parts.password:
            raise ValueError("a URL in Git must not hold credentials; use engineKey")
        if parts.query or parts.fragment:
            raise ValueError("an endpoint has no query and no fragment")
        return url.rstrip("/")


class ExternalProvider(StrictModel):
    """Engines that are run elsewhere; DetoServe only routes to them."""

    type: Literal["external"]
    endpoints: Annotated[list[ExternalEndpoint], Field(min_length=1, max_length=4096)]


Provider = Annotated[
    LocalProvider | KubernetesProvider | SlurmProvider | CloudProvider | ExternalProvider,
    Field(discriminator="type"),
]


class GpuInventory(StrictModel):
    """A hint of what is there, for plans and quota checks; the cluster itself is the truth."""

    type: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    count: Annotated[int, Field(ge=0)]
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """USD a GPU."""


class Kai(StrictModel):
    """KAI Scheduler on this cluster."""

    enabled: bool = False
    parent_queue: Name | None = None
    topology: Annotated[str, Field(max_length=253)] | None = None


class ClusterSpec(StrictModel):
    provider: Provider
    region: Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=64)] | None = None
    rtt: Duration | None = None
    """Round trip from the routers, as a first guess until it is measured."""
    gpus: list[GpuInventory] = Field(default_factory=list)
    kai: Kai = Field(default_factory=Kai)
    agent_key_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Authenticates this cluster's agent when it reports over HTTPS."""
    endpoint_cidrs: list[str] = Field(default_factory=list)
    """Endpoints outside these networks are never routed to. Empty: any that is not link-local."""
    residency: list[Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=64)]] = Field(
        default_factory=list
    )
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


class Cluster(ObjectModel):
    """A place where functions can run."""

    kind: Literal["Cluster"]
    spec: ClusterSpec
