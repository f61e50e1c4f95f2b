"""One JSON line a finished request: who (key id), what (function), where, how long. No prompt.

Lines are written by a thread, so that a full disk or a reader that stands still stops no request;
what cannot be written is dropped and counted. Not here: the program's own log (logging).
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from pathlib import Path
from typing import Final, Self

import orjson

from router.records import RequestRecord

_MAX_WAITING: Final = 50_000


def _ms(later: float, earlier: float) -> float | None:
    return round((later - earlier) * 1000, 3) if later and earlier else None


def line(record: RequestRecord, at: float) -> bytes:
    """The record as JSON with a line end; `at` is the end of the request in Unix seconds."""
    return orjson.dumps(
        {
            "at": round(at, 3),
            "request_id": record.id,
            "decision": record.decision,
            "tenant": record.tenant,
            "key": record.key,
            "path": record.path.partition("?")[0][:200],
            "function": record.function,
            "replica": record.replica,
            "generation": record.generation,
            "attempts": record.attempts,
            "status": record.status,
            "outcome": record.outcome,
            "code": record.code,
            "request_bytes": record.request_bytes,
            "response_bytes": record.response_bytes,
            "ttft_ms": _ms(record.first_body, record.started),
            "duration_ms": _ms(record.ended, record.started),
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )


class AccessLog:
    """Writes lines to `target`: stderr or a path, opened for appending.

    Raises:
        OSError: when the file cannot be opened.
    """

    def __init__(self, target: str) -> None:
        self.dropped = 0
        self._waiting: queue.Queue[bytes | None] = queue.Queue(_MAX_WAITING)
        self._file = (
            sys.stderr.buffer if target == "stderr" else Path(target).open("ab")  # noqa: SIM115 - lives as long as the log
        )
        self._owned = target != "stderr"
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def write(self, record: RequestRecord) -> None:
        try:
            self._waiting.put_nowait(line(record, time.time()))
        except queue.Full:
            self.dropped += 1

    def _run(self) -> None:
        ended = False
        while not ended:
            lines = [self._waiting.get()]
            while len(lines) < 1000 and not self._waiting.empty():
                lines.append(self._waiting.get())
            ended = None in lines
            try:
                self._file.write(b"".join(text for text in lines if text))
                self._file.flush()
            except OSError:
                self.dropped += len(lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join(timeout=2)
        if self._owned:
            self._file.close()
