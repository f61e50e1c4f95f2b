"""The routing table: all that a router needs to serve, and nothing secret.

Whole, never a patch: a router that has one table needs no other. Lists are sorted by name, so that
equal contents give equal bytes. Not here: how it is signed (envelope) or scored (router.core).
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal

import msgspec

VERSION: Final = 1

ReplicaState = Literal["ready", "draining"]


class Record(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Base of the table's parts."""


class Replica(Record, frozen=True, kw_only=True):
    """One engine. `id` is unique over the table and is never used again for another process."""

    id: str
    url: str
    """Base of its OpenAI API, without `/v1`; may have a path of its own."""
    api_path: str = "/v1"
    """What its paths have where the OpenAI API has `/v1`; may be empty."""
    state: ReplicaState = "ready"
    """draining: finish what it has, send it nothing new."""
    spec_digest: str = ""
    """Of the spec it was started with."""
    max_concurrent: int = 0
    """0: no limit known."""


class Arm(Record, frozen=True, kw_only=True):
    """One deployment of a function in one cluster."""

    deployment: str
    cluster: str
    tenants: tuple[str, ...] = ()
    """Only these; empty: every tenant that may use the function."""
    weight: int = 100
    """Share of sessions. Where all arms have the default, nothing is divided."""
    shadow_percent: float | None = None
    """Set: serves nobody, and is sent copies of this share of the function's sessions."""
    replicas: tuple[Replica, ...] = ()


class Weights(Record, frozen=True, kw_only=True):
    kv_cache: float = 0.35
    session: float = 0.25
    load: float = 0.25
    latency: float = 0.15


class Policy(Record, frozen=True, kw_only=True):
    """How a function's requests are routed; defaults already filled in from Platform."""

    name: str = "expected-latency"
    weights: Weights = Weights()
    session_affinity: bool = True
    session_ttl_s: float = 1800.0
    connect_timeout_s: float = 2.0
    first_byte_timeout_s: float = 120.0
    between_chunks_timeout_s: float = 60.0
    retry_attempts: int = 2
    retry_budget_percent: float = 20.0
    queue_max_wait_s: float = 0.0
    """0: a request that finds every replica full is refused."""
    queue_max_requests: int = 1000
    """Waiting at one router process."""


class Price(Record, frozen=True, kw_only=True):
    """USD a million tokens."""

    input: float = 0.0
    output: float = 0.0
    cached_input: float | None = None


class Limits(Record, frozen=True, kw_only=True):
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


class Function(Record, frozen=True, kw_only=True):
    """A model as clients see it, and where it runs."""

    name: str
    served_name: str
    """The model name the engines know."""
    aliases: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    engine: str = ""
    """As Function.runtime.engine names it; "": not known."""
    policy: Policy = Policy()
    policy_since: str = ""
    """Commit from which on the policy has been as it is; the oldest known, where that is not known."""
    fallbacks: tuple[str, ...] = ()
    price: Price = Price()
    max_model_len: int | None = None
    limits: Limits = Limits()
    """Over all tenants together."""
    wake_wait_s: float = 0.0
    """Above 0: it may sleep, and a request that finds no replica waits so long for one."""
    arms: tuple[Arm, ...] = ()


class Key(Record, frozen=True, kw_only=True):
    id: str
    sha256: bytes
    """32 bytes, of the whole key."""
    not_before: float | None = None
    """Unix seconds."""
    expires: float | None = None
    scopes: tuple[str, ...] = ("inference",)
    limits: Limits = Limits()


class Budget(Record, frozen=True, kw_only=True):
    monthly_usd: float | None = None
    monthly_tokens: int | None = None
    soft_percent: float = 80.0


class Tenant(Record, frozen=True, kw_only=True):
    name: str
    keys: tuple[Key, ...] = ()
    models: tuple[str, ...] = ()
    """Globs over function names."""
    clusters: tuple[str, ...] = ("*",)
    residency: tuple[str, ...] = ()
    """Labels that a cluster must carry, all of them."""
    limits: Limits = Limits()
    budget: Budget = Budget()
    priority: int = 0
    weight: float = 1.0
    """Share of full replicas, against tenants of the same priority."""
    suspended: bool = False


class Cluster(Record, frozen=True, kw_only=True):
    name: str
    region: str = ""
    rtt_s: float | None = None
    residency: tuple[str, ...] = ()
    endpoint_cidrs: tuple[str, ...] = ()
    agent_key_sha256: str = ""


class RoutingTable(Record, frozen=True, kw_only=True):
    """One generation of everything routers serve from."""

    version: int = VERSION
    generation: int
    """Grows by at least one with every change; a router never goes back."""
    revision: str
    """Commit of the config repo it was compiled from."""
    lease: int = 0
    """Fencing generation of the reconciler that published it."""
    published_at: float
    """Unix seconds."""
    max_table_age_s: float = 3600.0
    functions: tuple[Function, ...] = ()
    tenants: tuple[Tenant, ...] = ()
    clusters: tuple[Cluster, ...] = ()


class Freshness(Record, frozen=True, kw_only=True):
    """Signed word that a generation is still current, so that an unchanged table does not age."""

    version: int = VERSION
    generation: int
    at: float
    """Unix seconds; grows."""


def content_digest(table: RoutingTable) -> str:
    """Identity of what the table says, whoever published it and whenever (hex, 32 characters)."""
    bare = msgspec.structs.replace(table, generation=0, published_at=0.0, lease=0, revision="")
    return hashlib.blake2b(msgspec.msgpack.encode(bare), digest_size=16).hexdigest()
