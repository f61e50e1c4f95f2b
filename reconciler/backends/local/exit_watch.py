"""Tells when a process ends, whether or not it is a child of this one.

A process descriptor becomes readable at the end of its process: no thread, no signal handler, no
polling, and it works for processes that an earlier reconciler started. Not here: ending any.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from reconciler.backends.local.processes import ProcessId, is_alive


class ExitWatch:
    """Calls `ended` once, from the event loop, after the process has ended. `close` forgets it."""

    def __init__(self, process: ProcessId, ended: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = ended
        self._descriptor = -1
        self._soon: asyncio.Handle | None = None
        try:
            self._descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._soon = self._loop.call_soon(self._over)
            return
        self._loop.add_reader(self._descriptor, self._over)
        if not is_alive(process):
            # It ended before the descriptor was opened, which is of another by now or of a zombie.
            self._soon = self._loop.call_soon(self._over)

    def _over(self) -> None:
        if self._descriptor >= 0 or self._soon is not None:
            self.close()
            self._ended()

    def close(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def reap(process: ProcessId) -> str:
    """How it ended, in words; takes it off the kernel's table where it is a child of ours."""
    try:
        pid, status = os.waitpid(process.pid, os.WNOHANG)
    except ChildProcessError:
        return "ended"
    if pid == 0:
        return "ended"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
