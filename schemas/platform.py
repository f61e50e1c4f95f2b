"""Platform: one a repo; how the reconciler and the routers behave, and defaults for the rest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import ObjectModel, StrictModel
from schemas.quantities import Duration
from schemas.routing_policy import RoutingDefaults


class Prune(StrictModel):
    """What may be deleted without asking."""

    max_deletions: Annotated[int, Field(ge=0)] = 3
    max_deletions_percent: Annotated[float, Field(ge=0, le=100)] = 20.0
    """One commit may delete max(maxDeletions, this share) of what runs; more needs a confirmation."""
    orphans: Literal["report", "delete"] = "report"
    """Things that carry our mark but that no commit of the repo names."""


class Intervals(StrictModel):
    poll: Duration = 30.0
    """Between looks at the Git remote; a webhook or a local repo is faster."""
    resync: Duration = 60.0
    """Between full passes when nothing changed, to correct drift."""
    status_debounce: Duration = 1.0
    """Changes of status within this time make one commit."""


class Status(StrictModel):
    branch: Annotated[str, Field(pattern=r"^[\w./-]+$", max_length=200)] = "detoserve/status"
    """An orphan branch of the config repo; only the reconciler writes it."""


class Auth(StrictModel):
    max_table_age: Duration = 3600.0
    """Routers refuse all keys when their table is older than this: nobody could revoke one."""


class PlatformSpec(StrictModel):
    prune: Prune = Field(default_factory=Prune)
    intervals: Intervals = Field(default_factory=Intervals)
    status: Status = Field(default_factory=Status)
    routing: RoutingDefaults = Field(default_factory=RoutingDefaults)
    auth: Auth = Field(default_factory=Auth)


class Platform(ObjectModel):
    """How this repo's reconciler and routers behave."""

    kind: Literal["Platform"]
    spec: PlatformSpec = Field(default_factory=PlatformSpec)
