"""Deployment: this function, for these tenants, there."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.base import Name, ObjectModel, StrictModel
from schemas.quantities import Duration


class PlacementConstraints(StrictModel):
    """Filters over the candidate clusters, before the cheapest is chosen."""

    regions: list[Annotated[str, Field(max_length=64)]] = Field(default_factory=list)
    residency: list[Annotated[str, Field(max_length=64)]] = Field(default_factory=list)
    """The cluster must carry every one of these labels."""
    spot: Literal["never", "allowed", "only"] = "never"
    max_price_per_hour: Annotated[float, Field(gt=0)] | None = None
    """USD, of the whole deployment."""


class Placement(StrictModel):
    """Where: one named cluster, or any of several that meets the constraints."""

    cluster: Name | None = None
    any_of: list[Name] = Field(default_factory=list, max_length=64)
    constraints: PlacementConstraints = Field(default_factory=PlacementConstraints)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.cluster is None) == (not self.any_of):
            raise ValueError("give either cluster: NAME or anyOf: [NAME, ...]")
        return self


class Gates(StrictModel):
    """What a canary step must keep to, read from the routers."""

    max_error_percent: Annotated[float, Field(ge=0, le=100)] = 1.0
    max_ttft_increase_percent: Annotated[float, Field(ge=0)] = 20.0
    min_cache_hit_ratio_percent: Annotated[float, Field(ge=0)] = 80.0
    """Of the stable arm's hit rate."""


class CanaryStep(StrictModel):
    weight_percent: Annotated[int, Field(ge=1, le=100)]
    hold: Duration = 300.0


class Rollout(StrictModel):
    """How a changed spec replaces the running one."""

    strategy: Literal["rolling", "blueGreen", "canary"] = "rolling"
    max_surge: Annotated[int, Field(ge=1, le=64)] = 1
    """How many replicas more than wanted a rolling update may have."""
    drain_timeout: Duration = 120.0
    """How long a replaced replica may finish its streams."""
    steps: list[CanaryStep] = Field(default_factory=list, max_length=32)
    gates: Gates = Field(default_factory=Gates)

    @model_validator(mode="after")
    def _steps_for_canary(self) -> Self:
        if self.strategy == "canary" and not self.steps:
            raise ValueError(
                "strategy canary needs steps, for example [{weightPercent: 10, hold: 5m}]"
            )
        if self.strategy != "canary" and self.steps:
            raise ValueError(f"steps belong to strategy canary, not {self.strategy}")
        return self


class DeploymentSpec(StrictModel):
    function: Name
    tenants: list[Name] = Field(default_factory=list)
    """Only these tenants are served by it."""
    shared: bool = False
    """Every tenant that may use the function is served by it."""
    placement: Placement
    replicas: Annotated[int, Field(ge=0, le=512)] | None = None
    """Replaces the function's scaling with a fixed number."""
    weight: Annotated[int, Field(ge=0, le=1000)] = 100
    """Share of the function's sessions, against its other deployments; 0: none."""
    rollout: Rollout = Field(default_factory=Rollout)
    suspend: bool = False
    """Stops its replicas; the object, its name and its status stay."""

    @model_validator(mode="after")
    def _for_someone(self) -> Self:
        if self.shared == bool(self.tenants):
            raise ValueError("give either tenants: [NAME, ...] or shared: true")
        return self


class Deployment(ObjectModel):
    """This function, for these tenants, there."""

    kind: Literal["Deployment"]
    spec: DeploymentSpec
