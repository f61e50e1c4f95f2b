"""How requests of a function are routed, as people set it in Function and Platform.

Not here: how the score is computed (router.core).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator

from schemas.base import Name, StrictModel, Unique
from schemas.quantities import Duration, PositiveDuration

PolicyName = Literal[
    "expected-latency",
    "linear",
    "least-load",
    "session",
    "round-robin",
    "random-two-choices",
]

Weight = Annotated[float, Field(ge=0, le=10)]


class Weights(StrictModel):
    """The four signals of the score; multipliers, so only their ratios matter."""

    kv_cache: Weight = 0.35
    """What a replica already holds of the prompt."""
    session: Weight = 0.25
    """The replica that served this session before."""
    load: Weight = 0.25
    """Work queued ahead of the request."""
    latency: Weight = 0.15
    """Network round trip to the replica."""

    @model_validator(mode="after")
    def _some_signal(self) -> Self:
        if not (self.kv_cache or self.session or self.load or self.latency):
            raise ValueError("all four weights are 0: nothing would tell replicas apart")
        return self


class SessionAffinity(StrictModel):
    """Which requests count as one conversation, and for how long its replica is remembered."""

    enabled: bool = True
    """Whether a session's replica is remembered at all."""
    ttl: PositiveDuration = 1800.0
    """How long a pin outlives the session's last request."""


class Timeouts(StrictModel):
    """Deadlines of one attempt at one replica. There is deliberately no total one."""

    connect: PositiveDuration = 2.0
    """To open a connection to the replica."""
    first_byte: PositiveDuration = 120.0
    """From the request sent to the first byte of the answer: queueing and prefill."""
    between_chunks: PositiveDuration = 60.0
    """Between two chunks of a streamed answer."""


class Retries(StrictModel):
    """Attempts on other replicas, only before the first byte has gone to the client."""

    attempts: Annotated[int, Field(ge=0, le=10)] = 2
    """Further attempts after the first."""
    budget_percent: Annotated[float, Field(ge=0, le=100)] = 20.0
    """Retries may add at most this share to the requests of the last seconds."""


class Queue(StrictModel):
    """Where requests wait while every replica has as many as it may. Between tenants it is fair."""

    max_wait: Duration = 30.0
    """A request that would wait longer is refused at once. 0: none waits."""
    max_requests: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Of this function, waiting at one router process."""


class Routing(StrictModel):
    """How requests for a function are spread over its replicas. What is unset comes from Platform."""

    policy: PolicyName | None = None
    """How a replica is chosen."""
    weights: Weights | None = None
    """Of the four signals, for the policies expected-latency and linear."""
    session_affinity: SessionAffinity | None = None
    """Whether conversations stay where they were."""
    timeouts: Timeouts | None = None
    """Deadlines of one attempt."""
    retries: Retries | None = None
    """Attempts on other replicas."""
    queue: Queue | None = None
    """Where requests wait while replicas are full."""
    max_concurrent: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Requests on one replica at once; further ones go elsewhere or wait. Unset: no such limit."""
    fallbacks: Annotated[list[Name], Field(max_length=8), Unique()] = Field(default_factory=list)
    """Functions to try, in order, when this one cannot answer."""


class RoutingDefaults(StrictModel):
    """What a function's routing is where it does not say."""

    policy: PolicyName = "expected-latency"
    """How a replica is chosen."""
    weights: Weights = Field(default_factory=Weights)
    """Of the four signals, for the policies expected-latency and linear."""
    session_affinity: SessionAffinity = Field(default_factory=SessionAffinity)
    """Whether conversations stay where they were."""
    timeouts: Timeouts = Field(default_factory=Timeouts)
    """Deadlines of one attempt."""
    retries: Retries = Field(default_factory=Retries)
    """Attempts on other replicas."""
    queue: Queue = Field(default_factory=Queue)
    """Where requests wait while replicas are full."""


_Group = TypeVar("_Group", Weights, SessionAffinity, Timeouts, Retries, Queue)


def _over(base: _Group, mine: _Group | None) -> _Group:
    if mine is None:
        return base
    return base.model_copy(update={name: getattr(mine, name) for name in mine.model_fields_set})


def resolve(mine: Routing, defaults: RoutingDefaults) -> RoutingDefaults:
    """A function's effective routing, field by field: what it wrote itself, else Platform's."""
    return RoutingDefaults.model_construct(
        policy=mine.policy or defaults.policy,
        weights=_over(defaults.weights, mine.weights),
        session_affinity=_over(defaults.session_affinity, mine.session_affinity),
        timeouts=_over(defaults.timeouts, mine.timeouts),
        retries=_over(defaults.retries, mine.retries),
        queue=_over(defaults.queue, mine.queue),
    )
