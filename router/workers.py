"""Several router processes behind one port, and the small supervisor above them.

The supervisor opens one listening socket a worker (SO_REUSEPORT), and keeps it: a worker that is
replaced or dies loses no connection, because its successor takes the same socket. It serves no
request itself; /metrics adds up what the workers say. SIGTERM drains all, a second one ends all,
SIGHUP replaces them one by one. Not here: what a worker does (app).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson
from aiohttp import web

from router.settings import ENV_PREFIX, Settings
from router.telemetry.merge_metrics import merge

_log: Final = logging.getLogger(__name__)

_BACKLOG: Final = 4096
_START_S: Final = 60.0
_ASK_S: Final = 5.0
_FIRST_WAIT_S: Final = 0.25
_LONGEST_WAIT_S: Final = 10.0
_FOLDER_BYTES: Final = 60
"""Of 107 that a socket's path may have."""
_STEADY_S: Final = 30.0
"""A worker that lived this long is started again without waiting."""


class WorkersFailed(RuntimeError):
    """The workers do not come up."""


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _short_folder() -> tempfile.TemporaryDirectory[str]:
    """Of this user alone, and with a path that leaves room for a socket's name."""
    usual = tempfile.gettempdir()
    return tempfile.TemporaryDirectory(
        prefix="detoserve-",
        dir=usual if len(usual) < _FOLDER_BYTES else "/tmp",  # noqa: S108 - mkdtemp makes it
    )


def _refuse_a_taken_port(host: str, port: int) -> None:
    """SO_REUSEPORT would share a port with whoever else sets it, and say nothing.

    Raises:
        OSError: the port is taken.
    """
    if port:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))


def environment(settings: Settings, number: int, descriptor: int) -> dict[str, str]:
    """A worker's environment. Settings go this way, not by flags: `ps` shows those to everybody."""
    chosen = settings.model_copy(
        update={
            "workers": 1,
            "limits_routers": max(settings.limits_routers, settings.workers),
            "listen_fd": descriptor,
            "id": f"{settings.router_id}-w{number}",
            "admin_host": "127.0.0.1",
            "admin_port": 0,
        }
    )
    out = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    for name, value in chosen.model_dump().items():
        if value is not None:
            out[ENV_PREFIX + name.upper()] = str(value)
    return out


@dataclass(slots=True)
class _Worker:
    """One process, listening and ready."""

    process: asyncio.subprocess.Process
    admin_url: str
    born: float


class Workers:
    """The supervisor: an async context manager inside a running loop. `url` is the clients'."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = ""
        self.admin_url = ""
        self._sockets: list[socket.socket] = []
        self._peers_dir: tempfile.TemporaryDirectory[str] | None = None
        self._workers: list[_Worker | None] = [None] * settings.workers
        self._stopping = False
        self._keepers: list[asyncio.Task[None]] = []
        self._old: set[asyncio.Task[None]] = set()
        self._admin: asyncio.Server | None = None
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Opens the sockets and starts all workers.

        Raises:
            OSError: a port is taken.
            WorkersFailed: a worker does not come up; it has said why on stderr.
        """
        loop = asyncio.get_running_loop()
        if self.settings.workers > 1 and self.settings.peers_dir is None:
            self._peers_dir = _short_folder()
            chosen = {"peers_dir": Path(self._peers_dir.name)}
            self.settings = self.settings.model_copy(update=chosen)
        settings = self.settings
        _refuse_a_taken_port(settings.host, settings.port)
        port = settings.port
        for _ in range(settings.workers):
            self._sockets.append(_listen(settings.host, port))
            port = self._sockets[0].getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{port}"
        self._admin = await loop.create_server(
            web.Server(self._answer, access_log=None), settings.admin_host, settings.admin_port
        )
        admin_host, admin_port = self._admin.sockets[0].getsockname()[:2]
        self.admin_url = f"http://{admin_host}:{admin_port}"
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ASK_S))
        self._workers = list(
            await asyncio.gather(*(self._spawn(n) for n in range(settings.workers)))
        )
        self._keepers = [loop.create_task(self._keep(n)) for n in range(settings.workers)]

    async def _spawn(self, number: int) -> _Worker:
        descriptor = self._sockets[number].fileno()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # what is installed, not a folder of this name where it happens to be started
            "-m",
            "router",
            env=environment(self.settings, number, descriptor),
            pass_fds=(descriptor,),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_START_S):
                line = await process.stdout.readline()
            ready: dict[str, Any] = json.loads(line)
        except (TimeoutError, ValueError):
            if process.returncode is None:
                process.kill()
            await process.wait()
            raise WorkersFailed(f"worker {number} did not start") from None
        return _Worker(process, ready["admin_url"], asyncio.get_running_loop().time())

    async def _keep(self, number: int) -> None:
        """Starts a worker again whenever it ends by itself."""
        wait_s = _FIRST_WAIT_S
        while True:
            worker = self._workers[number]
            if worker is not None:
                await worker.process.wait()
                if self._stopping:
                    return
                if self._workers[number] is not worker:
                    continue  # replaced: its successor is there already
                _log.error("worker %d ended (%s)", number, worker.process.returncode)
                self._workers[number] = None
                if asyncio.get_running_loop().time() - worker.born > _STEADY_S:
                    wait_s = _FIRST_WAIT_S
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
            if self._stopping:
                return
            try:
                self._workers[number] = await self._spawn(number)
            except WorkersFailed as error:
                _log.error("%s", error)

    async def replace_all(self) -> None:
        """New workers for old, one after the other; each old one finishes what it has."""
        for number, old in enumerate(self._workers):
            if old is None or self._is_stopping():
                continue
            try:
                new = await self._spawn(number)
            except WorkersFailed as error:
                _log.error("%s; the old ones stay", error)
                return
            self._workers[number] = new
            _signal(old, signal.SIGTERM)
            if self._is_stopping():
                _signal(new, signal.SIGTERM)
            task = asyncio.get_running_loop().create_task(_wait(old))
            self._old.add(task)
            task.add_done_callback(self._old.discard)

    def _is_stopping(self) -> bool:
        return self._stopping

    def signal_all(self, number: signal.Signals) -> None:
        """To every worker; nothing is started again from here on."""
        self._stopping = True
        for worker in self._workers:
            if worker is not None:
                _signal(worker, number)

    async def stopped(self) -> None:
        """Returns when every worker has ended, old ones too."""
        await asyncio.gather(*(_wait(w) for w in self._workers if w is not None), *self._old)

    async def close(self) -> None:
        """Ends everything that is left, at once."""
        self.signal_all(signal.SIGKILL)
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await self.stopped()
        if self._admin is not None:
            self._admin.close()
        if self._peers_dir is not None:
            self._peers_dir.cleanup()
        if self._session is not None:
            await self._session.close()
        for sock in self._sockets:
            sock.close()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        if path == "/health":
            return web.json_response({"status": "ok"})
        if path not in ("/ready", "/metrics", "/status"):
            return web.json_response(
                {"error": "there are /health, /ready, /metrics and /status"}, status=404
            )
        answers = await asyncio.gather(
            *(self._ask(w, path) for w in self._workers if w is not None)
        )
        good = [body for status, body in answers if status == 200]
        if path == "/metrics":
            return web.Response(
                body=merge([body.decode() for body in good]),
                headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
            )
        if path == "/status":
            return web.Response(
                body=orjson.dumps(
                    {
                        "id": self.settings.router_id,
                        "draining": self._stopping,
                        "workers": [orjson.loads(body) for body in good],
                    }
                ),
                content_type="application/json",
            )
        if good and not self._stopping:
            return web.Response(body=good[0], content_type="application/json")
        reason = "draining" if self._stopping else "no worker is ready"
        return web.json_response({"status": "not ready", "reason": reason}, status=503)

    async def _ask(self, worker: _Worker, path: str) -> tuple[int, bytes]:
        assert self._session is not None
        try:
            async with self._session.get(worker.admin_url + path) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError):
            return 0, b""


def _signal(worker: _Worker, number: signal.Signals) -> None:
    if worker.process.returncode is None:
        worker.process.send_signal(number)


async def _wait(worker: _Worker) -> None:
    await worker.process.wait()


async def supervise(settings: Settings, ready: Callable[[Workers], None]) -> None:
    """Runs the workers until SIGTERM or SIGINT; a second one ends them at once.

    Raises:
        What Workers.start raises.
    """
    loop = asyncio.get_running_loop()
    stop, at_once, renew = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (at_once if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    loop.add_signal_handler(signal.SIGHUP, renew.set)
    workers = Workers(settings)

    async def renewing() -> None:
        while True:
            await renew.wait()
            renew.clear()
            await workers.replace_all()

    try:
        await workers.start()
        renewer = loop.create_task(renewing())
        ready(workers)
        await stop.wait()
        workers.signal_all(signal.SIGTERM)
        renewer.cancel()
        ending = {
            loop.create_task(workers.stopped()),
            loop.create_task(at_once.wait()),
        }
        _, left = await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
    finally:
        await workers.close()
