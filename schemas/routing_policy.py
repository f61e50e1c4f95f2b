"""How requests of a function are routed, as people set it in Function and Platform.

Not here: how the score is computed (router.core).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Name, StrictModel
from schemas.quantities import Duration

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


class SessionAffinity(StrictModel):
    """Which requests count as one conversation, and for how long its replica is remembered."""

    enabled: bool = True
    ttl: Duration = 1800.0
    """How long a pin outlives the session's last request."""


class Timeouts(StrictModel):
    """Deadlines of one attempt at one replica. There is deliberately no total one."""

    connect: Duration = 2.0
    """To open a connection to the replica."""
    first_byte: Duration = 120.0
    """From the request sent to the first byte of the answer: queueing and prefill."""
    between_chunks: Duration = 60.0
    """Between two chunks of a streamed answer."""


class Retries(StrictModel):
    """Attempts on other replicas, only before the first byte has gone to the client."""

    attempts: Annotated[int, Field(ge=0, le=10)] = 2
    """Further attempts after the first."""
    budget_percent: Annotated[float, Field(ge=0, le=100)] = 20.0
    """Retries may add at most this share to the requests of the last seconds."""


class Routing(StrictModel):
    """How requests for a function are spread over its replicas. What is unset comes from Platform."""

    policy: PolicyName | None = None
    weights: Weights | None = None
    session_affinity: SessionAffinity | None = None
    timeouts: Timeouts | None = None
    retries: Retries | None = None
    fallbacks: list[Name] = Field(default_factory=list, max_length=8)
    """Functions to try, in order, when this one cannot answer."""


class RoutingDefaults(StrictModel):
    """What a function's routing is where it does not say."""

    policy: PolicyName = "expected-latency"
    weights: Weights = Field(default_factory=Weights)
    session_affinity: SessionAffinity = Field(default_factory=SessionAffinity)
    timeouts: Timeouts = Field(default_factory=Timeouts)
    retries: Retries = Field(default_factory=Retries)
