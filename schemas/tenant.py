"""Tenant: who may use which models where, and how much. Keys stand here as hashes only."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, model_validator

from schemas.base import Name, ObjectModel, StrictModel

Scope = Literal["inference", "debug", "usage"]
Instant = Annotated[AwareDatetime, Field(strict=False)]
Pattern = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w./:@*?\[\]!-]+$")]


class Limits(StrictModel):
    """Ceilings over all routers together; unset means no ceiling."""

    requests_per_minute: Annotated[int, Field(ge=0)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=0)] | None = None
    concurrent: Annotated[int, Field(ge=0)] | None = None


class Key(StrictModel):
    """One API key. `detoserve keys create` prints the key once and writes this."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    """Public: it appears in logs, metrics and the ledger."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the whole key, in hex."""
    not_before: Instant | None = None
    expires: Instant | None = None
    scopes: Annotated[list[Scope], Field(min_length=1)] = ["inference"]
    limits: Limits = Field(default_factory=Limits)
    """Under the tenant's own."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.not_before and self.expires and self.expires <= self.not_before:
            raise ValueError("expires must be later than notBefore")
        return self


class Budget(StrictModel):
    """A calendar month's, in UTC."""

    monthly_usd: Annotated[float | None, Field(ge=0, alias="monthlyUSD")] = None
    monthly_tokens: Annotated[int, Field(ge=0)] | None = None
    soft_percent: Annotated[float, Field(ge=0, le=100)] = 80.0
    """A warning from here on; requests are refused at 100 %."""


class Gpus(StrictModel):
    """The tenant's share of GPUs, as a KAI Scheduler queue has it."""

    quota: Annotated[int, Field(ge=0)] = 0
    """Guaranteed."""
    limit: Annotated[int, Field(ge=0)] | None = None
    """Never more, also when others are idle."""
    over_quota_weight: Annotated[float, Field(ge=0)] = 1.0
    """Share of what is idle."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.limit is not None and self.limit < self.quota:
            raise ValueError(f"limit {self.limit} is below quota {self.quota}")
        return self


class TenantSpec(StrictModel):
    keys: Annotated[list[Key], Field(max_length=64)] = Field(default_factory=list)
    models: list[Pattern] = Field(default_factory=list)
    """Function names the tenant may use; globs allowed. Empty: none."""
    clusters: list[Pattern] = Field(default_factory=lambda: ["*"])
    """Clusters its requests may be served from; globs allowed."""
    limits: Limits = Field(default_factory=Limits)
    budget: Budget = Field(default_factory=Budget)
    gpus: Gpus = Field(default_factory=Gpus)
    namespace: Name | None = None
    """Kubernetes namespace of what runs for this tenant alone."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Higher is served first when replicas are full."""
    suspend: bool = False
    """Refuses the tenant's new requests; streams finish."""

    @model_validator(mode="after")
    def _unique_keys(self) -> Self:
        ids = [key.id for key in self.keys]
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            raise ValueError(f"key id {twice[0]!r} stands twice; every key needs its own id")
        return self


class Tenant(ObjectModel):
    """Who may use which models, and how much."""

    kind: Literal["Tenant"]
    spec: TenantSpec
