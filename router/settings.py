"""Every setting of the router: its flag, its environment variable, its key in a TOML file.

All three come from the fields below: `redis_url` is `--redis-url`, `DETOSERVE_ROUTER_REDIS_URL` and
`redis_url = ...`. A flag wins over the environment, which wins over the file. What concerns one
function (deadlines, retries, policy) is not here but in Git.
"""

from __future__ import annotations

import argparse
import os
import socket
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

ENV_PREFIX: Final = "DETOSERVE_ROUTER_"

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]


class SettingsInvalid(ValueError):
    """What is wrong with the settings, one line each, for whoever set them."""


def check_otlp_endpoint(url: str) -> str:
    """The URL itself, if spans can be posted there.

    Raises:
        ValueError: it is no such URL, or holds what would end up in a log.
    """
    parts = urlsplit(url)
    if parts.username is not None:
        raise ValueError("credentials do not go into the URL, but into OTEL_EXPORTER_OTLP_HEADERS")
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.port == 0
        or parts.query
        or parts.fragment
    ):
        raise ValueError("give the collector as http(s)://host[:port][/path]")
    return url


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address that clients connect to; 0.0.0.0 for all of this machine's."""
    port: Port = 8000
    """Port that clients connect to; 0 takes a free one and prints it."""
    admin_host: str = "127.0.0.1"
    """Address of /metrics and /status, which need no key: keep it private."""
    admin_port: Port = 8001
    """Port of /metrics and /status; 0 takes a free one and prints it."""
    agent_host: str = "127.0.0.1"
    """Address that agents without Redis post reports to."""
    agent_port: Port | None = None
    """Port for them; 0 takes a free one. Unset: reports come by Redis alone."""
    agent_keys_file: Path | None = None
    """Keys that such agents sign with, one a line. One counts only while a Cluster in Git names its SHA-256."""
    agent_tls_cert_file: Path | None = None
    """Certificate chain (PEM) that this port speaks TLS with. Unset: it does not; put TLS in front of it."""
    agent_tls_key_file: Path | None = None
    """Private key of that certificate."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes behind the port; about one a core. SIGHUP replaces them one by one."""
    listen_fd: int | None = None
    """A listening socket inherited from whoever started this process, instead of host and port."""
    id: Annotated[str, Field(pattern=r"^[\w.:-]{0,100}$")] = ""
    """Name of this router in heartbeats; unique among routers. Unset: host name and port."""

    redis_url: str | None = None
    """Redis or Valkey that the routing table comes from: redis://[:password@]host:port/db."""
    routes: Path | None = None
    """A routing table as a file (JSON or msgpack, unsigned) instead of Redis; re-read when it changes."""
    routes_public_key: str | None = None
    """Public key that tables from Redis must be signed with: 64 hex characters."""
    routes_public_key_file: Path | None = None
    """The same, in a file."""
    state_dir: Path | None = None
    """Folder for the last good table, from which a router starts when Redis is away. Unset: none is kept."""
    poll_interval_s: Seconds = 2.0
    """How often Redis (or the file) is asked for a newer table, besides being told of it."""
    redis_timeout_s: Seconds = 2.0
    """How long one answer of Redis may take. No request ever waits for it."""
    heartbeat_interval_s: Seconds = 5.0
    """How often this router says that it lives; its word expires after three of these."""

    max_body_bytes: Annotated[int, Field(gt=0)] = 64 * 2**20
    """Largest body of a request, decoded; beyond it 413."""
    max_in_flight: Annotated[int, Field(ge=0)] = 0
    """Requests this process carries at once; beyond it 503. 0: no ceiling."""
    index_blocks: Annotated[int, Field(ge=1)] = 500_000
    """Blocks of 256 bytes of prompt that it remembers where they are cached; about 100 bytes each."""
    sessions: Annotated[int, Field(ge=1)] = 50_000
    """Conversations that it remembers the replica of; about 300 bytes each."""
    secret_file: Path | None = None
    """A secret that all routers of a fleet share, for the hashes of sessions that they tell one another,
    and for tenants' salts in engines' caches.
    Unset: made from the public key of routes, which all of them have."""
    shadow_requests: Annotated[int, Field(ge=0)] = 64
    """Copies for shadow deployments that may run at once; beyond it copies are left out."""
    decisions_per_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20.0
    """Decisions recorded in Redis a second, at most, for `detoserve explain` and `replay`; 0: none."""
    decisions_kept: Annotated[int, Field(ge=1)] = 20_000
    """Decisions that Redis keeps for a day, over all tenants alike; some 1 KB each."""
    peers_dir: Path | None = None
    """Folder of sockets by which routers of this machine share their loads, short and private to their
    user. With more than one worker unset means one of their own. Routers share by Redis besides."""
    body_timeout_s: Seconds = 30.0
    """How long a client may pause while it sends a body."""
    client_stall_timeout_s: Seconds = 60.0
    """How long a client may read nothing of an answer that waits for it."""
    keepalive_timeout_s: Seconds = 75.0
    """How long a client's connection may be idle, or take to send a request's head."""
    upstream_keepalive_s: Seconds = 60.0
    """How long a connection to an engine is kept idle. One that the engine closes sooner is not used."""
    upstream_silence_s: Annotated[float, Field(ge=3, le=3600)] = 30.0
    """How long an engine's machine may acknowledge nothing at all before its connections count as lost."""
    probe_interval_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """How often every replica's /health is asked, besides what requests tell. 0: never."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 120.0
    """After SIGTERM: how long running requests may go on."""
    drain_delay_s: Annotated[float, Field(ge=0)] = 0.0
    """After SIGTERM: how long new connections are still taken, until load balancers have seen /ready."""

    limits_wait_s: Seconds = 0.05
    """How long a request may wait for Redis to count limits; most need not ask."""
    limits_routers: Annotated[int, Field(ge=1)] = 1
    """Router processes that share the limits, while Redis has not said yet how many there are."""
    auth_failures_per_minute: Annotated[int, Field(ge=0)] = 60
    """Wrong keys from one address, beyond which it gets 429. 0: any number."""

    access_log: str = "off"
    """One JSON line a request, without prompts: off, stderr, or a file's path."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Of the router's own log on stderr."""
    tenant_metrics: bool = False
    """Whether metrics and traces carry the tenant's name."""
    otlp_endpoint: Annotated[str, AfterValidator(check_otlp_endpoint)] | None = None
    """Traces every request, and posts spans to this collector: http(s)://host[:port], to which
    /v1/traces is added. Needs the extra `otel`. Unset: OTEL_EXPORTER_OTLP_ENDPOINT, else no traces.
    Headers, TLS, batching and attributes come from the standard OTEL_* variables."""
    trace_sample_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Share of requests that are traced, of those that bring no trace context; for the others their
    sender has decided. Unset: OTEL_TRACES_SAMPLER, else 1."""
    trace_service_name: str = ""
    """`service.name` of the spans. Unset: OTEL_SERVICE_NAME, else detoserve-router."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.redis_url is None) == (self.routes is None):
            raise ValueError("give exactly one of redis_url and routes: where the table comes from")
        if self.redis_url is not None and not (
            self.routes_public_key or self.routes_public_key_file
        ):
            raise ValueError(
                "tables from Redis must be signed: give routes_public_key, as `detoserve up` prints it"
            )
        if (self.agent_port is None) != (self.agent_keys_file is None):
            raise ValueError("give agent_port and agent_keys_file together, or neither")
        if (self.agent_tls_cert_file is None) != (self.agent_tls_key_file is None):
            raise ValueError("give agent_tls_cert_file and agent_tls_key_file together, or neither")
        if self.workers > 1 and self.agent_port == 0:
            raise ValueError(
                "several workers need one agent_port that all of them share: give its number"
            )
        if self.workers > 1 and self.listen_fd is not None:
            raise ValueError("an inherited socket is for one worker: leave workers at 1")
        return self

    @property
    def router_id(self) -> str:
        return self.id or f"{socket.gethostname()}-{self.port or os.getpid()}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parser() -> argparse.ArgumentParser:
    """Flags for every setting, with their environment variables in the help."""
    out = argparse.ArgumentParser(
        prog="detoserve-router",
        description="The OpenAI-compatible data plane of DetoServe: serves from a routing table.",
        epilog=f"Every flag may also be set in the environment as {ENV_PREFIX}<NAME>, or in the "
        "TOML file as <name> (with _ for -). Flags win over the environment, that over the file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    out.add_argument("--config", metavar="FILE", help=f"TOML file of settings [{ENV_PREFIX}CONFIG]")
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, "") else f" (default {field.default})"
        text = f"{field.description}{default} [{ENV_PREFIX}{name.upper()}]".replace("%", "%%")
        if field.annotation is bool:
            out.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=text)
        else:
            out.add_argument(_flag(name), metavar=name.rpartition("_")[2].upper(), help=text)
    return out


def load(arguments: Sequence[str] | None, environment: Mapping[str, str]) -> Settings:
    """Settings from flags, environment and file.

    Raises:
        SettingsInvalid: with every fault and where it was set.
    """
    flags = vars(parser().parse_args(arguments))
    env = {
        name: environment[ENV_PREFIX + name.upper()]
        for name in Settings.model_fields
        if ENV_PREFIX + name.upper() in environment
    }
    config = flags.pop("config", environment.get(ENV_PREFIX + "CONFIG"))
    values: dict[str, Any] = {}
    if config:
        try:
            values = tomllib.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise SettingsInvalid(f"{config}: {error}") from None
    values |= env | flags
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = []
        for fault in error.errors(include_url=False, include_input=False):
            name = str(fault["loc"][0]) if fault["loc"] else ""
            source = (
                _flag(name) if name in flags else ENV_PREFIX + name.upper() if name in env else name
            )
            message = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{source}: {message}" if source else message)
        raise SettingsInvalid("\n".join(lines)) from None
