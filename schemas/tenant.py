"""Tenant: who may use which models where, and how much. Keys stand here as hashes only."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AwareDatetime, BeforeValidator, Field, WithJsonSchema, model_validator

from schemas.base import Name, ObjectModel, Sha256Hex, StrictModel, Unique, Word
from schemas.limits import Limits as Limits  # noqa: PLC0414 - part of this module's names

Scope = Literal["inference", "debug", "usage"]
Glob = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./:@*?\[\]!-]+$", max_length=200)]

INSTANT_PATTERN: Final = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})$"


def _instant(value: Any) -> Any:
    if isinstance(value, datetime):
        return value
    if not isinstance(value, str) or not re.fullmatch(INSTANT_PATTERN, value):
        raise ValueError(
            f"{value!r} is no instant with a time zone; write it like '2027-01-31T00:00:00Z'"
        )
    return value


Instant = Annotated[
    AwareDatetime,
    Field(strict=False),
    BeforeValidator(_instant),
    WithJsonSchema(
        {
            "type": "string",
            "format": "date-time",
            "pattern": INSTANT_PATTERN,
            "examples": ["2027-01-31T00:00:00Z"],
        }
    ),
]


class Key(StrictModel):
    """One API key. `detoserve keys create` prints the key once and writes this."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    """Public: it appears in logs, metrics and the ledger. Unique over all tenants."""
    sha256: Sha256Hex
    """SHA-256 of the whole key, in lower-case hex."""
    not_before: Instant | None = None
    """Refused before this instant."""
    expires: Instant | None = None
    """Refused from this instant on. Unset: never."""
    scopes: Annotated[list[Scope], Field(min_length=1), Unique()] = ["inference"]
    """inference: ask models. debug: choose a replica, see decisions. usage: read the tenant's usage."""
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
    """USD, at the functions' prices."""
    monthly_tokens: Annotated[int, Field(ge=0)] | None = None
    """Prompt and answer tokens."""
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
    """Keys, what they open, and how much."""

    keys: Annotated[list[Key], Field(max_length=64)] = Field(default_factory=list)
    """API keys, by hash. Several may live at once, so that rotation overlaps."""
    models: Annotated[list[Glob], Unique()] = Field(default_factory=list)
    """Function names the tenant may use; globs allowed. Empty: none."""
    clusters: Annotated[list[Glob], Unique()] = Field(default_factory=lambda: ["*"])
    """Clusters its requests may be served from; globs allowed."""
    residency: Annotated[list[Word], Unique()] = Field(default_factory=list)
    """Its requests are served only from clusters that carry every one of these labels."""
    limits: Limits = Field(default_factory=Limits)
    """Over all its keys together."""
    budget: Budget = Field(default_factory=Budget)
    """What it may spend in a month."""
    gpus: Gpus = Field(default_factory=Gpus)
    """Its share of GPUs."""
    namespace: Name | None = None
    """Kubernetes namespace of what runs for this tenant alone."""
    workspace: Name | None = None
    """SkyPilot workspace of what runs for this tenant alone; it exists on the API server."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Higher is served first when replicas are full."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Its share of full replicas, against tenants of the same priority."""
    suspend: bool = False
    """Refuses the tenant's new requests; streams finish."""

    @model_validator(mode="after")
    def _unique_keys(self) -> Self:
        ids = [key.id for key in self.keys]
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            raise ValueError(f"key id {twice[0]!r} stands twice; every key needs its own id")
        if len({key.sha256 for key in self.keys}) < len(self.keys):
            raise ValueError("two key ids carry one sha256; every key stands once")
        return self


class Tenant(ObjectModel):
    """Who may use which models, and how much."""

    kind: Literal["Tenant"]
    """Always Tenant."""
    spec: TenantSpec
    """What the tenant may do."""
