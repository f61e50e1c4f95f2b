"""Meters requests: which usage is asked of an engine, what of its answer tells it, what is recorded.

One `Metered` a request that was sent to an engine, from its answer's first bytes until it is over.
All of it is synchronous and in memory. Not here: how records leave this process (stream).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any, Final

from router.core.shapes import NOTHING, Usage
from router.core.usage import (
    UNCHANGED,
    BodyReader,
    Metering,
    Reader,
    StreamReader,
    cost_nano_usd,
    metering,
)
from router.core.usage_json import BYTES_A_TOKEN
from router.records import RequestRecord
from router.usage.journal import Journal
from router.usage.opened import Opened
from schemas.wire.events import UsageRecord
from schemas.wire.routing import Function

_EVENTS: Final = b"text/event-stream"
_JSON: Final = b"application/json"


def _ignore(usage: bytes) -> None:
    del usage


class Metered:
    """One request. Exactly one `finish` ends it, whatever becomes of it.

    Args:
        revision: where the function's price stands.
        plan: what the request's body was changed by.
    """

    known: bool = False
    """Once it has ended: whether there was any word of what was used."""
    nano_usd: int = 0
    """Once it has ended: what it costs."""
    _stream: StreamReader | None = None
    _slot: int | None = None
    """Taken when there is something to note before the end."""

    def __init__(
        self,
        meter: Meter,
        record: RequestRecord,
        function: Function,
        revision: str,
        task: str,
        plan: Metering,
    ) -> None:
        self._meter = meter
        self._record = record
        self._function = function
        self._revision = revision
        self._task = task
        self._plan = plan
        self._reader: Reader | None = None

    def answered(self, status: int, content_type: bytes, *, fixed: bool = False) -> bool:
        """The head of the answer that the client will get; whether its body is to be fed.

        `fixed`: its length stands in the head, and so nothing can be taken out of it.
        """
        self._reader = None
        if 200 <= status < 300:
            if content_type.startswith(_EVENTS):
                self._reader = self._stream = StreamReader(
                    self._task,
                    drop_final=self._plan.drop_final and not fixed,
                    drop_running=self._plan.drop_running and not fixed,
                    choices=self._plan.choices,
                    several=self._plan.several,
                    note=self._first_note,
                )
            elif content_type.startswith(_JSON):
                self._reader = BodyReader()
        return self._reader is not None

    @property
    def listens(self) -> bool:
        """Whether the body is fed, as `answered` said."""
        return self._reader is not None

    def _first_note(self, usage: bytes) -> None:
        journal, stream = self._meter.journal, self._stream
        assert stream is not None
        stream.note = _ignore
        if journal is not None:
            slot = journal.open(self._opened(self._meter.now()))
            if slot >= 0:
                self._slot = slot
                stream.note = partial(journal.running, slot)
                stream.note(usage)

    @property
    def feed(self) -> Callable[[bytes, bool], bytes]:
        """Gives the client's part of some bytes of the body; True: the answer ends with them."""
        assert self._reader is not None
        return self._reader.feed

    def used(self) -> Usage:
        """As far as anybody can tell."""
        used = self._reader.used() if self._reader is not None else None
        self.known = used is not None
        if used is None:
            return NOTHING
        if used.estimated and not used.input_tokens:
            prompt = int(self._record.request_bytes / BYTES_A_TOKEN)
            return Usage(prompt, used.cached_tokens, used.output_tokens, estimated=True)
        return used

    def finish(self) -> Usage:
        """Ends it and leaves its record. What it used."""
        used = self.used()
        meter, record, function = self._meter, self._record, self._function
        meter.heard(function.name, used)
        self.nano_usd = cost = cost_nano_usd(function.price, used)
        journal = meter.journal
        if journal is not None:
            duration_s = perf_counter() - record.started
            made = UsageRecord(
                journal.name,
                journal.seq + 1,
                record.id,
                record.tenant,
                record.key,
                function.name,
                self._revision,
                meter.now() - duration_s,
                record.replica,
                used.input_tokens,
                used.cached_tokens,
                used.output_tokens,
                cost,
                used.estimated,
                record.first_body - record.started if record.first_body else None,
                duration_s,
                record.outcome,
            )
            journal.finish(self._slot, made)
        return used

    def _opened(self, now: float) -> Opened:
        record, function = self._record, self._function
        started_at = now - (perf_counter() - record.started)
        return Opened(
            record.id,
            record.tenant,
            record.key,
            function.name,
            self._revision,
            started_at,
            function.price,
        )


class Meter:
    """What every Metered goes by.

    Args:
        journal: where records are kept; None: nobody wants them, and engines are asked for nothing.
        heard: is told of every request's function and usage.
    """

    def __init__(
        self,
        journal: Journal | None,
        heard: Callable[[str, Usage], None],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.journal = journal
        self.heard = heard
        self.now = now

    @property
    def wanted(self) -> bool:
        return self.journal is not None

    def plan(self, task: str, engine: str, request: Mapping[str, Any]) -> Metering:
        """What to ask of the engine; `request` is the body as parsed."""
        return UNCHANGED if self.journal is None else metering(task, engine, request)
