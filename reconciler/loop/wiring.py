"""Puts the edges around the loop, from settings, and takes them down again.

The one place that knows every edge by name. Not here: what any of them does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reconciler.backends.base import Backend
from reconciler.backends.external import ExternalBackend
from reconciler.backends.local import LocalBackend
from reconciler.backends.skypilot import ApiSettings, SkyPilotBackend, SkyPilotJobs, SkyPilotPrices
from reconciler.core.signals import Signals
from reconciler.core.status import World
from reconciler.ending import end
from reconciler.errors import Fenced, Stalled, Transient
from reconciler.loop.config_reader import GitConfig
from reconciler.loop.leadership import LeaseLeadership
from reconciler.loop.ledger_task import LedgerTask
from reconciler.loop.reconciler import Reconciler
from reconciler.loop.state import StateFile
from reconciler.loop.status_task import StatusTask
from reconciler.publish import signing_key
from reconciler.publish.lease import LeaseLost, Leaser
from reconciler.publish.redis_edge import connect
from reconciler.publish.revert_branch import RevertBranches
from reconciler.publish.routers import RouterWatch
from reconciler.publish.routes import RoutesPublisher
from reconciler.publish.signals import SignalsWatch
from reconciler.publish.status_branch import StatusBranch
from reconciler.publish.usage_source import UsageSource
from reconciler.sources.git_source import GitSource
from reconciler.sources.watch import poll, watch_refs
from reconciler.sources.webhook import serve_webhook
from schemas.wire.envelope import public_key_hex

log = logging.getLogger("detoserve.reconciler")

KEEP_CURRENT_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class ReconcilerSettings:
    """One reconciler. `owner` marks everything it makes; two with one owner are the same to backends."""

    repo: str
    """Path or URL."""
    branch: str
    path: str
    """Folder within the repo; "" for all of it."""
    state_dir: Path
    redis_url: str
    owner: str
    lease_ttl_s: float = 15.0
    signing_key_file: Path | None = None
    """Of routing tables; several reconcilers of one repo share it. None: one in the state directory."""
    webhook_host: str = "127.0.0.1"
    webhook_port: int | None = None
    webhook_secret: str = ""
    skypilot: ApiSettings | None = None
    """SkyPilot's API server; None: nothing is run through SkyPilot."""


class Assembly:
    """All parts of one reconciler; `run` is the whole of its life."""

    def __init__(
        self,
        settings: ReconcilerSettings,
        *,
        on_world: Callable[[World], None] = lambda _: None,
        on_source_problem: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._on_world = on_world
        self._on_source_problem = on_source_problem
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        self._key = signing_key.load_or_create(
            settings.signing_key_file or settings.state_dir / "routes-signing-key.pem"
        )
        self.public_key = public_key_hex(self._key)
        """What routers need to believe a table."""
        self._local = LocalBackend(settings.state_dir, settings.owner, notify=self._wake)
        self._external = ExternalBackend(notify=self._wake)
        self._loop: Reconciler | None = None

    def _wake(self, *, fetch: bool = False) -> None:
        if self._loop is not None:
            self._loop.wake(fetch=fetch)

    def _heard(self, waits: bool) -> None:
        """A router has spoken. Passes come by themselves, but who waits is not kept waiting."""
        if waits:
            self._wake()

    async def run(self, stop: asyncio.Event) -> None:
        """Reconciles until `stop`; engines go on running after it.

        Raises:
            Stalled: the settings cannot be used.
        """
        settings = self._settings
        async with AsyncExitStack() as stack:
            redis = connect(settings.redis_url)
            stack.push_async_callback(redis.aclose)
            ttl_s = settings.lease_ttl_s
            me = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
            routes = RoutesPublisher(redis, self._key, settings.state_dir / "routes.table")
            routers = RouterWatch(redis, self._wake)
            signals = Signals()
            listening = SignalsWatch(redis, signals, self._heard, time.monotonic)
            source = GitSource(
                settings.repo,
                settings.state_dir / "config.git",
                branch=settings.branch,
                path=settings.path,
            )
            branches: dict[str, StatusBranch] = {}

            def status_branch() -> StatusBranch:
                name = loop.platform().status.branch
                if name not in branches:
                    branches[name] = StatusBranch(
                        settings.state_dir / "status.git",
                        settings.repo,
                        name,
                        source_branch=settings.branch,
                    )
                return branches[name]

            leadership = LeaseLeadership(
                Leaser(redis, me, ttl_s=ttl_s, timeout_s=min(2.0, ttl_s / 2)),
                floor=lambda: max(
                    [routes.newest_lease, *(b.newest_lease for b in branches.values())]
                ),
                on_change=self._wake,
            )
            writer = StatusTask(
                status_branch,
                leadership,
                debounce_s=lambda: loop.platform().intervals.status_debounce,
                on_fenced=leadership.step_up,
            )

            ledger = LedgerTask(
                status_branch,
                UsageSource(redis),
                leadership,
                self._key,
                interval_s=lambda: loop.platform().intervals.ledger,
            )

            def on_world(world: World) -> None:
                told = replace(world, month_to_date=ledger.month_to_date())
                writer.offer(told)
                self._on_world(told)

            backends: dict[str, Backend] = {b.name: b for b in (self._local, self._external)}
            skypilot = None
            if settings.skypilot is not None:
                skypilot = SkyPilotBackend(
                    settings.skypilot,
                    settings.state_dir,
                    settings.owner,
                    notify=self._wake,
                    leading=lambda: _generation(leadership),
                )
                backends[skypilot.name] = skypilot
                jobs = SkyPilotJobs(
                    skypilot.api,
                    settings.state_dir,
                    settings.owner,
                    leading=lambda: _generation(leadership),
                )
                backends[jobs.name] = jobs
            loop = self._loop = Reconciler(
                config=GitConfig(source),
                backends=backends,
                routes=routes,
                routers=routers,
                leadership=leadership,
                state_file=StateFile(settings.state_dir / "last-good.json"),
                on_world=on_world,
                on_source_problem=self._on_source_problem,
                signals=signals,
                prices=SkyPilotPrices(skypilot.api) if skypilot is not None else None,
                reverts=RevertBranches(
                    settings.state_dir / "revert.git", settings.repo, settings.branch
                ),
            )
            loop.restore()
            with contextlib.suppress(Transient):
                # Also tells the newest lease, so that an emptied Redis gives none out twice.
                await routes.current()
            await self._local.start()
            stack.push_async_callback(self._local.close)
            stack.push_async_callback(self._external.close)
            if skypilot is not None:
                await skypilot.start()
                stack.push_async_callback(skypilot.close)
            fetch = lambda: loop.wake(fetch=True)  # noqa: E731
            if settings.webhook_port is not None:
                url = await stack.enter_async_context(self._webhook(fetch))
                log.info("webhook at %s", url)
            await _live(
                loop,
                (writer.run, ledger.run),
                leadership,
                (
                    routers.run(),
                    listening.run(),
                    poll(fetch, lambda: loop.platform().intervals.poll),
                    watch_refs(settings.repo, settings.branch, fetch),
                    _keep_current(routes, leadership),
                ),
                stop,
            )

    def _webhook(self, notify: Callable[[], None]) -> AbstractAsyncContextManager[str]:
        settings = self._settings
        return serve_webhook(
            settings.webhook_host, settings.webhook_port or 0, settings.webhook_secret, notify
        )

    async def stop_engines(self) -> None:
        """Ends every engine on this machine that carries our mark; for `detoserve up`."""
        await self._local.stop_all()


def _generation(leadership: LeaseLeadership) -> int | None:
    held = leadership.held
    try:
        return held.require().generation if held else None
    except LeaseLost:
        return None


async def _live(
    loop: Reconciler,
    writers: Iterable[Callable[[asyncio.Event], Coroutine[Any, Any, None]]],
    leadership: LeaseLeadership,
    background: Iterable[Coroutine[Any, Any, None]],
    stop: asyncio.Event,
) -> None:
    """Everything at once until `stop`; then the last is written to Git, then the lease let go."""
    last_pass, last_write = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in background]
        writing = {group.create_task(write(last_pass)) for write in writers}
        leading = group.create_task(leadership.run(last_write))
        try:
            await loop.run(stop)
        finally:
            last_pass.set()
            await asyncio.wait(writing)
            last_write.set()
            await asyncio.wait({leading})
            await end(tasks)


async def _keep_current(routes: RoutesPublisher, leadership: LeaseLeadership) -> None:
    """Re-signs the table's freshness while the lease is ours, until cancelled."""
    said = ""
    while True:
        held = leadership.held
        if held is not None:
            try:
                await routes.keep_current(held)
            except (Fenced, Stalled) as error:
                if said != str(error):
                    log.warning("routes are not kept fresh: %s", error)
                said = str(error)
        await asyncio.sleep(KEEP_CURRENT_PAUSE_S)
