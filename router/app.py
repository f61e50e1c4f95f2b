"""The life of one router process: listen, follow the table, drain, end.

Not here: settings and signals' names (cli), or any one request (proxy).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Final, Self

from aiohttp import web
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from router.admin import Admin
from router.build import version_name
from router.collector import OldGarbage
from router.decisions import DecisionLog
from router.downstream.connection import ClientServer
from router.ending import end
from router.finished import Finished
from router.fleet.agent_listener import AgentListener, read_keys, tls_of
from router.fleet.brain import Brain
from router.fleet.channels import Channel
from router.fleet.channels.redis_channel import RedisChannel
from router.fleet.channels.socket_channel import SocketChannel
from router.fleet.engine_watch import EngineWatch, ReportReader
from router.fleet.probes import Probes
from router.fleet.secret import derived, fleet_secret
from router.fleet.signals import Signals
from router.limits.limiter import Limiter
from router.proxy import Proxy
from router.server import Api
from router.session_store import SessionStore
from router.settings import Settings, SettingsInvalid
from router.shadow import Shadows
from router.state import RouterState
from router.tables.heartbeat import Heartbeat
from router.tables.static_table import StaticTable
from router.tables.table import RedisTable
from router.telemetry.access_log import AccessLog
from router.telemetry.decision_metrics import DecisionMetrics
from router.telemetry.engine_metrics import EngineMetrics
from router.telemetry.limit_metrics import LimitMetrics
from router.telemetry.metrics import Metrics
from router.telemetry.sharing_metrics import SharingMetrics
from router.telemetry.trace_settings import start_tracing
from router.telemetry.usage_metrics import UsageMetrics
from router.usage.journal import Journal
from router.usage.meter import Meter
from router.usage.stream import UsageStream
from schemas.wire.envelope import public_key_from_hex
from schemas.wire.events import EngineReport
from schemas.wire.routing import RoutingTable

_log: Final = logging.getLogger(__name__)
_BACKLOG: Final = 4096
_QUIET_S: Final = 0.25


def _public_key_text(settings: Settings) -> str:
    if settings.routes_public_key_file is None:
        return settings.routes_public_key or ""
    try:
        return settings.routes_public_key_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"routes_public_key_file: {error}") from None


class Router:
    """A router inside the running event loop: an async context manager, for programs and tests.

    `url` and `admin_url` are set once it listens.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.state = RouterState(
            upstream_keepalive_s=settings.upstream_keepalive_s,
            upstream_silence_s=settings.upstream_silence_s,
        )
        self.metrics = Metrics(self.state, tenants=settings.tenant_metrics)
        self.signals = Signals(
            self.state, settings.router_id, waiting=self._waiting, engine=self._engine
        )
        self.url = ""
        self.admin_url = ""
        self.agent_url = ""
        self._redis: Redis | None = None
        self._stack = AsyncExitStack()
        self._heartbeat: Heartbeat | None = None
        self._access_log: AccessLog | None = None
        self._decisions = DecisionLog(
            settings.router_id, per_s=settings.decisions_per_s, kept=settings.decisions_kept
        )
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._channels: list[Channel] = []
        self._clients: ClientServer | None = None
        self._journal: Journal | None = None
        self._usage: UsageStream | None = None

    async def __aenter__(self) -> Self:
        """Listens, and starts to follow the table.

        Raises:
            SettingsInvalid: what was set cannot be used.
            OSError: a port is taken.
            TableInvalid: the file of `routes` holds no table.
        """
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop()

    def _engine(self, replica: str) -> EngineReport | None:
        slot = self.brain.slots.get(replica)
        return None if slot is None else self.brain.reports.last(slot)

    def _waiting(self) -> dict[str, int]:
        return self.proxy.queues.by_function()

    async def _start(self) -> None:
        settings, loop = self.settings, asyncio.get_running_loop()
        if settings.access_log != "off":
            try:
                self._access_log = self._stack.enter_context(AccessLog(settings.access_log))
            except OSError as error:
                raise SettingsInvalid(f"access_log: {error}") from None
        secret = fleet_secret(settings, _public_key_text(settings))
        self.brain = Brain(settings.index_blocks, derived(secret, "prompt blocks"))
        self.state.on_install.append(self.brain.installed)
        reports = ReportReader(self.brain.heard)
        self.metrics.registry.register(EngineMetrics(self.brain, reports))
        self._limit()
        self._follow_table(reports)
        self._share()
        sessions = SessionStore(settings.sessions, derived(secret, "sessions"))
        shadows = Shadows(self.state, limit=settings.shadow_requests)
        self.state.on_install.append(shadows.installed)
        self._stack.callback(shadows.close)
        self.metrics.registry.register(DecisionMetrics(sessions, shadows, self._decisions))
        if self._redis is not None:
            self._tasks.append(loop.create_task(sessions.run(self._redis)))
            self._tasks.append(loop.create_task(self._decisions.run(self._redis)))
        tracing = start_tracing(settings, os.environ, version=version_name())
        if tracing is not None:
            self._stack.push_async_callback(tracing.close)
        tokens = UsageMetrics(self._usage)
        self.metrics.registry.register(tokens)
        self.proxy = Proxy(
            self.state,
            settings,
            Finished(self.metrics.counts, self.signals, self._decisions, self._access_log).hear,
            self.brain,
            tracing,
            limiter=self.limiter,
            signals=self.signals,
            sessions=sessions,
            shadows=shadows,
            decisions=self._decisions,
            meter=Meter(self._journal, tokens.used),
            salt_key=derived(secret, "cache salts"),
        )
        if self._redis is not None:
            self._tasks.append(loop.create_task(self.proxy.usage_months.run(self._redis)))
        self._stack.callback(self.proxy.queues.close)
        self.metrics.registry.register(LimitMetrics(self.limiter, self.proxy.queues))
        self._clients = ClientServer(
            Api(self.proxy),
            max_body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_s,
            keepalive_s=settings.keepalive_timeout_s,
        )
        if settings.listen_fd is None:
            self._server = await loop.create_server(
                self._clients, settings.host, settings.port, backlog=_BACKLOG
            )
        else:
            try:
                inherited = socket.socket(fileno=settings.listen_fd)
            except OSError as error:
                raise SettingsInvalid(f"listen_fd: {error}") from None
            self._server = await loop.create_server(self._clients, sock=inherited, backlog=_BACKLOG)
        admin = await loop.create_server(
            web.Server(
                Admin(self.state, self.metrics, settings.router_id),
                access_log=None,
            ),
            settings.admin_host,
            settings.admin_port,
        )
        self._stack.callback(admin.close)
        await self._hear_agents(reports)
        self.url = _url(self._server)
        self.admin_url = _url(admin)
        self._tasks.append(loop.create_task(self._sweep()))
        if settings.probe_interval_s:
            probes = Probes(self.state, interval_s=settings.probe_interval_s)
            self._tasks.append(loop.create_task(probes.run()))

    def _limit(self) -> None:
        """Counts limits in Redis, with a connection of its own: nothing else may hold it up."""
        settings = self.settings
        redis = None
        if settings.redis_url is not None:
            redis = self._connect_redis(socket_timeout=None)
        self.limiter = Limiter(
            redis,
            name=settings.router_id,
            expected_routers=settings.limits_routers,
            wait_s=settings.limits_wait_s,
        )
        self._stack.push_async_callback(self.limiter.close)
        self.state.on_install.append(self.limiter.installed)
        self._tasks.append(asyncio.get_running_loop().create_task(self.limiter.run()))

    def _connect_redis(self, *, socket_timeout: float | None) -> Redis:
        settings = self.settings
        assert settings.redis_url is not None
        try:
            redis = Redis.from_url(
                settings.redis_url,
                socket_timeout=socket_timeout,
                socket_connect_timeout=settings.redis_timeout_s,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise SettingsInvalid(f"redis_url: {error}") from None
        self._stack.push_async_callback(redis.aclose)
        return redis

    def _follow_table(self, reports: ReportReader) -> None:
        settings, loop = self.settings, asyncio.get_running_loop()
        if settings.routes is not None:
            static = StaticTable(
                self.state, settings.routes, poll_interval_s=settings.poll_interval_s
            )
            static.load()
            self._tasks.append(loop.create_task(static.run()))
            return
        assert settings.redis_url is not None
        try:
            key = public_key_from_hex(_public_key_text(settings))
        except ValueError as error:
            raise SettingsInvalid(f"routes_public_key: {error}") from None
        redis = self._redis = self._connect_redis(socket_timeout=settings.redis_timeout_s)
        self._channels.append(RedisChannel(redis))
        self._keep_usage(redis)
        table = RedisTable(
            self.state,
            redis,
            key,
            state_dir=settings.state_dir,
            poll_interval_s=settings.poll_interval_s,
            refused=self.metrics.table_refusals,
        )
        self._heartbeat = Heartbeat(
            self.state,
            redis,
            router_id=settings.router_id,
            interval_s=settings.heartbeat_interval_s,
            version=version_name(),
        )
        if table.load_from_disk():
            _log.info("started from the table kept on disk")
        self._tasks.append(loop.create_task(table.run()))
        self._tasks.append(loop.create_task(self._heartbeat.run()))
        self._tasks.append(loop.create_task(self.signals.run(redis)))
        watch = EngineWatch(redis, reports, self.brain.slots.keys)
        self._tasks.append(loop.create_task(watch.run()))

    async def _hear_agents(self, reports: ReportReader) -> None:
        """Listens for agents that have no Redis, if it is wanted."""
        settings = self.settings
        if settings.agent_port is None or settings.agent_keys_file is None:
            return

        def table() -> RoutingTable | None:
            return self.state.snapshot.table if self.state.snapshot else None

        tls = tls_of(settings)
        listener = AgentListener(read_keys(settings.agent_keys_file), table, reports, self._redis)
        server = await asyncio.get_running_loop().create_server(
            web.Server(listener, access_log=None),
            settings.agent_host,
            settings.agent_port,
            ssl=tls,
            reuse_port=settings.listen_fd is not None,  # one of several workers
        )
        self._stack.callback(server.close)
        self.agent_url = _url(server) if tls is None else _url(server).replace("http", "https", 1)

    def _keep_usage(self, redis: Redis) -> None:
        """Records of what requests use, for the reconciler's ledger."""
        state_dir = self.settings.state_dir
        folder = None if state_dir is None else state_dir / "usage"
        try:
            self._journal = Journal.create(folder)
        except OSError as error:
            _log.error("usage is kept in memory alone: %s: %s", folder, error.strerror)
            folder, self._journal = None, Journal.create(None)
        self._usage = UsageStream(redis, self._journal, folder)
        self._tasks.append(asyncio.get_running_loop().create_task(self._usage.run()))

    def _share(self) -> None:
        """Tells other routers of load and caches, and hears theirs, by every way there is to them."""
        if self.settings.peers_dir is not None:
            try:
                channel = SocketChannel(self.settings.peers_dir)
            except OSError as error:
                raise SettingsInvalid(f"peers_dir: {error}") from None
            self._stack.callback(channel.close)
            self._channels.append(channel)
        if self._channels:
            sharing = self.brain.share(self.settings.router_id)
            self.metrics.registry.register(SharingMetrics(sharing))
            self._tasks.append(asyncio.get_running_loop().create_task(sharing.run(self._channels)))

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        garbage = OldGarbage(loop.time())
        while True:
            await asyncio.sleep(1)
            self.state.sweep()
            garbage.look(loop.time(), idle=not self.state.in_flight.total)

    async def drain(self) -> None:
        """Takes nothing new, and returns when what runs has ended or the deadline has passed."""
        settings, loop = self.settings, asyncio.get_running_loop()
        self.state.draining = True
        if self._heartbeat is not None:
            self._heartbeat.say_now()
        _log.info("draining: %d requests in flight", self.state.in_flight.total)
        await asyncio.sleep(settings.drain_delay_s)
        if self._server is not None:
            self._server.close()
        deadline = loop.time() + settings.drain_timeout_s
        quiet_since = loop.time()
        # A client that has just been answered may be sending its next request on that connection.
        while loop.time() < deadline and loop.time() - quiet_since < _QUIET_S:
            await asyncio.sleep(0.02)
            if self.state.in_flight.total:
                quiet_since = loop.time()
        if self.state.in_flight.total:
            _log.warning("drain deadline: %d requests are cut", self.state.in_flight.total)

    async def _stop(self) -> None:
        self.state.draining = True
        if self._server is not None:
            self._server.close()
        await end(self._tasks)
        if self._clients is not None:
            self._clients.close()
            await asyncio.sleep(0)  # connections say that they are lost in the next pass
            for words in list(self.proxy.listening):
                words.end()
        if self._usage is not None:
            await self._usage.close()
        if self._redis is not None:
            await self._decisions.farewell(self._redis)
        if self._heartbeat is not None:
            await self._heartbeat.farewell()
        self.state.close()
        await self._stack.aclose()


def _url(server: asyncio.Server) -> str:
    bound: socket.socket = server.sockets[0]
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(settings: Settings, ready: Callable[[Router], None]) -> None:
    """Runs a router until SIGTERM or SIGINT; a second one ends it at once.

    Raises:
        What Router raises when it starts.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    at_once = asyncio.Event()

    def signalled() -> None:
        (at_once if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    async with Router(settings) as router:
        ready(router)
        await stop.wait()
        tasks = {loop.create_task(router.drain()), loop.create_task(at_once.wait())}
        _, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
