"""The edges as the loop sees them: one narrow Protocol each, so that a pass can be tested in memory.

Not here: Backend (backends.base) and Source (sources.base), which have implementations of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from reconciler.core.config import Loaded
from reconciler.core.last_good import Objects
from reconciler.core.placement import Catalogue
from reconciler.core.price_questions import Question
from reconciler.publish.lease import Held
from reconciler.publish.revert_branch import Revert
from schemas.wire.events import RouterHeartbeat
from schemas.wire.routing import RoutingTable


class Leadership(Protocol):
    """Whether this reconciler may write, and under which fencing generation."""

    @property
    def held(self) -> Held | None:
        """None while another holds the lease, or while nobody can tell."""
        ...


class Routes(Protocol):
    """The routing table as routers will see it."""

    async def publish(self, content: RoutingTable, *, lease: Held, floor: int = 0) -> int:
        """The generation under which this content is current; a new one only when it differs.

        Raises:
            Fenced: a newer reconciler has published.
            Transient: the store did not answer in time.
        """
        ...

    async def current(self) -> RoutingTable | None:
        """The table as published, verified; None where there is none."""
        ...


class Routers(Protocol):
    """The live routers by their heartbeats."""

    def alive(self) -> Mapping[str, RouterHeartbeat] | None:
        """By router id; None while nobody can tell (the store does not answer)."""
        ...


class Prices(Protocol):
    """What GPUs cost where Git does not say."""

    async def prices(self, questions: Collection[Question]) -> Catalogue:
        """Raises: BackendUnreachable: nothing is known."""
        ...


class Reverts(Protocol):
    """Where a template that failed its canary is proposed to be taken back."""

    async def propose(self, revert: Revert) -> str:
        """The branch that was pushed.

        Raises:
            Stalled: there is nothing to take back, or the remote refuses.
            Transient: the remote did not answer.
        """
        ...


class StatusSink(Protocol):
    """Where status documents go."""

    async def read(self) -> Mapping[str, bytes]: ...

    async def write(
        self, documents: Mapping[str, bytes], *, revision: str, plan_digest: str, lease: Held
    ) -> str | None:
        """The commit made, or None when nothing differed."""
        ...


@dataclass(frozen=True, slots=True)
class Head:
    """The newest commit of the config branch, for confirmations."""

    revision: str
    message: str
    parents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading, and, where nothing was remembered, what broken files last held."""

    loaded: Loaded
    earlier: Objects = field(default_factory=dict)


class Config(Protocol):
    """The config repo, already read and loaded."""

    head: Head | None
    rewritten_from: str | None
    """The last accepted revision, where the newest commit does not descend from it."""

    async def read(self, last_good: Objects | None) -> Reading:
        """Fetches and loads; unchanged files are not parsed again.

        Raises:
            SourceUnreachable, SourceInvalid: nothing was read; what was in effect stays so.
        """
        ...
