"""`detoserve explain`: why a request went where it did, from what was recorded of its decision.

Not here: recording (router.decisions), or working out the score again (core.rescore).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from router.commands.recorded import RedisUrl, StateDir, connected, decision_id, find, last
from router.commands.tables import camel, seconds, text_table
from router.core.rescore import SCORED, Explanation
from router.core.rescore import explain as explained
from schemas.wire.decisions import Decision, Outcome
from schemas.wire.routing import Weights

_LISTED: Final = 20

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def explain(
    decision: Annotated[
        str | None,
        typer.Argument(
            help="The id after d= in x-detoserve-route, or that whole header. [default: lists the newest]",
            show_default=False,
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="Look only among this tenant's. [default: all]", show_default=False),
    ] = None,
    redis_url: RedisUrl = None,
    state_dir: StateDir = Path(".detoserve"),
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON.")] = False,
) -> None:
    """Show why a request went where it did.

    Its candidates with the four signals in seconds, what filters removed, who would have won by
    other rules, and the commit that set the policy. Routers record some 20 decisions a second each
    (--decisions-per-s) and keep them for a day. Exit codes: 0 fine, 1 not recorded, 2 Redis cannot be read.
    """
    if decision is None:
        with connected(redis_url, state_dir) as redis:
            _list(last(redis, _LISTED, tenant, None), as_json=as_json)
        return
    wanted = decision_id(decision)
    with connected(redis_url, state_dir) as redis:
        attempts = find(redis, wanted, tenant)
    if not attempts:
        typer.echo(
            f"error: decision {wanted} is not recorded: it is older than a day, gave way to newer ones, "
            "or was above the routers' --decisions-per-s",
            err=True,
        )
        raise typer.Exit(1)
    if as_json:
        typer.echo(json.dumps([as_data(one) for one in attempts], indent=2, ensure_ascii=False))
    else:
        typer.echo("\n\n".join("\n".join(as_text(one)) for one in attempts))


def _list(newest: Sequence[Decision], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([as_data(one) for one in newest], indent=2, ensure_ascii=False))
        return
    rows = []
    for one in newest:
        outcome, at = one.outcome, datetime.fromtimestamp(one.at, UTC)
        ttft_s = outcome.ttft_s if outcome is not None else None
        rows.append(
            [
                one.id,
                at.strftime("%m-%d %H:%M:%S"),
                one.tenant,
                one.function,
                one.policy,
                one.chosen,
                "running" if outcome is None else str(outcome.status),
                "" if ttft_s is None else seconds(ttft_s),
            ]
        )
    head = ["decision", "UTC", "tenant", "function", "policy", "replica", "status", "first token"]
    typer.echo("\n".join(text_table(head, rows)))


def as_data(decision: Decision) -> dict[str, Any]:
    """The record and what follows from it, as plain data."""
    told = explained(decision)
    data = msgspec.structs.asdict(decision)
    data["chain"] = decision.chain.hex()
    data["weights"] = msgspec.structs.asdict(decision.weights)
    data["candidates"] = [msgspec.structs.asdict(c) for c in decision.candidates]
    data["removed"] = [msgspec.structs.asdict(r) for r in decision.removed]
    data["outcome"] = msgspec.structs.asdict(decision.outcome) if decision.outcome else None
    data["standings"] = [
        asdict(s) | {"signals": s.signals._asdict() if s.signals else None} for s in told.standings
    ]
    data["prefill_price"] = told.price
    data = dict(camel(data))
    data["otherwise"] = {name: list(replicas) for name, replicas in told.others}
    return data


def as_text(decision: Decision) -> list[str]:
    """The same for people."""
    told = explained(decision)
    at = datetime.fromtimestamp(decision.at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    since = decision.policy_since or decision.revision
    by = "a person chose" if decision.forced else "chose"
    lines = [
        (
            f"decision {decision.id}, attempt {decision.attempt}: {decision.operation} of {decision.function} "
            f"for {decision.tenant}, {at}, by router {decision.router}"
        ),
        f"policy {decision.policy}{_weights(decision)}, set by commit {since[:12] or '(unknown)'}",
        f"routing table {decision.generation}, from commit {decision.revision[:12] or '(unknown)'}",
        f"prompt of about {decision.tokens:,.0f} tokens; {_session(decision)}",
        f"{by} {decision.chosen}{_became(decision.outcome, decision)}",
        "",
        *text_table(*_standings(decision, told)),
    ]
    if decision.policy in SCORED:
        lines.append(
            f"a second of prefill counted as {told.price:.2f} s, for the work queued on all of them"
        )
    if decision.removed:
        lines += ["", "not candidates:"]
        lines += _indented([(r.replica, r.reason) for r in decision.removed])
    lines += ["", "by another rule, as things stood:"]
    lines += _indented([(name, _others(names, decision.chosen)) for name, names in told.others])
    return lines


def _indented(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name.ljust(width)}  {text}" for name, text in rows]


def _others(names: Sequence[str], chosen: str) -> str:
    if chosen in names:
        rest = len(names) - 1
        return f"{chosen}, the same" + (f" (drawn among {rest + 1})" if rest else "")
    shown = " or ".join(names[:3])
    return shown + (f", or {len(names) - 3} more" if len(names) > 3 else "")


def _weights(decision: Decision) -> str:
    if decision.policy not in SCORED:
        return ""
    w = decision.weights
    told = (
        "default weights"
        if w == Weights()
        else (
            f"kvCache {w.kv_cache:g}, session {w.session:g}, load {w.load:g}, latency {w.latency:g}"
        )
    )
    return f" ({told})"


def _session(decision: Decision) -> str:
    if decision.pinned:
        return f"its session was on {decision.pinned}"
    return "no session named" if decision.session is None else "its session is new here"


def _became(outcome: Outcome | None, decision: Decision) -> str:
    if outcome is None:
        return "; it had not ended when this was recorded"
    parts = [f": {outcome.outcome}, status {outcome.status}, after {seconds(outcome.duration_s)}"]
    if outcome.replica and outcome.replica != decision.chosen:
        parts.append(f"answered by {outcome.replica} at attempt {outcome.attempts}")
    if outcome.ttft_s is not None:
        parts.append(f"first token after {seconds(outcome.ttft_s)}")
    if outcome.cached_tokens is not None and outcome.input_tokens is not None:
        thought = next(
            (c.cached_tokens for c in decision.candidates if c.replica == decision.chosen), 0.0
        )
        parts.append(
            f"{outcome.cached_tokens:,} of {outcome.input_tokens:,} tokens were cached "
            f"(thought: {thought:,.0f})"
        )
    return ", ".join(parts)


def _standings(decision: Decision, told: Explanation) -> tuple[list[str], list[list[str]]]:
    known = {c.replica: c for c in decision.candidates}
    head = [
        "   replica",
        "cluster",
        "requests",
        "cached",
        "rtt",
        "wait",
        "prefill",
        "saved",
        "session",
    ]
    scored = decision.policy in SCORED
    if scored:
        head += ["kvCache", "session", "load", "latency", "score"]
    rows = []
    for standing in told.standings:
        c = known[standing.replica]
        row = [
            (" > " if standing.replica == decision.chosen else "   ") + standing.replica,
            c.cluster,
            str(c.requests),
            f"{c.cached_tokens:,.0f}",
            *map(
                seconds,
                (
                    standing.rtt_s,
                    standing.wait_s,
                    standing.prefill_s,
                    standing.saved_s,
                    standing.session_s,
                ),
            ),
        ]
        if scored and standing.signals is not None and standing.score is not None:
            row += [f"{value:.3f}" for value in (*standing.signals, standing.score)]
        rows.append(row)
    return head, rows
