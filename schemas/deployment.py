"""Deployment: this function, for these tenants, there."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.base import Name, ObjectModel, StrictModel, Unique, Word, also, given
from schemas.quantities import Duration


class PlacementConstraints(StrictModel):
    """Filters over the candidate clusters, before the cheapest is chosen."""

    regions: Annotated[list[Word], Unique()] = Field(default_factory=list)
    """The cluster's region must be one of these. Empty: any."""
    residency: Annotated[list[Word], Unique()] = Field(default_factory=list)
    """The cluster must carry every one of these labels."""
    providers: Annotated[list[Word], Unique()] = Field(default_factory=list)
    """The cluster's provider must be one of these: local, kubernetes, slurm, external, or a cloud such as aws."""
    spot: Literal["never", "allowed", "only"] = "never"
    """Spot instances. allowed: with a fall back to on-demand ones."""
    max_price_per_hour: Annotated[float, Field(gt=0)] | None = None
    """USD, of the whole deployment without spot discounts. Where no price is known, it is not met."""


class Placement(StrictModel):
    """Where: one named cluster, or any of several that meets the constraints."""

    model_config = also(
        {
            "oneOf": [
                given("cluster", {"type": "string"}),
                given("anyOf", {"type": "array", "minItems": 1}),
            ]
        }
    )

    cluster: Name | None = None
    """This one."""
    any_of: Annotated[list[Name], Field(max_length=64), Unique()] = Field(default_factory=list)
    """One of these, that meets the constraints; the first listed where all else is equal."""
    constraints: PlacementConstraints = Field(default_factory=PlacementConstraints)
    """What the cluster must be like."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.cluster is None) == (not self.any_of):
            raise ValueError("give either cluster: NAME or anyOf: [NAME, ...]")
        return self


class Gates(StrictModel):
    """What a canary step must keep to, read from the routers."""

    max_error_percent: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Failed requests of the new arm."""
    max_ttft_increase_percent: Annotated[float, Field(ge=0)] = 20.0
    """95th percentile of the time to first token, over the stable arm's."""
    min_cache_hit_ratio_percent: Annotated[float, Field(ge=0, le=100)] = 80.0
    """Of the stable arm's hit rate."""
    min_requests: Annotated[int, Field(ge=1)] = 20
    """A step is judged by so many requests of the new arm; until it has had them, it is held."""


class CanaryStep(StrictModel):
    """One stage on the way from the old spec to the new one."""

    weight_percent: Annotated[int, Field(ge=1, le=100)]
    """Share of the sessions that the new spec serves."""
    hold: Duration = 300.0
    """How long the gates must hold before the next step."""


class Rollout(StrictModel):
    """How a changed spec replaces the running one."""

    model_config = also(
        {
            "if": given("strategy", {"const": "canary"}),
            "then": given("steps", {"minItems": 1}),
            "else": {"properties": {"steps": {"maxItems": 0}}},
        }
    )

    strategy: Literal["rolling", "blueGreen", "canary"] = "rolling"
    """rolling: a few replicas at a time. blueGreen: all at once, when all are ready. canary: by steps."""
    max_surge: Annotated[int, Field(ge=1, le=64)] = 1
    """How many replicas more than wanted a rolling update may have."""
    drain_timeout: Duration = 120.0
    """How long a replaced replica may finish its streams."""
    steps: list[CanaryStep] = Field(default_factory=list, max_length=32)
    """Of a canary, in order; after the last one the new spec serves everything."""
    gates: Gates = Field(default_factory=Gates)
    """What every step must keep to; else the canary goes back."""

    @model_validator(mode="after")
    def _steps_for_canary(self) -> Self:
        if self.strategy == "canary" and not self.steps:
            raise ValueError(
                "strategy canary needs steps, for example [{weightPercent: 10, hold: 5m}]"
            )
        if self.strategy != "canary" and self.steps:
            raise ValueError(f"steps belong to strategy canary, not {self.strategy}")
        weights = [step.weight_percent for step in self.steps]
        if weights != sorted(set(weights)):
            raise ValueError(f"weightPercent must grow from step to step, not {weights}")
        return self


class Shadow(StrictModel):
    """Copies of live requests, to try a model out: the answers are thrown away and billed to nobody."""

    percent: Annotated[float, Field(gt=0, le=100)]
    """Share of the function's sessions whose requests are copied, whole conversations at a time."""


class DeploymentSpec(StrictModel):
    """What runs, for whom, where, and how it changes."""

    model_config = also(
        {"oneOf": [given("tenants", {"minItems": 1}), given("shared", {"const": True})]}
    )

    function: Name
    """The Function to run."""
    tenants: Annotated[list[Name], Field(max_length=1000), Unique()] = Field(default_factory=list)
    """Only these tenants are served by it."""
    shared: bool = False
    """Every tenant that may use the function is served by it."""
    placement: Placement
    """Where it runs."""
    replicas: Annotated[int, Field(ge=0, le=512)] | None = None
    """Replaces the function's scaling with a fixed number."""
    weight: Annotated[int, Field(ge=0, le=1000)] = 100
    """Share of the function's sessions; 0: none. All at 100: each goes where it is served soonest."""
    shadow: Shadow | None = None
    """Makes it a shadow: it answers nobody and gets copies only; its weight counts for nothing."""
    rollout: Rollout = Field(default_factory=Rollout)
    """How a changed spec replaces the running one."""
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
    """Always Deployment."""
    spec: DeploymentSpec
    """What runs, for whom, and where."""
