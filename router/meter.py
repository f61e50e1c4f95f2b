"""Meters requests: which usage is asked of an engine, what of its answer tells it, what is recorded.

One `Metered` a request that was sent to an engine, from its answer's first bytes until it is over.
All of it is synchronous and in memory. Not here: how records leave this process (usage_stream).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from router.core.usage import (
    BYTES_A_TOKEN,
    NOTHING,
    UNCHANGED,
    BodyReader,
    Metering,
    Reader,
    StreamReader,
    Usage,
    as_json,
    cost_nano_usd,
    metering,
)
from router.usage_journal import Journal, Opened, record_of
from schemas.wire.routing import Function

_EVENTS: Final = b"text/event-stream"
_JSON: Final = b"application/json"


def _ignore(usage: bytes) -> None:
    del usage


class Metered:
    """One request. Exactly one `finish` ends it, whatever becomes of it."""

    __slots__ = (
        "_heard",
        "_journal",
        "_note",
        "_opened",
        "_plan",
        "_reader",
        "_request_bytes",
        "_slot",
        "_task",
        "_whole",
        "known",
    )

    def __init__(
        self,
        journal: Journal | None,
        opened: Opened,
        task: str,
        plan: Metering,
        request_bytes: int,
        heard: Callable[[str, Usage], None],
    ) -> None:
        self._heard = heard
        self._journal = journal
        self._opened = opened
        self._task = task
        self._plan = plan
        self._request_bytes = request_bytes
        self._reader: Reader | None = None
        self._whole: Usage | None = None
        """What a whole answer said, once it was there."""
        self.known = False
        """Once it has ended: whether there was any word of what was used."""
        self._note: Callable[[bytes], None] = _ignore
        self._slot = -1 if journal is None else journal.open(opened)

        if journal is not None and self._slot >= 0:
            self._note = partial(journal.running, self._slot)

    def answered(self, status: int, content_type: bytes, *, fixed: bool = False) -> bool:
        """The head of the answer that the client will get; whether its body is to be fed.

        `fixed`: its length stands in the head, and so nothing can be taken out of it.
        """
        self._reader = self._whole = None
        if 200 <= status < 300:
            if content_type.startswith(_EVENTS):
                self._reader = StreamReader(
                    self._task,
                    drop_final=self._plan.drop_final and not fixed,
                    drop_running=self._plan.drop_running and not fixed,
                    choices=self._plan.choices,
                    several=self._plan.several,
                    note=self._note,
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
        if last:
            # Before the client has it: whoever is killed in between has it counted.
            used = self._whole = reader.used()
            if used is not None and self._slot >= 0:
                self._note(as_json(used))
        return out

    def used(self) -> Usage:
        """As far as anybody can tell."""
        used = self._whole
        if used is None and self._reader is not None:
            used = self._reader.used()
        self.known = used is not None
        if used is None:
            return NOTHING
        if used.estimated and not used.input_tokens:
            return used._replace(input_tokens=int(self._request_bytes / BYTES_A_TOKEN))
        return used

    def cost_usd(self, usage: Usage) -> float:
        return cost_nano_usd(self._opened.price, usage) / 1e9

    def finish(
        self, *, outcome: str, replica: str = "", ttft_s: float | None = None, ended_at: float
    ) -> Usage:
        """Ends it and leaves its record; `ended_at` is Unix seconds. What it used."""
        used = self.used()
        self._heard(self._opened.function, used)
        if self._journal is not None and self._slot >= 0:
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
    """Makes a Metered for every request.

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
        self._journal = journal
        self._heard = heard
        self._now = now

    @property
    def wanted(self) -> bool:
        return self._journal is not None

    def plan(self, task: str, engine: str, request: Mapping[str, Any]) -> Metering:
        """What to ask of the engine; `request` is the body as parsed."""
        return UNCHANGED if self._journal is None else metering(task, engine, request)

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
        age_s: float,
    ) -> Metered:
        """A request whose answer begins. `plan` is what its body was changed by."""
        opened = Opened(
            request_id,
            tenant,
            key,
            function.name,
            revision,
            self._now() - age_s,
            function.price,
        )
        return Metered(self._journal, opened, task, plan, request_bytes, self._heard)
