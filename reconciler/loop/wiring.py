"""Puts the edges around the loop, from settings, and takes them down again.

The one place that knows every edge by name. Not here: what any of them does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reconciler.backends.base import Backend
from reconciler.backends.external import ExternalBackend
from reconciler.backends.local import LocalBackend
from reconciler.core.status import World
from reconciler.errors import ReconcileError
from reconciler.loop.config_reader import GitConfig
from reconciler.loop.leadership import LeaseLeadership
from reconciler.loop.reconciler import Reconciler
from reconciler.loop.state import StateFile
from reconciler.loop.status_task import StatusTask
from reconciler.publish import signing_key
from reconciler.publish.lease import Leaser
from reconciler.publish.redis_edge import connect
from reconciler.publish.routers import RouterWatch
from reconciler.publish.routes import RoutesPublisher
from reconciler.sources.git_source import GitSource
from schemas.wire.envelope import public_key_hex
from schemas.wire.events import RouterHeartbeat

log = logging.getLogger("detoserve.reconciler")


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
    webhook_host: str = "127.0.0.1"
    webhook_port: int | None = None
    webhook_secret: str = ""


class Assembly:
    """All parts of one reconciler; `run` is the whole of its life."""

    def __init__(
        self, settings: ReconcilerSettings, *, on_world: Callable[[World], None] = lambda _: None
    ) -> None:
        self._settings = settings
        self._on_world = on_world
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        self._key = signing_key.load_or_create(settings.state_dir / "routes-signing-key.pem")
        self.public_key = public_key_hex(self._key)
        """What routers need to believe a table."""
        self._local = LocalBackend(settings.state_dir, settings.owner, notify=self._wake)
        self._external = ExternalBackend(notify=self._wake)
        self._loop: Reconciler | None = None

    def _wake(self, *, fetch: bool = False) -> None:
        if self._loop is not None:
            self._loop.wake(fetch=fetch)

    async def run(self, stop: asyncio.Event) -> None:
        """Reconciles until `stop`; engines go on running after it.

        Raises:
            Stalled: the settings cannot be used.
        """
        settings = self._settings
        async with AsyncExitStack() as stack:
            redis = connect(settings.redis_url)
            stack.push_async_callback(redis.aclose)
            me = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
            routes = RoutesPublisher(redis, self._key, settings.state_dir / "routes.table")
            routers = RouterWatch(redis, self._wake)
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
                Leaser(redis, me, ttl_s=settings.lease_ttl_s),
                floor=lambda: max((b.newest_lease for b in branches.values()), default=0),
                on_change=self._wake,
            )
            writer = StatusTask(
                status_branch,
                leadership,
                debounce_s=lambda: loop.platform().intervals.status_debounce,
                on_fenced=leadership.step_up,
            )

            def on_world(world: World) -> None:
                writer.offer(world)
                self._on_world(world)

            loop = self._loop = Reconciler(
                config=GitConfig(source),
                backends={b.name: b for b in (self._local, self._external)},
                routes=routes,
                routers=routers,
                leadership=leadership,
                state_file=StateFile(settings.state_dir / "last-good.json"),
                on_world=on_world,
            )
            loop.restore()
            await self._local.start()
            stack.push_async_callback(self._local.close)
            stack.push_async_callback(self._external.close)
            notice = await stack.enter_async_context(self._notices(loop))
            background = (
                routers.run(),
                _keep_current(routes, leadership),
                _fetch_on(notice, loop),
            )
            await _until_stopped(loop, writer, leadership, background, stop)

    async def stop_engines(self) -> None:
        """Ends every engine on this machine that carries our mark; for `detoserve up`."""
        await self._local.stop_all()
