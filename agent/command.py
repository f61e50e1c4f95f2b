"""`detoserve-agent run`: flags and environment in, a running agent out.

Prints one JSON line when it runs: {"event": "ready", "id": ...}, and one whenever it follows other
engines: {"event": "following", "replicas": [...]}. Exit codes: 0 after a signal, 2 for wrong flags.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Final

import aiohttp
import typer
import uvloop
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from agent.app import Agent, Directory
from agent.ending import end
from agent.finding import Finder, FindingFailed
from agent.finding.kubernetes_pods import KubernetesPods
from agent.finding.static import StaticEngines, parse_engine
from agent.finding.table import RoutedReplicas
from agent.publishing import Sink
from agent.publishing.to_redis import ToRedis
from agent.publishing.to_routers import ToRouters
from agent.signals import stop_on_signals
from schemas.wire.envelope import public_key_from_hex
from schemas.wire.token_blocks import KEY_BYTES

_log: Final = logging.getLogger("agent")

CONTEXT: Final = {"auto_envvar_prefix": "DETOSERVE_AGENT", "max_content_width": 100}
"""Click settings: each option --some-name is also read from DETOSERVE_AGENT_SOME_NAME."""

_REPORTS_KEPT: Final = 10
"""A report expires after so many looks, and never within ten seconds."""
_BEATS_KEPT: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    agent_id: str
    cluster: str
    finder: Finder | None
    redis: Redis | None
    public_key_hex: str
    router_urls: tuple[str, ...]
    agent_key: bytes
    tls: ssl.SSLContext
    hash_key: bytes | None
    poll_interval_s: float
    heartbeat_interval_s: float


def run(
    redis_url: Annotated[
        str | None,
        typer.Option(help="Redis or Valkey that routers read: redis://[:password@]host:port/db."),
    ] = None,
    routes_public_key: Annotated[
        str | None,
        typer.Option(help="Public key that the routing table is signed with; with --redis-url."),
    ] = None,
    routes_public_key_file: Annotated[
        Path | None, typer.Option(help="The same, in a file.")
    ] = None,
    router_url: Annotated[
        list[str] | None,
        typer.Option(
            help="Where a router takes agents' reports (its --agent-port), instead of Redis;"
            " may repeat. Use https."
        ),
    ] = None,
    agent_key_file: Annotated[
        Path | None,
        typer.Option(
            help="The cluster's agent key, with --router-url. Its SHA-256 stands in Git, as"
            " agentKeySha256 of the Cluster."
        ),
    ] = None,
    router_ca_file: Annotated[
        Path | None,
        typer.Option(help="Whom to trust for --router-url (PEM), besides the system's."),
    ] = None,
    cluster: Annotated[str, typer.Option(help="Follow engines of this cluster alone.")] = "",
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="An engine: http://host:port or replica=http://host:port; may repeat. If no engine"
            " is named, all that the routing table names. Where it does not say itself where"
            " its KV events are: #events=tcp://...,replay=tcp://...,topic=... behind."
        ),
    ] = None,
    kubernetes_selector: Annotated[
        str, typer.Option(help="Find engines as pods with these labels: app=vllm.")
    ] = "",
    kubernetes_namespace: Annotated[str, typer.Option(help="Only in this namespace.")] = "",
    kubernetes_port: Annotated[
        int, typer.Option(help="Port of the pods' API; 0: the one named http.", min=0, max=65535)
    ] = 0,
    hash_key_file: Annotated[
        Path | None,
        typer.Option(
            help="32 bytes as hex, shared with routers, under which names of cached blocks are"
            " published. Unset: none are, only counts."
        ),
    ] = None,
    agent_id: Annotated[
        str, typer.Option("--id", help="Name of this agent; unset: the host's, and the cluster's.")
    ] = "",
    poll_interval_s: Annotated[
        float, typer.Option(help="How often each engine's /metrics is read.", min=0.05)
    ] = 1.0,
    heartbeat_interval_s: Annotated[
        float, typer.Option(help="How often the agent says that it lives.", min=0.1)
    ] = 5.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Follow engines: report their load, their cache's size and what becomes of it to routers."""
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if (redis_url is None) == (not router_url):
        raise typer.BadParameter("give --redis-url, or --router-url: where reports go")
    public_key = routes_public_key or ""
    if routes_public_key_file is not None:
        public_key = _read(routes_public_key_file, "--routes-public-key-file")
    if redis_url is not None:
        try:
            public_key_from_hex(public_key)
        except ValueError as error:
            raise typer.BadParameter(f"--routes-public-key: {error}") from None
    agent_key = b""
    if router_url:
        if agent_key_file is None or not cluster:
            raise typer.BadParameter("--router-url needs --agent-key-file and --cluster")
        agent_key = _read(agent_key_file, "--agent-key-file").encode()
        if len(agent_key) < 32:
            raise typer.BadParameter("--agent-key-file: a key has 32 characters or more")
    finder: Finder | None = None
    if engine and kubernetes_selector:
        raise typer.BadParameter("give --engine or --kubernetes-selector, not both")
    try:
        if engine:
            finder = StaticEngines([parse_engine(one) for one in engine])
        elif kubernetes_selector:
            finder = KubernetesPods(
                kubernetes_selector, namespace=kubernetes_namespace, port=kubernetes_port
            )
        redis = None if redis_url is None else _redis(redis_url)
    except (ValueError, FindingFailed) as error:
        raise typer.BadParameter(str(error)) from None
    settings = _Settings(
        agent_id=agent_id or "-".join(filter(None, (socket.gethostname(), cluster))),
        cluster=cluster,
        finder=finder,
        redis=redis,
        public_key_hex=public_key,
        router_urls=tuple(router_url or ()),
        agent_key=agent_key,
        tls=_tls(router_ca_file),
        hash_key=_hash_key(hash_key_file),
        poll_interval_s=poll_interval_s,
        heartbeat_interval_s=heartbeat_interval_s,
    )
    uvloop.run(_serve(settings))


def _read(file: Path, flag: str) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{flag}: {error}") from None


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise typer.BadParameter(f"--router-ca-file: {error}") from None
    return context


def _hash_key(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        key = bytes.fromhex(_read(file, "--hash-key-file"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise typer.BadParameter(f"--hash-key-file: it must hold {2 * KEY_BYTES} hex characters")
    return key


def _redis(url: str) -> Redis:
    return Redis.from_url(
        url, socket_timeout=5.0, socket_connect_timeout=5.0, retry=Retry(NoBackoff(), 0)
    )


def _own_version() -> str:
    try:
        return version("detoserve")
    except PackageNotFoundError:
        return "source"


def _print(**line: object) -> None:
    print(json.dumps(line), flush=True)  # noqa: T201 - what a supervisor reads


async def _serve(settings: _Settings) -> None:
    """Runs until SIGTERM or SIGINT; a second one ends it at once."""
    loop = asyncio.get_running_loop()
    stop = stop_on_signals()
    async with AsyncExitStack() as stack:
        directory: Directory
        sink: Sink
        if settings.redis is not None:
            stack.push_async_callback(settings.redis.aclose)
            sink = ToRedis(
                settings.redis,
                report_ttl_s=max(10.0, _REPORTS_KEPT * settings.poll_interval_s),
                heartbeat_ttl_s=_BEATS_KEPT * settings.heartbeat_interval_s,
            )
            key = public_key_from_hex(settings.public_key_hex)
            directory = RoutedReplicas(settings.redis, key, settings.cluster)
        else:
            connector = aiohttp.TCPConnector(ssl=settings.tls)
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
            directory = sink = ToRouters(
                settings.router_urls, settings.agent_key, settings.cluster, session
            )
        agent = Agent(
            agent_id=settings.agent_id,
            cluster=settings.cluster,
            directory=directory,
            sink=sink,
            finder=settings.finder,
            hash_key=settings.hash_key,
            poll_interval_s=settings.poll_interval_s,
            heartbeat_interval_s=settings.heartbeat_interval_s,
            version=_own_version(),
        )
        agent.on_followed = lambda names: _print(event="following", replicas=names)
        running = {loop.create_task(agent.run())}
        stopping = loop.create_task(stop.wait())
        _print(event="ready", id=settings.agent_id)
        await asyncio.wait({*running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await end(running)
        for task in running:
            if not task.cancelled():
                task.result()
