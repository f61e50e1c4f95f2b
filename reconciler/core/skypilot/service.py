"""A SkyServe service as SkyPilot's status shows it, and the marks by which ours are known.

The marks stand in the task's environment, which SkyPilot keeps with each version of a service: so
whose it is and what it runs can be read back from SkyPilot alone, whatever was lost here.
Not here: reading answers (backends.skypilot), or what a status means (states).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

OWNER: Final = "DETOSERVE_OWNER"
DEPLOYMENT: Final = "DETOSERVE_DEPLOYMENT"
SPEC: Final = "DETOSERVE_SPEC"
NAMESPACE: Final = "DETOSERVE_NAMESPACE"


@dataclass(frozen=True, slots=True)
class Marks:
    """What a service's newest task says of itself. `owner` "" where it carries no mark."""

    owner: str = ""
    deployment: str = ""
    spec_digest: str = ""
    replicas: int = 0
    namespace: str = ""
    """Kubernetes namespace it was told to run in; "" for the context's own."""


@dataclass(frozen=True, slots=True)
class ServiceReplica:
    """`id` counts up within one service; `version` is of the service it was started from."""

    id: int
    status: str
    version: int
    endpoint: str | None = None
    detail: str = ""
    """What SkyPilot says of its start, where it says anything."""


@dataclass(frozen=True, slots=True)
class Service:
    """`incarnation` differs for each service that ever had this name."""

    name: str
    status: str
    version: int
    incarnation: str
    marks: Marks | None
    """None while SkyPilot shows no task for it."""
    replicas: tuple[ServiceReplica, ...] = ()
    answering: bool = True
    """Its controller answers."""
