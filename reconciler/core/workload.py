"""What should run: one Workload for each placement of a Deployment.

Not here: how a backend runs it, or what it saw (observed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from schemas.cluster import ExternalEndpoint, Provider
from schemas.deployment import Rollout
from schemas.function import Model, Readiness, Resources, Runtime

BackendName = Literal["local", "external", "skypilot"]


@dataclass(frozen=True, slots=True)
class Template:
    """What every replica of a workload runs. A change of it rolls; nothing else does."""

    model: Model
    served_name: str
    runtime: Runtime
    resources: Resources
    readiness: Readiness
    endpoints: tuple[ExternalEndpoint, ...] = ()
    """External clusters only: the engines somebody else runs."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A deterministic name, a template, and how many. `spec_digest` is of the template alone."""

    name: str
    deployment: str
    function: str
    cluster: str
    backend: BackendName
    provider: Provider
    template: Template
    spec_digest: str
    replicas: int
    rollout: Rollout
    tenants: tuple[str, ...] = ()
    """Empty: shared."""
    weight: int = 100
    shadow_percent: float = 0.0


@dataclass(frozen=True, slots=True)
class Desired:
    """Everything that should run, by workload name.

    `prune_blocked` says why nothing at all may be deleted in this pass, where that is so.
    """

    workloads: Mapping[str, Workload] = field(default_factory=dict)
    prune_blocked: str = ""
    shielded: Mapping[str, str] = field(default_factory=dict)
    """Deployments that are wanted, but not known as what or where; and why. What runs of them stays."""
    deployments_before: int = 0
    """How many deployments there were before this revision; what a share of deletions is of."""
