"""The usage ledger as people and scripts read it: rows added up, a table with bars, CSV, JSON. Pure.

Not here: reading Git or checking signatures (usage), or adding records up (core.ledger).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from reconciler.cli.terminal import Paint
from reconciler.core.ledger import NOTHING, Day, Sums, total

By = Literal["tenant", "key", "function", "day"]

_BAR_CELLS: Final = 20
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_COUNTS: Final = ("requests", "input", "cached", "output", "cost USD")
_CSV_HEAD: Final = (
    *("date", "tenant", "key", "function", "requests", "estimatedRequests"),
    *("inputTokens", "cachedTokens", "outputTokens", "costUSD"),
)


@dataclass(frozen=True, slots=True)
class UsageView:
    """Days of the ledger. `signed`: days whose signature was checked and is good."""

    period: str
    """What was asked for: a month or a day."""
    commit: str
    days: Mapping[str, Day] = field(default_factory=dict)
    signed: frozenset[str] = frozenset()
    checked: bool = False
    """Whether there was a key to check signatures with."""

    @property
    def unsigned(self) -> list[str]:
        return sorted(self.days.keys() - self.signed) if self.checked else []


def of_tenant(view: UsageView, tenant: str) -> UsageView:
    """What one tenant used."""
    days = {
        day: {row: sums for row, sums in rows.items() if row.tenant == tenant}
        for day, rows in view.days.items()
    }
    return UsageView(view.period, view.commit, days, view.signed, view.checked)


def grouped(view: UsageView, by: By) -> dict[tuple[str, ...], Sums]:
    """Sums by tenant, or by tenant and key, by tenant and function, or by day; in order."""
    out: dict[tuple[str, ...], Sums] = {}
    for day, rows in view.days.items():
        for row, sums in rows.items():
            match by:
                case "tenant":
                    group: tuple[str, ...] = (row.tenant,)
                case "key":
                    group = (row.tenant, row.key)
                case "function":
                    group = (row.tenant, row.function)
                case _:
                    group = (day,)
            out[group] = out.get(group, NOTHING) + sums
    return dict(sorted(out.items()))


def _all(view: UsageView) -> Sums:
    return total(sums for rows in view.days.values() for sums in rows.values())


def _cells(sums: Sums) -> list[str]:
    return [
        f"{sums.requests:,}",
        f"{sums.input_tokens:,}",
        f"{sums.cached_tokens:,}",
        f"{sums.output_tokens:,}",
        f"{sums.cost_usd:,.4f}",
    ]


def bar(share: float) -> str:
    """A share of 0 to 1, to an eighth of a cell; some of it is seen as soon as there is any."""
    eighths = round(share * _BAR_CELLS * 8)
    if share > 0:
        eighths = max(1, eighths)
    whole, part = divmod(eighths, 8)
    return (_EIGHTHS[8] * whole + (_EIGHTHS[part] if part else "")).ljust(_BAR_CELLS)


def _aligned(rows: Sequence[Sequence[str]], names: int) -> Iterator[list[str]]:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield [
            cell.ljust(width) if column < names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]


def table_lines(view: UsageView, by: By, paint: Paint) -> Iterator[str]:
    """For eyes: each group with its share of the cost, or of the tokens where nothing costs anything."""
    yield paint(f"usage of {view.period}, as committed at {view.commit[:7]}", "strong")
    if view.unsigned:
        text = f"not signed by the key that was given: {', '.join(view.unsigned)}"
        yield f"{paint('error:', 'error')} {text}"
    groups = grouped(view, by)
    everything = _all(view)
    yield ""
    if not groups:
        yield "none"
        return
    head = ("day",) if by == "day" else ("tenant",) if by == "tenant" else ("tenant", by)
    rows = [[*head, *_COUNTS]]
    rows += [[*group, *_cells(sums)] for group, sums in groups.items()]
    rows.append(["all", *[""] * (len(head) - 1), *_cells(everything)])
    weigh = _cost if everything.cost_nano_usd else _tokens
    whole = weigh(everything)
    shares = [weigh(sums) / whole if whole else 0.0 for sums in groups.values()]
    for index, cells in enumerate(_aligned(rows, len(head))):
        line = "  ".join(cells)
        if index == 0:
            yield paint(line, "faint")
        elif index <= len(shares):
            share = shares[index - 1]
            yield f"{line}  {paint(bar(share), 'good')} {share:4.0%}"
        else:
            yield paint(line, "strong")
    if everything.estimated_requests:
        yield ""
        yield (
            f"{everything.estimated_requests:,} of {everything.requests:,} requests are counted by "
            "routers, because their engine did not say"
        )


def _cost(sums: Sums) -> int:
    return sums.cost_nano_usd


def _tokens(sums: Sums) -> int:
    return sums.input_tokens + sums.output_tokens


def csv_text(view: UsageView) -> str:
    """A line for each day, tenant, key and function, as they stand in the ledger."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV_HEAD)
    for day, rows in sorted(view.days.items()):
        for row, sums in sorted(rows.items()):
            writer.writerow([day, *row, *_numbers(sums).values()])
    return out.getvalue()


def usage_json(view: UsageView, by: By) -> dict[str, Any]:
    """For scripts: the sums of every group, and of all."""
    names = ("day",) if by == "day" else ("tenant",) if by == "tenant" else ("tenant", by)
    return {
        "period": view.period,
        "commit": view.commit,
        "signed": not view.unsigned if view.checked else None,
        "usage": [
            {**dict(zip(names, group, strict=True)), **_numbers(sums)}
            for group, sums in grouped(view, by).items()
        ],
        "totals": _numbers(_all(view)),
    }


def _numbers(sums: Sums) -> dict[str, Any]:
    return {
        "requests": sums.requests,
        "estimatedRequests": sums.estimated_requests,
        "inputTokens": sums.input_tokens,
        "cachedTokens": sums.cached_tokens,
        "outputTokens": sums.output_tokens,
        "costUSD": f"{sums.cost_usd:.9f}",
    }


def periods(days: Iterable[str], wanted: str) -> list[str]:
    """The days that belong to a month or are the day itself."""
    return sorted(day for day in days if day == wanted or day.startswith(f"{wanted}-"))
