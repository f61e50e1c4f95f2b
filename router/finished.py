"""Who hears of a request when it is over.

Not here: what any of them makes of it.
"""

from __future__ import annotations

from router.decisions import DecisionLog, outcome
from router.fleet.signals import Signals
from router.records import RequestRecord
from router.telemetry.access_log import AccessLog
from router.telemetry.request_counts import RequestCounts


class Finished:
    """All of them, in the order in which they are told."""

    def __init__(
        self,
        counts: RequestCounts,
        signals: Signals,
        decisions: DecisionLog,
        access_log: AccessLog | None,
    ) -> None:
        self._counts = counts
        self._signals = signals
        self._decisions = decisions
        self._access_log = access_log

    def hear(self, record: RequestRecord) -> None:
        """Once for every request."""
        self._counts.finished(record)
        self._signals.finished(record)
        if record.trace is not None:
            record.trace.ended(record)
        if self._access_log is not None:
            self._access_log.write(record)
        if self._decisions.is_open(record.decision):
            self._decisions.ended(record.decision, outcome(record))
