"""A plan as lines for a terminal, in the manner of Terraform. Pure.

Not here: what a plan means (plan_view), or the form for pull requests (plan_markdown).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from reconciler.cli.plan_view import GpuUse, PlanView, Row, TenantUse, Verb
from reconciler.cli.problem_lines import problem_line
from reconciler.cli.terminal import Paint, Style
from reconciler.core.action import Change

HOURS_PER_MONTH: Final = 730
_VALUE_WIDTH: Final = 160
SYMBOLS: Final[dict[Verb, str]] = {
    "create": "+",
    "roll": "~",
    "scale": "~",
    "delete": "-",
    "held": "!",
}
_STYLES: Final[dict[Verb, Style]] = {
    "create": "add",
    "roll": "change",
    "scale": "change",
    "delete": "remove",
    "held": "warning",
}
_OBJECTS: Final[dict[str, tuple[str, Style]]] = {
    "add": ("+", "add"),
    "change": ("~", "change"),
    "remove": ("-", "remove"),
}


def plan_lines(view: PlanView, paint: Paint) -> Iterator[str]:
    """The whole plan; the last line counts."""
    yield f"{paint('From', 'faint')} {view.before}"
    yield f"{paint('to', 'faint')}   {view.after}"
    for problem in view.problems:
        yield problem_line(problem, paint)
    if view.rows:
        yield ""
    for row in view.rows:
        yield from _row(row, paint)
    if view.objects:
        yield ""
        yield paint("Without a restart:", "strong")
    for change in view.objects:
        symbol, style = _OBJECTS[change.verb]
        yield f"  {paint(symbol, style)} {change.key}"
        for field in change.changes:
            yield f"      {change_text(field)}"
    if totals := list(_totals(view)):
        yield ""
        width = max(len(name) for name, _ in totals)
        for name, text in totals:
            yield f"{paint(name.ljust(width), 'strong')}  {text}"
    if view.refusals or view.notes:
        yield ""
    for refusal in view.refusals:
        yield f"{paint('refused:', 'error')} {refusal}"
    for sentence in view.notes:
        yield f"{paint('note:', 'faint')} {sentence}"
    yield ""
    yield paint(summary(view), "strong")


def summary(view: PlanView) -> str:
    """Counts, such as `Plan: 1 to create, 2 to roll; 3 unchanged.`."""
    words: dict[Verb, str] = {
        "create": "to create",
        "roll": "to roll",
        "scale": "to scale",
        "delete": "to delete",
        "held": "held back",
    }
    parts = [f"{view.count(verb)} {word}" for verb, word in words.items() if view.count(verb)]
    if view.objects:
        parts.append(f"{len(view.objects)} changed without a restart")
    said = ", ".join(parts) if parts else "no changes"
    invalid = f"; {view.errors} error{'s' * (view.errors != 1)} in the repo" if view.errors else ""
    return f"Plan: {said}; {view.unchanged} unchanged{invalid}."


def change_text(change: Change) -> str:
    """`runtime.args[2]: "--x" -> "--y"`; absent values are left out."""
    if change.before is None:
        return f"{change.path}: {value_text(change.after)} (new)"
    if change.after is None:
        return f"{change.path}: {value_text(change.before)} (removed)"
    return f"{change.path}: {value_text(change.before)} -> {value_text(change.after)}"


def value_text(value: object) -> str:
    """As JSON, cut where it gets long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _VALUE_WIDTH else f"{text[:_VALUE_WIDTH]}..."


def gpu_text(use: GpuUse) -> str:
    """`8 -> 16 of 32 H100 in h100-west`."""
    listed = f" of {use.listed}" if use.listed is not None else ""
    return f"{_arrow(use.before, use.after)}{listed} {use.type} in {use.cluster}"


def tenant_text(use: TenantUse) -> str:
    """`8 -> 16 of acme's quota of 12, 4 over it (at most 24)`."""
    left = use.quota - use.after
    room = f"{left} left" if left >= 0 else f"{-left} over it"
    most = f"; at most {use.limit}" if use.limit is not None else ""
    return f"{_arrow(use.before, use.after)} of {use.tenant}'s quota of {use.quota}, {room}{most}"


def price_text(view: PlanView) -> str | None:
    """`$20.00 -> $30.00 an hour (about +$7,300 a month)`; None where nothing has a price."""
    if (price := view.price_per_hour) is None:
        return None
    before, after = price
    unpriced = f"; no price for {', '.join(view.unpriced)}" if view.unpriced else ""
    if before == after:
        return f"${after:,.2f} an hour{unpriced}"
    month = (after - before) * HOURS_PER_MONTH
    sign = "+" if month >= 0 else "-"
    return f"${before:,.2f} -> ${after:,.2f} an hour (about {sign}${abs(month):,.0f} a month){unpriced}"


def replicas_text(view: PlanView) -> str | None:
    """`4 -> 6` over the workloads that change; None where that number stays."""
    before = sum(row.replicas_before for row in view.rows)
    after = sum(row.replicas_after for row in view.rows)
    return _arrow(before, after) if before != after else None


def _row(row: Row, paint: Paint) -> Iterator[str]:
    symbol = paint(SYMBOLS[row.verb], _STYLES[row.verb])
    place = f" in {row.cluster}" if row.cluster else ""
    verb = paint(row.verb, _STYLES[row.verb])
    yield f"  {symbol} {paint(f'Deployment/{row.deployment}', 'strong')}{place}: {verb}, {row.effect}"
    if row.verb in ("delete", "held"):
        yield f"      {paint(row.reason, 'faint')}"
    if row.placement:
        yield f"      {paint(row.placement, 'faint')}"
    for change in row.changes:
        yield f"      {change_text(change)}"


def _totals(view: PlanView) -> Iterator[tuple[str, str]]:
    if text := replicas_text(view):
        yield "Replicas", text
    for use in view.gpus:
        if use.before != use.after:
            yield "GPUs", gpu_text(use)
    for tenant in view.tenants:
        if tenant.before != tenant.after:
            yield "Quota", tenant_text(tenant)
    if (text := price_text(view)) and any(use.before != use.after for use in view.gpus):
        yield "Price", text


def _arrow(before: int, after: int) -> str:
    return f"{before} -> {after}" if before != after else str(after)
