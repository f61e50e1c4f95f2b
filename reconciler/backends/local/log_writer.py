"""Writes what an engine prints to a file of bounded size.

    python -I -S log_writer.py FILE SIZE_BYTES

One beside each engine, reading the other end of its standard output and error, in a session of its
own: it lives on with the engine when the reconciler ends, and ends when the last process that could
print is gone. Because the engine holds a pipe and never the file, rotation is a plain rename
(FILE -> FILE.1, so at most twice SIZE_BYTES), and a disk that is full or gone costs lines, never
the engine: the loss is noted in the file once writing works again.

The standard library alone, run by path: it starts in milliseconds and holds a few MB.
Not here: reading logs, or removing old ones (state).
"""

from __future__ import annotations

import os
import signal
import sys

_CHUNK_BYTES = 65536


class BoundedLog:
    """A file that is appended to, renamed when full, and given up on for no longer than it fails."""

    def __init__(self, path: str, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._descriptor = -1
        self._written = 0
        self._lost = 0
        self._reason = ""

    def write(self, data: bytes) -> None:
        """Writes all of it or counts what is lost; never raises OSError."""
        try:
            if self._lost:
                note = f"\n[{self._lost} bytes of output were lost here: {self._reason}]\n"
                self._append(note.encode())
                self._lost = 0
            self._append(data)
        except OSError as error:
            self._reason = error.strerror or str(error)
            self._close()

    def _append(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            if self._descriptor >= 0 and self._written + len(data) > self._size_bytes:
                self._close()
                os.replace(self._path, f"{self._path}.1")  # noqa: PTH105 - no pathlib: it is slow to import
            if self._descriptor < 0:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                self._descriptor = os.open(self._path, flags, 0o600)
                self._written = os.fstat(self._descriptor).st_size
            while rest:
                count = os.write(self._descriptor, rest)
                self._written += count
                rest = rest[count:]
        except OSError:
            self._lost += len(rest)
            raise

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def main() -> None:
    # It ends with the engine's output, and with nothing before.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXFSZ):
        signal.signal(signum, signal.SIG_IGN)
    log = BoundedLog(sys.argv[1], int(sys.argv[2]))
    while data := os.read(0, _CHUNK_BYTES):
        log.write(data)


if __name__ == "__main__":
    main()
