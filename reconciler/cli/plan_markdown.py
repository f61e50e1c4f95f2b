"""A plan as a comment on a pull request: counts in the heading, details folded away. Pure.

Not here: posting it (the forge's CI does), or what a plan means (plan_view).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from reconciler.cli.plan_text import (
    SYMBOLS,
    change_text,
    gpu_text,
    price_text,
    replicas_text,
    summary,
    tenant_text,
    value_text,
)
from reconciler.cli.plan_view import PlanView, Row
from reconciler.cli.problem_lines import counted
from reconciler.core.action import Change

MARKER: Final = "<!-- detoserve plan -->"
"""First line of every comment, by which a CI job finds its earlier one and edits it."""
MAX_CHARACTERS: Final = 60_000
"""GitHub refuses comments beyond 65,536 characters; GitLab takes more."""


def plan_markdown(view: PlanView) -> str:
    """GitHub and GitLab flavoured Markdown, at most MAX_CHARACTERS long."""
    text = "\n".join(_lines(view, details=True)) + "\n"
    if len(text) > MAX_CHARACTERS:
        text = "\n".join(_lines(view, details=False)) + "\n"
    if len(text) > MAX_CHARACTERS:
        cut = text[:MAX_CHARACTERS].rsplit("\n", 1)[0]
        text = f"{cut}\n\nThe rest is left out, as a comment can be only so long; run `detoserve plan`.\n"
    return text


def _lines(view: PlanView, *, details: bool) -> Iterator[str]:
    yield MARKER
    yield f"### {summary(view).removesuffix('.')}"
    yield ""
    yield f"From {_code(view.before)} to {_code(view.after)}."
    if view.problems:
        yield ""
        yield "**Problems**"
        yield ""
        for problem in view.problems:
            yield f"- {_code(str(problem.location))} {problem.severity}: {_escape(problem.message)}"
    if view.refusals:
        yield ""
        yield "**Refused**"
        yield ""
        for refusal in view.refusals:
            yield f"- {_escape(refusal)}"
    if view.rows:
        yield ""
        yield "| | Deployment | Cluster | What | Replicas |"
        yield "|---|---|---|---|---|"
        for row in view.rows:
            yield _table_row(row)
    totals = [
        *(f"Replicas {text}" for text in [replicas_text(view)] if text),
        *(f"GPUs {gpu_text(use)}" for use in view.gpus if use.before != use.after),
        *(f"Quota {tenant_text(use)}" for use in view.tenants if use.before != use.after),
    ]
    if totals and (price := price_text(view)):
        totals.append(f"Price {price}")
    if totals:
        yield ""
        for total in totals:
            yield f"- {_escape(total.replace(' -> ', ' → '))}"
    if details:
        for row in view.rows:
            if row.changes:
                title = f"Deployment/{row.deployment} in {row.cluster}: {counted(len(row.changes), 'field')}"
                yield from _folded(title, row.changes)
        if view.objects:
            yield from _objects(view)
    elif view.rows or view.objects:
        yield ""
        yield "Fields are left out, as there are too many for a comment; run `detoserve plan`."
    for sentence in view.notes:
        yield ""
        yield f"_{_escape(sentence)}_"


def _table_row(row: Row) -> str:
    before, after = row.replicas_before, row.replicas_after
    count = f"{before} → {after}" if before != after else str(after)
    what = f"{row.verb}: {row.reason if row.verb == 'held' else row.effect}"
    if row.placement:
        what += f"; {row.placement}"
    cells = (
        f"`{SYMBOLS[row.verb]}`",
        _code(row.deployment),
        _code(row.cluster),
        _escape(what),
        count,
    )
    return f"| {' | '.join(cells)} |"


def _folded(title: str, changes: tuple[Change, ...]) -> Iterator[str]:
    yield ""
    yield f"<details><summary>{_html(title)}</summary>"
    yield ""
    yield "```diff"
    for change in changes:
        yield from _diff_lines(change)
    yield "```"
    yield "</details>"


def _objects(view: PlanView) -> Iterator[str]:
    yield ""
    yield f"<details><summary>{len(view.objects)} changed without a restart</summary>"
    yield ""
    yield "```diff"
    signs = {"add": "+", "change": "!", "remove": "-"}
    for change in view.objects:
        yield f"{signs[change.verb]} {change.key}"
        for field in change.changes:
            yield f"    {_fence_safe(change_text(field))}"
    yield "```"
    yield "</details>"


def _diff_lines(change: Change) -> Iterator[str]:
    for sign, value in (("-", change.before), ("+", change.after)):
        if value is not None:
            yield _fence_safe(f"{sign} {change.path}: {value_text(value)}")


def _fence_safe(text: str) -> str:
    """A value may hold the fence that would end the block it stands in."""
    return text.replace("```", "'''")


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`".replace("|", "\\|") if text else ""


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _escape(text: str) -> str:
    """Text from the repo as text: no markup, no mention of anyone, one line."""
    out = _html(text.replace("\n", " "))
    for special in ("\\", "`", "*", "_", "[", "]", "|", "#"):
        out = out.replace(special, f"\\{special}")
    return out.replace("@", "@\u200b")
