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
        note = b""
        if self._lost:
            note = f"\n[{self._lost} bytes of output were lost here: {self._reason}]\n".encode()
        rest = memoryview(note + data)
        try:
            self._make_room(len(rest))
            while rest:
                count = os.write(self._descriptor, rest)
                self._written += count
                rest = rest[count:]
                if len(rest) <= len(data):
                    self._lost = 0
        except OSError as error:
            self._lost += min(len(rest), len(data))
            self._reason = error.strerror or str(error)
            self.close()

    def _make_room(self, size_bytes: int) -> None:
        if self._descriptor >= 0 and self._written + size_bytes > self._size_bytes:
            self.close()
            os.replace(self._path, f"{self._path}.1")  # noqa: PTH105 - pathlib is slow to import
        if self._descriptor < 0:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o600)
            self._written = os.fstat(self._descriptor).st_size

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def main() -> None:
    # It ends with the engine's output, and with nothing before.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXFSZ):
        signal.signal(signum, signal.SIG_IGN)
    path, size_bytes = sys.argv[1], int(sys.argv[2])
    log = BoundedLog(path, size_bytes)
    while data := os.read(0, min(_CHUNK_BYTES, size_bytes)):
        log.write(data)


if __name__ == "__main__":
    main()
