"""The usage ledger: what every tenant, key and function used on each day (UTC), and how far it goes.

Pure. A record is counted once however often it is read: each journal's greatest number is part of
the ledger itself. Sums are whole numbers, so that order does not matter. Not here: where records come
from (publish.usage_source), signatures (publish.ledger_file), or the branch they are committed to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple

from schemas.wire.events import MonthToDate, UsageRecord

CURSOR_PATH: Final = "usage/cursor.yaml"
_DAY_PATH: Final = re.compile(r"usage/(\d{4}-\d{2})/(\1-\d{2})\.yaml")
_NANO: Final = Decimal(10) ** 9
_FORGET_JOURNALS: Final = timedelta(days=45)
_LATEST_S: Final = 253402300799.0
"""The end of the year 9999, beyond which there are no dates."""


class LedgerInvalid(ValueError):
    """A document that is none of the ledger's; says which and why."""


class Row(NamedTuple):
    """What usage is kept by."""

    tenant: str
    key: str
    function: str


@dataclass(frozen=True, slots=True)
class Sums:
    """Usage added up. `cached_tokens` are among `input_tokens`."""

    requests: int = 0
    estimated_requests: int = 0
    """Of them, counted by routers because the engine did not say."""
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost_nano_usd: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.requests + other.requests,
            self.estimated_requests + other.estimated_requests,
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.cost_nano_usd + other.cost_nano_usd,
        )

    @property
    def cost_usd(self) -> Decimal:
        return Decimal(self.cost_nano_usd) / _NANO


NOTHING: Final = Sums()
Day = Mapping[Row, Sums]


@dataclass(frozen=True, slots=True)
class Position:
    """How far a journal has been counted."""

    seq: int
    day: str
    """Of its newest record, like 2026-11-23."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """Days by date. Those that are not loaded are not among them, and must not be added to."""

    days: Mapping[str, Day] = field(default_factory=dict)
    journals: Mapping[str, Position] = field(default_factory=dict)


def day_of(record: UsageRecord) -> str | None:
    """The date on which the request ended; None where it says no time that there is."""
    ended_at = record.started_at + record.duration_s
    if not 0 <= ended_at <= _LATEST_S:
        return None
    return datetime.fromtimestamp(ended_at, UTC).date().isoformat()


def month_of(day: str) -> str:
    return day[:7]


def day_path(day: str) -> str:
    return f"usage/{month_of(day)}/{day}.yaml"


def day_in(path: str) -> str | None:
    """The date of a day's document; None for any other path."""
    found = _DAY_PATH.fullmatch(path)
    return found.group(2) if found else None


def is_new(ledger: Ledger, record: UsageRecord) -> bool:
    """Whether it has not been counted."""
    known = ledger.journals.get(record.journal)
    return known is None or record.seq > known.seq


def counted(ledger: Ledger, records: Iterable[UsageRecord]) -> Ledger:
    """With these records in it, those that are new. The days they belong to are loaded.

    A record without a day is passed over.
    """
    days: dict[str, Day] = dict(ledger.days)
    journals = dict(ledger.journals)
    touched: dict[str, dict[Row, Sums]] = {}
    for record in records:
        known = journals.get(record.journal)
        day = day_of(record)
        if known is not None and record.seq <= known.seq:
            continue
        newest = max(day or "", known.day if known else "")
        journals[record.journal] = Position(record.seq, newest)
        if day is None:
            continue
        rows = touched.get(day)
        if rows is None:
            rows = touched[day] = dict(days.get(day, {}))
        row = Row(record.tenant, record.key, record.function)
        rows[row] = rows.get(row, NOTHING) + Sums(
            1,
            int(record.estimated),
            record.input_tokens,
            record.cached_tokens,
            record.output_tokens,
            record.cost_nano_usd,
        )
    return Ledger({**days, **touched}, journals)


def changed_days(before: Ledger, after: Ledger) -> list[str]:
    return [day for day, rows in sorted(after.days.items()) if before.days.get(day) is not rows]


def total(rows: Iterable[Sums]) -> Sums:
    out = NOTHING
    for sums in rows:
        out += sums
    return out


def without_old_journals(ledger: Ledger, today: str) -> Ledger:
    """Without journals that nothing has come from for so long that nothing will."""
    oldest = (datetime.fromisoformat(today) - _FORGET_JOURNALS).date().isoformat()
    kept = {name: at for name, at in ledger.journals.items() if at.day >= oldest}
    return replace(ledger, journals=kept)


def months_to_date(ledger: Ledger, months: Iterable[str]) -> dict[str, dict[str, MonthToDate]]:
    """Month -> tenant -> its sums, over the days that are loaded: all of those months."""
    out: dict[str, dict[str, Sums]] = {month: {} for month in months}
    for day, rows in ledger.days.items():
        tenants = out.get(month_of(day))
        if tenants is not None:
            for row, sums in rows.items():
                tenants[row.tenant] = tenants.get(row.tenant, NOTHING) + sums
    return {
        month: {
            tenant: MonthToDate(
                requests=sums.requests,
                input_tokens=sums.input_tokens,
                cached_tokens=sums.cached_tokens,
                output_tokens=sums.output_tokens,
                cost_nano_usd=sums.cost_nano_usd,
            )
            for tenant, sums in sorted(tenants.items())
        }
        for month, tenants in out.items()
    }


# As documents.


def _sums_document(sums: Sums) -> dict[str, Any]:
    estimated = {"estimatedRequests": sums.estimated_requests} if sums.estimated_requests else {}
    return {
        "requests": sums.requests,
        **estimated,
        "inputTokens": sums.input_tokens,
        "cachedTokens": sums.cached_tokens,
        "outputTokens": sums.output_tokens,
        "costUSD": f"{sums.cost_usd:.9f}",
    }


def day_document(day: str, rows: Day) -> dict[str, Any]:
    """Totals, then rows in order; unsigned."""
    return {
        "kind": "UsageDay",
        "date": day,
        "totals": _sums_document(total(rows.values())),
        "rows": [{**row._asdict(), **_sums_document(sums)} for row, sums in sorted(rows.items())],
    }


def _whole(document: Mapping[str, Any], name: str) -> int:
    value = document.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise LedgerInvalid(f"{name} is {value!r}, not a count")
    return value


def _sums(document: Mapping[str, Any]) -> Sums:
    try:
        cost = int(Decimal(str(document.get("costUSD", "0"))) * _NANO)
    except (ArithmeticError, ValueError):
        raise LedgerInvalid("costUSD is no number") from None
    return Sums(
        _whole(document, "requests"),
        _whole(document, "estimatedRequests"),
        _whole(document, "inputTokens"),
        _whole(document, "cachedTokens"),
        _whole(document, "outputTokens"),
        cost,
    )


def parse_day(document: Any) -> tuple[str, Day]:
    """The date and rows of a day's document.

    Raises:
        LedgerInvalid: it is none, or its totals are not those of its rows.
    """
    if not isinstance(document, dict) or document.get("kind") != "UsageDay":
        raise LedgerInvalid("it is not a UsageDay")
    rows: dict[Row, Sums] = {}
    for each in document.get("rows") or []:
        if not isinstance(each, dict):
            raise LedgerInvalid("a row is not a mapping")
        rows[Row(*(str(each.get(name, "")) for name in Row._fields))] = _sums(each)
    totals = document.get("totals")
    if not isinstance(totals, dict) or _sums(totals) != total(rows.values()):
        raise LedgerInvalid("its totals are not the sums of its rows")
    return str(document.get("date")), rows


def cursor_document(journals: Mapping[str, Position]) -> dict[str, Any]:
    return {
        "kind": "UsageCursor",
        "journals": {name: {"seq": at.seq, "day": at.day} for name, at in sorted(journals.items())},
    }


def parse_cursor(document: Any) -> dict[str, Position]:
    """How far every journal has been counted.

    Raises:
        LedgerInvalid: the document is no cursor.
    """
    if not isinstance(document, dict) or document.get("kind") != "UsageCursor":
        raise LedgerInvalid("it is not a UsageCursor")
    out = {}
    for name, at in (document.get("journals") or {}).items():
        if not isinstance(at, dict):
            raise LedgerInvalid(f"journal {name!r} has no position")
        out[str(name)] = Position(_whole(at, "seq"), str(at.get("day", "")))
    return out
