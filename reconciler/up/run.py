"""Brings everything up, waits, and takes everything down. Not here: what is shown (progress)."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

import psutil

from reconciler.backends.skypilot import ApiSettings, api_settings
from reconciler.core.observed import Observation
from reconciler.core.status import World
from reconciler.errors import Stalled
from reconciler.loop.wiring import Assembly, ReconcilerSettings
from reconciler.publish.valkey import EmbeddedValkey
from reconciler.up.api_key import api_key_for
from reconciler.up.children import Child
from reconciler.up.config_repo import open_or_create
from reconciler.up.fleet_secret import secret_file
from reconciler.up.progress import Ready, Screen, all_live, deployment_lines
from reconciler.up.skypilot import local_server
from schemas.function import Function

log = logging.getLogger("detoserve.up")

DEFAULT_PORT: Final = 8080


@dataclass(frozen=True, slots=True)
class UpSettings:
    """What to bring up and where. `port` None: 8080, or a free one where that is taken."""

    config: Path
    path: str | None
    """Folder within the repo; None: `local` where it has one."""
    state_dir: Path
    host: str = "127.0.0.1"
    port: int | None = None
    redis_url: str | None = None
    skypilot: bool = False
    """Start a SkyPilot API server here, where none is named by the environment."""


@dataclass(slots=True)
class _Router:
    """What the router said of itself when it began to listen."""

    listening: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    admin_url: str = ""

    def on_line(self, line: str) -> None:
        try:
            said = json.loads(line)
        except ValueError:
            return
        if isinstance(said, dict) and said.get("event") == "ready":
            self.url, self.admin_url = said["url"], said["admin_url"]
            self.listening.set()


async def up(settings: UpSettings, screen: Screen, stop: asyncio.Event) -> None:
    """Runs until `stop`; when it returns, or however it ends, nothing that it started is left.

    Raises:
        Stalled: something here is in the way; the message says what.
    """
    async with AsyncExitStack() as stack:
        state_dir = settings.state_dir.resolve()
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        stack.enter_context(_only_one(state_dir))
        port = _port(settings, screen)
        repo = open_or_create(settings.config.resolve())
        path = settings.path
        if path is None:
            path = "local" if (repo.path / "local").is_dir() else ""
        key = api_key_for(repo, path, state_dir)
        screen.step(
            f"config repo {repo.path}" + (", made from the example" if repo.created else "")
        )

        owner = f"up-{hashlib.sha256(str(state_dir).encode()).hexdigest()[:12]}"
        await stack.enter_async_context(_reaper(state_dir, owner))
        redis_url = settings.redis_url
        if redis_url is None:
            valkey = await stack.enter_async_context(
                EmbeddedValkey(state_dir / "valkey", pid_file=state_dir / "up" / "valkey.pid")
            )
            redis_url = valkey.url
            # For commands that ask it, such as `detoserve explain`.
            (state_dir / "up" / "redis-url").write_text(redis_url, encoding="utf-8")
            screen.step("embedded Valkey")

        skypilot = await _skypilot(stack, settings, state_dir, screen)
        shown = asyncio.Event()
        newest: list[World] = []

        def on_world(world: World) -> None:
            newest[:] = [world]
            screen.world(world)
            shown.set()

        assembly = Assembly(
            ReconcilerSettings(
                repo=str(repo.path),
                branch=repo.branch,
                path=path,
                state_dir=state_dir,
                redis_url=redis_url,
                owner=owner,
                skypilot=skypilot,
            ),
            on_world=on_world,
            on_source_problem=screen.warn,
        )
        router = _Router()
        child = Child(
            "router",
            [
                *(sys.executable, "-P", "-m", "router"),
                *("--host", settings.host, "--port", str(port), "--admin-port", "0"),
                *("--redis-url", redis_url, "--routes-public-key", assembly.public_key),
                *("--state-dir", str(state_dir / "router")),
                *("--secret-file", str(secret_file(state_dir))),
            ],
            state_dir=state_dir,
            env=dict(os.environ),
            on_line=router.on_line,
            on_failure=screen.warn,
        )
        agent = Child(
            "agent",
            [
                *(sys.executable, "-P", "-m", "agent.cli", "run", "--id", owner),
                *("--redis-url", redis_url, "--routes-public-key", assembly.public_key),
            ],
            state_dir=state_dir,
            env=dict(os.environ),
            on_line=lambda _: None,
            on_failure=screen.warn,
        )
        async with asyncio.TaskGroup() as group:
            routing = group.create_task(child.run())
            following = group.create_task(agent.run())
            # It goes on until the router has said what its last requests used.
            routed = asyncio.Event()
            reconciling = group.create_task(assembly.run(routed))
            if await _until(router.listening, stop):
                screen.step(f"router at {router.url}")
            while not stop.is_set() and not (newest and all_live(newest[0])):
                shown.clear()
                await _until(shown, stop)
            if not stop.is_set():
                screen.ready(
                    Ready(
                        endpoint=f"{router.url}/v1",
                        api_key=key,
                        model=_chat_model(newest[0]),
                        config_repo=_relative(repo.path),
                        config_path=path,
                        state_dir=_relative(state_dir),
                        admin=router.admin_url,
                    )
                )
            await stop.wait()
            screen.step("stopping: the router finishes its streams")
            await child.stop()
            await routing
            await agent.stop()
            await following
            routed.set()
            await reconciling
            screen.step("stopping: engines")
            await assembly.stop_engines()
            going_on = _in_skypilot(newest[0]) if newest else []
        screen.step("stopped; nothing is left running")
        if going_on:
            screen.warn(
                f"services go on in SkyPilot, and cost what they cost: {', '.join(going_on)}; to end "
                "them, delete their deployments while detoserve runs, or: sky serve down NAME"
            )


async def _skypilot(
    stack: AsyncExitStack, settings: UpSettings, state_dir: Path, screen: Screen
) -> ApiSettings | None:
    """The API server that the environment names, else one here where it is asked for."""
    endpoint = os.environ.get("SKYPILOT_API_SERVER_ENDPOINT")
    if endpoint:
        screen.step(f"SkyPilot's API server at {endpoint}")
        return api_settings(endpoint, os.environ)
    if not settings.skypilot:
        return None
    server = local_server(state_dir, os.environ, say=screen.step, warn=screen.warn)
    return await stack.enter_async_context(server)


def _in_skypilot(world: World) -> list[str]:
    return [
        name
        for seen in world.observed
        if isinstance(seen, Observation) and seen.backend == "skypilot"
        for name, workload in seen.workloads.items()
        if not workload.deleting
    ]


async def _until(event: asyncio.Event, stop: asyncio.Event) -> bool:
    """Waits for either; True when it was `event`."""
    tasks = {asyncio.create_task(event.wait()), asyncio.create_task(stop.wait())}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    return event.is_set()


def _chat_model(world: World) -> str | None:
    """The first function that chats and has replicas."""
    serving = {line.function for line in deployment_lines(world).values() if line.ready}
    for key, obj in sorted(world.effective.objects.items()):
        if (
            isinstance(obj.value, Function)
            and key.name in serving
            and "chat" in obj.value.spec.model.tasks
        ):
            return key.name
    return None


class _Lock:
    """Holds the state directory for one `up`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> None:
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            pid = self._file.read().strip() or "?"
            self._file.close()
            raise Stalled(
                f"detoserve up runs already here (pid {pid}); stop it, or use another --state-dir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _only_one(state_dir: Path) -> _Lock:
    return _Lock(state_dir / "up.lock")


@asynccontextmanager
async def _reaper(state_dir: Path, owner: str) -> AsyncIterator[None]:
    """A process that outlives this one and ends whatever it leaves: it holds a pipe's other end."""
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "reconciler.backends.local.reaper"),
        *("--lifeline-fd", str(read_end), "--state-dir", str(state_dir), "--owner", owner),
        stdin=asyncio.subprocess.DEVNULL,
        pass_fds=(read_end,),
        start_new_session=True,
    )
    os.close(read_end)
    try:
        yield
    finally:
        os.close(write_end)
        try:
            async with asyncio.timeout(20):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _port(settings: UpSettings, screen: Screen) -> int:
    """The router's port; 0 for a free one.

    Raises:
        Stalled: the port asked for, or the address, cannot be had.
    """
    port = DEFAULT_PORT if settings.port is None else settings.port
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise Stalled(
                    f"cannot listen on {settings.host} port {port}: {error.strerror or error}; "
                    "give another --host or --port"
                ) from None
            if settings.port is not None:
                raise Stalled(
                    f"port {port} is taken by {_who(port)}; give another --port, or none"
                ) from None
            screen.warn(f"port {port} is taken by {_who(port)}; using a free one")
            return 0
    return port


def _who(port: int) -> str:
    """The process that listens on a port, as far as this user may see it."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return "another process"


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def install_signals(stop: asyncio.Event) -> None:
    """The first SIGINT or SIGTERM asks for an orderly end; the second ends at once."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signum)
            signal.signal(signum, signal.SIG_DFL)
        stop.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, first)
