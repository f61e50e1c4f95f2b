"""What a backend saw. Unknown is not absent: a backend that cannot be asked yields `Unknown`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """One replica's life. Only READY ones get new requests; DRAINING ones finish what they have."""

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    NOT_READY = "not-ready"
    DRAINING = "draining"
    FAILED = "failed"
    RUNNING = "running"
    """Of a job."""
    SUCCEEDED = "succeeded"
    """Of a job; the end of it."""


@dataclass(frozen=True, slots=True)
class ObservedReplica:
    """`id` is never used again for another process. `url` is the base without `/v1`."""

    id: str
    phase: Phase
    spec_digest: str
    url: str | None = None
    detail: str = ""
    """Why it is not ready, for people."""
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class ObservedWorkload:
    """A workload that carries our mark, as the backend holds it now."""

    name: str
    deployment: str
    spec_digest: str
    """Of the newest template it was told to run."""
    replicas_wanted: int
    replicas: tuple[ObservedReplica, ...] = ()
    deleting: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)
    """The newest template as plain data, so that a plan can say what changes; {} where not kept."""
    detail: str = ""
    quarantined: bool = False
    """The backend cannot say what is left of it; a human must look before its name is used again."""

    stalled: str = ""
    """Why it cannot become what it was told to be without a human; "" where it can."""

    gave_up: bool = False
    """What runs it has stopped trying to start replicas, and another try is due."""

    def count(self, phase: Phase) -> int:
        return sum(replica.phase is phase for replica in self.replicas)


@dataclass(frozen=True, slots=True)
class Observation:
    """All of ours in one backend, and the names that exist there under another mark."""

    backend: str
    workloads: Mapping[str, ObservedWorkload] = field(default_factory=dict)
    foreign: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Unknown:
    """The backend could not be asked; whatever it owns must be left alone."""

    backend: str
    reason: str
