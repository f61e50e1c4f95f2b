"""What a plan is made of. Pure data: `Create | Update | Delete | Noop`, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from reconciler.core.workload import Workload


@dataclass(frozen=True, slots=True)
class Change:
    """One field that differs. `path` like `runtime.args[2]`; absent values are None."""

    path: str
    before: object
    after: object


@dataclass(frozen=True, slots=True)
class Create:
    workload: Workload
    reason: str

    @property
    def name(self) -> str:
        return self.workload.name


@dataclass(frozen=True, slots=True)
class Update:
    """`roll`: the template changed, replicas are replaced. `scale`: only their number."""

    workload: Workload
    how: Literal["roll", "scale"]
    reason: str
    changes: tuple[Change, ...] = ()

    @property
    def name(self) -> str:
        return self.workload.name


@dataclass(frozen=True, slots=True)
class Delete:
    name: str
    deployment: str
    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Noop:
    """Nothing is done. `held` tells that something would be, were it allowed or known."""

    name: str
    deployment: str
    reason: str
    held: bool = False
    backend: str = ""
    """Where it stands, if that is not where it is wanted."""


Action = Create | Update | Delete | Noop
Effect = Create | Update | Delete


@dataclass(frozen=True, slots=True)
class Plan:
    """Ordered: what is created first, then updated, then deleted; names in order within each."""

    actions: tuple[Action, ...] = ()
    refusals: tuple[str, ...] = field(default=())
    """What was not planned because it needs a human, in sentences."""

    @property
    def effects(self) -> tuple[Effect, ...]:
        return tuple(a for a in self.actions if not isinstance(a, Noop))

    @property
    def staying(self) -> frozenset[str]:
        """Workloads that run where nothing is wanted, and that are not deleted in this pass."""
        return frozenset(a.name for a in self.actions if isinstance(a, Noop) and a.backend)

    @property
    def empty(self) -> bool:
        return not self.effects
