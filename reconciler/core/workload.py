"""What should run: one Workload for each placement of a Deployment.

Not here: how a backend runs it, or what it saw (observed).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from reconciler.core.digest import canonical_digest
from schemas.cluster import ExternalEndpoint, Provider
from schemas.deployment import Rollout
from schemas.function import Job, Model, Readiness, Resources, Runtime, Scaling

MAX_NAME: Final = 63


def workload_name(deployment: str, cluster: str) -> str:
    """Deterministic and unique: the one place a crash between create and record looks for it."""
    name = f"{deployment}--{cluster}"
    if len(name) <= MAX_NAME and name.count("--") == 1:
        return name
    # Too long, or not to be told apart where one of the names holds a double dash itself.
    mark = canonical_digest([deployment, cluster])[:12]
    return f"{re.sub('-+', '-', deployment)[: MAX_NAME - 13].rstrip('-')}-{mark}"


BackendName = Literal["local", "external", "skypilot", "skypilot-jobs"]


@dataclass(frozen=True, slots=True)
class Scheduling:
    """What of tenant, cluster and placement decides how SkyPilot runs a replica. Unset: as it likes."""

    spot: Literal["never", "allowed", "only"] = "never"
    workspace: str | None = None
    """SkyPilot workspace of the one tenant it runs for."""
    namespace: str | None = None
    """Kubernetes namespace: the tenant's, else the cluster's."""
    queue: str | None = None
    """KAI queue: the tenant's, or `shared`."""
    topology: str | None = None
    """KAI topology that keeps the pods of a replica near each other."""


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
    scheduling: Scheduling = Scheduling()
    """SkyPilot's clusters only; elsewhere it has no effect and stays unset."""
    job: Job | None = None
    """It runs once to its end, and serves nobody."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Why a workload is where it is, and what each replica takes there."""

    why: str = ""
    gpu_type: str = ""
    gpus_each: int = 0
    price_each: float | None = None
    """USD an hour; None where no price is known."""
    ceiling_each: float | None = None
    """The same should no spot instance be found."""
    max_price_per_hour: float | None = None
    """USD, of all replicas together."""


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
    shadow_percent: float | None = None
    arm: str = ""
    """What routers know it by; its deployment's name where empty."""
    scaling: Scaling | None = None
    """What moves `replicas` by load; None where Git alone says how many."""
    placement: Placed = field(default_factory=Placed)

    @property
    def routed_as(self) -> str:
        return self.arm or self.deployment

    @property
    def price_per_hour(self) -> float | None:
        """USD of all replicas; None where no price is known."""
        each = self.placement.price_each
        return None if each is None else round(each * self.replicas, 4)


@dataclass(frozen=True, slots=True)
class Desired:
    """Everything that should run, by workload name.

    `prune_blocked` says why nothing at all may be deleted in this pass, where that is so.
    """

    workloads: Mapping[str, Workload] = field(default_factory=dict)
    prune_blocked: str = ""
    shielded: Mapping[str, str] = field(default_factory=dict)
    """Deployments that are wanted, but not known as what or where; and why. What runs of them stays."""
    gpu_limits: Mapping[str, int] = field(default_factory=dict)
    """Tenant -> GPUs that its own deployments may have together."""
    deployments_before: int = 0
    """How many deployments there were before this revision; what a share of deletions is of."""
