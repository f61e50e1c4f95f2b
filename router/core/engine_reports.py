"""What follows from an engine's word about itself: what it can hold, how full it is, whether to forget.

A report moves the scores of a replica that the signed table names, within bounds, and nothing else;
the callers see to the first part. Two things are compared with the report before: another (epoch,
clears) means that the engine holds nothing of what it held. And how many tokens it stored, beside how
many blocks this router thought it would, is the rate of exchange between the engine's tokens and
blocks of text: with it the index gives each replica the room that this router's own prompts really
have there. It shrinks where others' prompts and answers push them out, grows where the
engine keeps what the index had given up, and needs nobody to know the tokenizer. Without KV events a
block is as many tokens as engines count in prompts of its length. Not here: how reports come
(fleet.engine_watch, fleet.agent_listener).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, isfinite
from typing import Final

from router.core.blocks import BLOCK_BYTES, BYTES_PER_TOKEN
from router.core.index import PrefixIndex
from router.core.load import Load
from router.core.trust import Trust
from schemas.wire.events import EngineReport

EXPIRY_S: Final = 15.0
"""After so long without a word an engine's momentary state counts no more, and another agent may report it."""
CLOCK_S: Final = 60.0
"""How far a report's time may be from this router's."""
BLOCK_TOKENS: Final = BLOCK_BYTES / BYTES_PER_TOKEN
MAX_CAPACITY_TOKENS: Final = 1_000_000_000
PRIOR_TOKENS: Final = 65_536.0
"""The usual rate of exchange counts as much as so many stored tokens."""
MEMORY_TOKENS: Final = 2_000_000.0
"""Older ones fade after about so many."""
COUNTED_PRIOR_TOKENS: Final = 4_096.0
"""Four bytes a token count as much as so many that an engine counted."""
AT_MOST: Final = 4.0
"""How many times the usual rate one may be, either way."""


@dataclass(slots=True)
class _Known:
    """The last report that was believed, and what was learned up to it."""

    since: float
    """Unix seconds at which this router came to know the replica."""
    report: EngineReport | None = None
    heard_at: float = 0.0
    tokens: float = 0.0
    blocks: float = 0.0
    inserted: int = 0
    counted: float = 0.0
    estimated: float = 0.0
    """The prompts behind `counted`, as this router took them to be."""


@dataclass(slots=True)
class EngineReports:
    """Reports of all replicas of one router, by slot, and what they do to its index, loads and trust."""

    index: PrefixIndex
    load: Load
    trust: Trust
    cleared: int = 0
    """How often a replica was taken to hold nothing on an engine's word."""
    _known: dict[int, _Known] = field(default_factory=dict)

    def add(self, slot: int, now_unix_s: float) -> None:
        """A replica that nothing has been heard of."""
        self._known[slot] = _Known(now_unix_s)

    def remove(self, slot: int) -> None:
        self._known.pop(slot, None)

    def last(self, slot: int) -> EngineReport | None:
        """The newest report that was believed and has not expired."""
        known = self._known.get(slot)
        return known.report if known is not None and known.heard_at else None

    def sized(self, slot: int) -> bool:
        """Whether it was told how much the engine can hold."""
        known = self._known.get(slot)
        return known is not None and known.report is not None and known.report.capacity_blocks > 0

    def apply(self, slot: int, report: EngineReport, *, now: float, now_unix_s: float) -> str:
        """Lets a report count; says why not, or nothing. `now` is on any steady clock."""
        known = self._known.get(slot)
        if known is None:
            return "no such replica"
        if wrong := _wrong(report, now_unix_s):
            return wrong
        before = known.report
        if before is not None:
            if report.at <= before.at:
                return "not newer than the last"
            if report.agent != before.agent and now - known.heard_at < EXPIRY_S:
                return "another agent reports this replica"
        if _forgets(report, before, known.since):
            self.index.clear(slot)
            self.trust.remove(slot)
            self.cleared += 1
        self._exchange(slot, known, report, before)
        known.report, known.heard_at = report, now
        capacity_tokens = report.capacity_blocks * report.block_tokens
        if capacity_tokens:
            self.index.set_capacity(slot, max(1, int(capacity_tokens * self._rate(known))))
        self.load.set_engine(slot, capacity_tokens=capacity_tokens, kv_used=report.kv_usage)
        return ""

    def counted(self, slot: int, estimated_tokens: float, tokens: int) -> None:
        """An engine says how many tokens a prompt had, which was taken to have so many."""
        known = self._known.get(slot)
        if known is not None and estimated_tokens > 0 and tokens > 0:
            keep = exp(-tokens / MEMORY_TOKENS)
            known.counted = known.counted * keep + tokens
            known.estimated = known.estimated * keep + estimated_tokens

    def expire(self, now: float) -> None:
        """Engines of which nothing is heard any more: how full they are is not known, how large they are is."""
        for slot, known in self._known.items():
            if known.heard_at and now - known.heard_at >= EXPIRY_S:
                known.heard_at = 0.0
                report = known.report
                assert report is not None
                self.load.set_engine(
                    slot,
                    capacity_tokens=report.capacity_blocks * report.block_tokens,
                    kv_used=0.0,
                )

    def _exchange(
        self, slot: int, known: _Known, report: EngineReport, before: EngineReport | None
    ) -> None:
        """Learns from what the engine stored, and this router inserted, since the report before."""
        inserted = self.index.inserted(slot)
        if (
            before is not None
            and before.events
            and report.events
            and _life(report) == _life(before)
            and report.stored_tokens >= before.stored_tokens
        ):
            tokens = float(report.stored_tokens - before.stored_tokens)
            keep = exp(-tokens / MEMORY_TOKENS)
            known.tokens = known.tokens * keep + tokens
            known.blocks = known.blocks * keep + (inserted - known.inserted)
        known.inserted = inserted

    @staticmethod
    def _rate(known: _Known) -> float:
        """Blocks of this router's prompts for each token that the engine holds."""
        prior = COUNTED_PRIOR_TOKENS
        usual = (known.estimated + prior) / (known.counted + prior) / BLOCK_TOKENS
        rate = (known.blocks + PRIOR_TOKENS * usual) / (known.tokens + PRIOR_TOKENS)
        return min(max(rate, 1 / BLOCK_TOKENS / AT_MOST), AT_MOST / BLOCK_TOKENS)


def _life(report: EngineReport) -> tuple[int, int]:
    return report.epoch, report.clears


def _forgets(report: EngineReport, before: EngineReport | None, since: float) -> bool:
    """Whether the engine has lost its cache since this router was last told, or first sent to it."""
    if before is not None:
        return _life(report) != _life(before)
    # Epochs are milliseconds of a process's start: one later than the replica itself is another process.
    return report.epoch > since * 1000


def _wrong(report: EngineReport, now_unix_s: float) -> str:
    """What makes a report unbelievable; empty: nothing."""
    if not isfinite(report.at) or abs(report.at - now_unix_s) > CLOCK_S:
        return f"its time is more than {CLOCK_S:g} s off"
    if not 0 <= report.kv_usage <= 1:
        return "kv_usage is not within 0 and 1"
    numbers = (
        report.running, report.waiting, report.capacity_blocks, report.block_tokens,
        report.stored_tokens, report.removed_tokens, report.clears,
    )  # fmt: skip
    if min(numbers) < 0:
        return "a count is below 0"
    if report.capacity_blocks * report.block_tokens > MAX_CAPACITY_TOKENS:
        return f"it says that it holds more than {MAX_CAPACITY_TOKENS} tokens"
    return ""
