"""A child process that is started again when it dies, and that never outlives its parent.

Two nets: the kernel kills it when the parent dies, and its pid stands in a file where the reaper
looks. Not here: engines (backends.local) or Valkey (publish.valkey).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from reconciler.again import backoff_s
from reconciler.publish import die_with_parent

log = logging.getLogger("detoserve.up")

HEALTHY_AFTER_S: Final = 30.0


class Child:
    """One supervised process. `argv[0]` is a path.

    `on_line` gets each line it prints; `on_failure` gets told, for people, when it ended by itself.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        state_dir: Path,
        env: Mapping[str, str],
        on_line: Callable[[str], None],
        on_failure: Callable[[str], None],
        stop_timeout_s: float = 15.0,
    ) -> None:
        self.name = name
        self._argv = list(argv)
        self._env = dict(env)
        self._on_line = on_line
        self._on_failure = on_failure
        self._stop_timeout_s = stop_timeout_s
        self._log_path = state_dir / "logs" / f"{name}.log"
        self._pid_path = state_dir / "up" / f"{name}.pid"
        self._stopping = False
        self._process: asyncio.subprocess.Process | None = None
        self.restarts = 0
        self._sessions: set[int] = set()

    async def run(self) -> None:
        """Keeps it running until `stop`; cancelling this kills it."""
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._pid_path.parent.mkdir(parents=True, exist_ok=True)
        failures = 0
        loop = asyncio.get_running_loop()
        try:
            while not self._stopping:
                started = loop.time()
                code = await self._once()
                if self._is_stopping():
                    return
                failures = 1 if loop.time() - started > HEALTHY_AFTER_S else failures + 1
                self.restarts += 1
                pause_s = backoff_s(
                    failures,
                    base_s=0.2,
                    cap_s=10.0,
                )
                self._on_failure(
                    f"{self.name} ended with exit code {code}; started again in {pause_s:.1f} s "
                    f"(its log: {self._log_path})"
                )
                await asyncio.sleep(pause_s)
        finally:
            self._kill()
            self._pid_path.unlink(missing_ok=True)

    async def _once(self) -> int:
        with self._log_path.open("ab") as err:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid())),
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=err,
                env=self._env,
                # Ctrl-C reaches this program alone: it decides in which order things end.
                start_new_session=True,
            )
        self._process = process
        self._sessions.add(process.pid)
        self._pid_path.write_text(f"{process.pid}\n")
        assert process.stdout is not None
        async for raw in process.stdout:
            self._on_line(raw.decode(errors="replace").rstrip("\n"))
        return await process.wait()

    @property
    def sessions(self) -> frozenset[int]:
        """Every session it led so far, by id; what it started may still be in one."""
        return frozenset(self._sessions)

    def _is_stopping(self) -> bool:
        # A call, because mypy believes that an attribute cannot change across an await.
        return self._stopping

    async def stop(self) -> None:
        """SIGTERM, time to finish, then SIGKILL."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self._stop_timeout_s):
                await process.wait()
        except TimeoutError:
            log.warning("%s did not end within %g s", self.name, self._stop_timeout_s)
            self._kill()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
