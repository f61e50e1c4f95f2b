"""Platform: one a repo; how the reconciler and the routers behave, and defaults for the rest."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from schemas.base import ObjectModel, StrictModel
from schemas.quantities import Duration, PositiveDuration
from schemas.routing_policy import RoutingDefaults

BRANCH_PATTERN: Final = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$"
_NO_BRANCH: Final = re.compile(r"\.\.|\.lock(/|$)|\.(/|$)")


class Prune(StrictModel):
    """What may be deleted without asking."""

    max_deletions: Annotated[int, Field(ge=0)] = 3
    """One commit may delete so many deployments, or the share below where that is more."""
    max_deletions_percent: Annotated[float, Field(ge=0, le=100)] = 20.0
    """Share of what runs that one commit may delete; more needs a confirmation in the commit."""
    orphans: Literal["report", "delete"] = "report"
    """Things that carry our mark but that no commit of the repo names."""


class Intervals(StrictModel):
    """How often the reconciler looks."""

    poll: PositiveDuration = 30.0
    """Between looks at the Git remote; a webhook or a local repo is faster."""
    resync: PositiveDuration = 60.0
    """Between full passes when nothing changed, to correct drift."""
    status_debounce: Duration = 1.0
    """Changes of status within this time make one commit."""
    ledger: PositiveDuration = 60.0
    """Between commits of the usage ledger, while there is usage."""


class Status(StrictModel):
    """Where the reconciler writes what it sees."""

    branch: Annotated[str, Field(pattern=BRANCH_PATTERN, max_length=200)] = "detoserve/status"
    """An orphan branch of the config repo; only the reconciler writes it."""

    @field_validator("branch")
    @classmethod
    def _git_accepts_it(cls, branch: str) -> str:
        if _NO_BRANCH.search(branch):
            raise ValueError(
                f"{branch!r} is no branch name for Git; write it like detoserve/status"
            )
        return branch


class Auth(StrictModel):
    """How routers check keys."""

    max_table_age: PositiveDuration = 3600.0
    """Routers refuse all keys when their table is older than this: nobody could revoke one."""


class PlatformSpec(StrictModel):
    """Every field has a default; an empty spec is a good one."""

    prune: Prune = Field(default_factory=Prune)
    """What may be deleted without asking."""
    intervals: Intervals = Field(default_factory=Intervals)
    """How often the reconciler looks."""
    status: Status = Field(default_factory=Status)
    """Where the reconciler writes what it sees."""
    routing: RoutingDefaults = Field(default_factory=RoutingDefaults)
    """How requests are routed where a Function does not say."""
    auth: Auth = Field(default_factory=Auth)
    """How routers check keys."""


class Platform(ObjectModel):
    """How this repo's reconciler and routers behave."""

    kind: Literal["Platform"]
    """Always Platform."""
    spec: PlatformSpec = Field(default_factory=PlatformSpec)
    """All of it has defaults."""
