"""Meters requests: which usage is asked of an engine, what of its answer tells it, what is recorded.

One `Metered` a request that is sent to an engine, from before it is sent until it is over. All of it
is synchronous and in memory. Not here: how records leave this process (usage_stream).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

from router.core.usage import (
    NOTHING,
    BodyReader,
    Metering,
    Reader,
    StreamReader,
    Usage,
    as_json,
)
from router.usage_journal import Journal, Opened, record_of
from schemas.wire.routing import Function

_EVENTS: Final = b"text/event-stream"
_JSON: Final = b"application/json"
_BYTES_A_TOKEN: Final = 4.0
"""Of common text: for prompts that no engine counted."""


class Metered:
    """One request. Exactly one `finish` ends it, whatever becomes of it."""

    __slots__ = ("_journal", "_opened", "_plan", "_reader", "_request_bytes", "_slot", "_task")

    def __init__(
        self, journal: Journal, opened: Opened, task: str, plan: Metering, request_bytes: int
    ) -> None:
        self._journal = journal
        self._opened = opened
        self._task = task
        self._plan = plan
        self._request_bytes = request_bytes
        self._reader: Reader | None = None
        self._slot = journal.open(opened)

    def answered(self, status: int, content_type: bytes) -> bool:
        """The head of the answer that the client will get; whether its body is to be fed."""
        self._reader = None
        if 200 <= status < 300:
            if content_type.startswith(_EVENTS):
                self._reader = StreamReader(
                    self._task,
                    drop_final=self._plan.drop_final,
                    drop_running=self._plan.drop_running,
                    choices=self._plan.choices,
                    note=partial(self._journal.running, self._slot)
                    if self._slot >= 0
                    else lambda _: None,
                )
            elif content_type.startswith(_JSON):
                self._reader = BodyReader()
        return self._reader is not None

    def feed(self, data: bytes, last: bool = False) -> bytes:
        """What the client gets of these bytes of the body; `last`: the answer ends with them."""
        reader = self._reader
        if reader is None:
            return data
        out = reader.feed(data, last)
        if last and self._slot >= 0:
            # Before the client has it: whoever is killed in between has it counted.
            used = reader.used()
            if used is not None:
                self._journal.running(self._slot, as_json(used))
        return out

    def used(self) -> Usage:
        """As far as anybody can tell."""
        used = self._reader.used() if self._reader is not None else None
        if used is None:
            return NOTHING
        if used.estimated and not used.input_tokens:
            return used._replace(input_tokens=int(self._request_bytes / _BYTES_A_TOKEN))
        return used

    def finish(
        self, *, outcome: str, replica: str = "", ttft_s: float | None = None, ended_at: float
    ) -> Usage:
        """Ends it and leaves its record; `ended_at` is Unix seconds. What it used."""
        used = self.used()
        if self._slot >= 0:
            self._journal.finish(
                self._slot,
                record_of(
                    self._opened,
                    used,
                    ended_at=ended_at,
                    outcome=outcome,
                    replica=replica,
                    ttft_s=ttft_s,
                ),
            )
            self._slot = -1
        return used


class Meter:
    """Makes a Metered for every request."""

    def __init__(self, journal: Journal, *, now: Callable[[], float] = time.time) -> None:
        self._journal = journal
        self._now = now

    def begin(
        self,
        function: Function,
        *,
        request_id: str,
        tenant: str,
        key: str,
        revision: str,
        task: str,
        plan: Metering,
        request_bytes: int,
    ) -> Metered:
        """A request that is about to be sent. `plan` is what its body was changed by."""
        opened = Opened(
            request_id,
            tenant,
            key,
            function.name,
            revision,
            self._now(),
            function.price,
        )
        return Metered(self._journal, opened, task, plan, request_bytes)
