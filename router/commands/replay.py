"""`detoserve replay`: what another policy or other weights would have changed, from recorded decisions.

Not here: the simulation (core.replay). What a branch of a config repo says is asked of `detoserve
render`, a process of its own: the router reads no YAML and no Git.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import msgspec
import typer

from router.commands.recorded import RedisUrl, StateDir, connected, fail, last
from router.commands.tables import camel, markdown_table, seconds, text_table
from router.core.replay import Figures, Measured, elsewhere, latest, measured, simulate
from router.core.rescore import Rule
from schemas.routing_policy import PolicyName
from schemas.wire.decisions import Decision
from schemas.wire.routing import Function, Weights

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_POLICIES: Final = get_args(PolicyName)
_WEIGHTS: Final = {
    "kvCache": "kv_cache",
    "session": "session",
    "load": "load",
    "latency": "latency",
}
_RENDER_TIMEOUT_S: Final = 120
RuleOf = Callable[[Decision], Rule]


@dataclass(frozen=True, slots=True)
class Compared:
    """One function's recorded requests under two rules."""

    function: str
    recorded: str
    proposed: str
    before: Figures
    after: Figures
    measured: Measured
    elsewhere: float
    requests: int
    """That routers sent meanwhile, recorded or not."""


@app.command()
def replay(
    policy: Annotated[
        str | None, typer.Option(help=f"Replaces every function's: {', '.join(_POLICIES)}.")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="kvCache, session, load or latency; repeatable."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|REPO", help="Take each function's policy from this config repo."
        ),
    ] = None,
    ref: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="Of this branch, tag or commit of --config."),
    ] = None,
    path: Annotated[
        str, typer.Option(metavar="SUBDIR", help="Where in --config the config stands.")
    ] = "",
    function: Annotated[str | None, typer.Option(help="Only requests of this function.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only requests of this tenant.")] = None,
    count: Annotated[
        int, typer.Option("--last", min=1, help="How many of the newest decisions.")
    ] = 10_000,
    cache_tokens: Annotated[
        float,
        typer.Option(
            min=0, help="What one replica's cache holds. [default: all]", show_default=False
        ),
    ] = float("inf"),
    redis_url: RedisUrl = None,
    state_dir: StateDir = Path(".detoserve"),
    markdown: Annotated[bool, typer.Option("--markdown", help="For a pull request.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what another policy would have changed.

    Sends recorded requests through simulated queues and caches, once by the rule they met and once by
    the proposed one, and shows hit rate, hotspot factor (the busiest replica's prefill over the mean)
    and time to first token. Exit codes: 0 fine, 1 nothing is recorded, 2 it cannot be read.
    """
    rule_of = _rules(policy, weight or [], config, ref, path)
    with connected(redis_url, state_dir) as redis:
        decisions = latest(last(redis, count, tenant, function))
    if not decisions:
        typer.echo("error: no decisions are recorded that could be replayed", err=True)
        raise typer.Exit(1)
    by_function: dict[str, list[Decision]] = {}
    for decision in decisions:
        by_function.setdefault(decision.function, []).append(decision)
    found = [
        compared(name, group, rule_of, cache_tokens) for name, group in sorted(by_function.items())
    ]
    if as_json:
        typer.echo(json.dumps([as_data(one) for one in found], indent=2, ensure_ascii=False))
    else:
        typer.echo("\n\n".join("\n".join(as_lines(one, markdown=markdown)) for one in found))


def compared(
    name: str, decisions: Sequence[Decision], rule_of: RuleOf, cache_tokens: float = float("inf")
) -> Compared:
    """Both simulations of one function's requests, with the same draws."""
    newest = decisions[-1]
    return Compared(
        function=name,
        recorded=_named(_recorded(newest)),
        proposed=_named(rule_of(newest)),
        before=simulate(decisions, _recorded, random.Random(1), cache_tokens=cache_tokens),
        after=simulate(decisions, rule_of, random.Random(1), cache_tokens=cache_tokens),
        measured=measured(decisions),
        elsewhere=elsewhere(decisions, rule_of),
        requests=len(decisions) + sum(d.skipped for d in decisions),
    )


def _recorded(decision: Decision) -> Rule:
    return Rule(decision.policy, decision.weights)


def _named(rule: Rule) -> str:
    if rule.weights == Weights() or rule.policy not in ("expected-latency", "linear"):
        return rule.policy
    own = [
        f"{shown} {getattr(rule.weights, field):g}"
        for shown, field in _WEIGHTS.items()
        if getattr(rule.weights, field) != getattr(Weights(), field)
    ]
    return f"{rule.policy}, {', '.join(own)}"


def _rules(
    policy: str | None, weights: Sequence[str], config: str | None, ref: str | None, path: str
) -> RuleOf:
    if policy is not None and policy not in _POLICIES:
        fail(f"--policy: {policy!r} is none of {', '.join(_POLICIES)}")
    changed: dict[str, float] = {}
    for text in weights:
        name, _, number = text.partition("=")
        try:
            changed[_WEIGHTS[name]] = value = float(number)
        except (KeyError, ValueError):
            fail(f"--weight: {text!r} is not like kvCache=0.5 (or session, load, latency)")
        if not 0 <= value <= 10:
            fail(f"--weight: {text!r} must be from 0 to 10")
    if config is None:
        if ref or path:
            fail("--ref and --path belong to --config")
        if policy is None and not changed:
            fail("say what to try: --policy, --weight, or --config with the repo that proposes it")
    functions = _proposed(config, ref, path) if config is not None else {}

    def rule_of(decision: Decision) -> Rule:
        base = functions.get(decision.function)
        if base is None:
            base = _recorded(decision)
        return Rule(policy or base.policy, msgspec.structs.replace(base.weights, **changed))

    return rule_of


class _Table(msgspec.Struct):
    functions: tuple[Function, ...] = ()


def _proposed(config: str, ref: str | None, path: str) -> Mapping[str, Rule]:
    """Each function's rule, as `detoserve render --routes` says it."""
    flags = [*(["--ref", ref] if ref else []), *(["--path", path] if path else [])]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "reconciler.cli", "render", config, "--routes", "-o", "json", *flags],
            stdout=subprocess.PIPE, timeout=_RENDER_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        fail(f"{config} took longer than {_RENDER_TIMEOUT_S} s to read")
    if done.returncode not in (0, 1):  # 1: some of it has errors, and was shown on stderr
        raise typer.Exit(2)
    (table,) = msgspec.json.decode(done.stdout, type=tuple[_Table])
    return {f.name: Rule(f.policy.name, f.policy.weights) for f in table.functions}


_ROWS: Final[tuple[tuple[str, Callable[[Figures], float], str], ...]] = (
    ("hit rate", lambda f: f.hit_rate, "points"),
    ("hotspot factor", lambda f: f.hotspot, "number"),
    ("TTFT mean", lambda f: f.mean_s, "seconds"),
    ("TTFT p50", lambda f: f.quantile_s(0.50), "seconds"),
    ("TTFT p95", lambda f: f.quantile_s(0.95), "seconds"),
    ("TTFT p99", lambda f: f.quantile_s(0.99), "seconds"),
)


def _shown(value: float, unit: str) -> str:
    if unit == "points":
        return f"{value * 100:.1f} %"
    return seconds(value) if unit == "seconds" else f"{value:.2f}"


def _change(before: float, after: float, unit: str) -> str:
    if unit == "points":
        return f"{(after - before) * 100:+.1f} points"
    return f"{(after / before - 1) * 100:+.1f} %" if before else ""


def as_lines(one: Compared, *, markdown: bool) -> list[str]:
    """For people, or as Markdown."""
    head = ["simulated", one.recorded, one.proposed, "change"]
    rows = []
    for name, of, unit in _ROWS:
        before, after = of(one.before), of(one.after)
        rows.append([name, _shown(before, unit), _shown(after, unit), _change(before, after, unit)])
    notes = [
        f"{one.elsewhere * 100:.1f} % of the decisions would have gone elsewhere, each taken by itself."
    ]
    real = one.measured
    if real.ttft_s:
        ttft = real.ttft_s
        mean, p95 = sum(ttft) / len(ttft), ttft[min(len(ttft) - 1, int(0.95 * len(ttft)))]
        hit = "" if real.hit_rate is None else f", hit rate {real.hit_rate * 100:.1f} %"
        notes.append(f"Measured: TTFT mean {seconds(mean)}, p95 {seconds(p95)}{hit}.")
    if one.requests > one.before.requests:
        share = one.before.requests / one.requests * 100
        notes.append(
            f"Only {share:.0f} % of the requests were recorded: queues and caches look emptier than they "
            "were. Routers record more with a higher --decisions-per-s."
        )
    title = f"{one.function}: {one.before.requests:,} recorded requests"
    if markdown:
        return [f"### {title}", "", *markdown_table(head, rows), "", *notes]
    return [title, *text_table(head, rows), *notes]


def as_data(one: Compared) -> dict[str, Any]:
    """The same as plain data; times are in seconds."""

    def figures(of: Figures) -> dict[str, float]:
        return {
            "hit_rate": of.hit_rate,
            "hotspot": of.hotspot,
            "ttft_mean_s": of.mean_s,
            "ttft_p50_s": of.quantile_s(0.50),
            "ttft_p95_s": of.quantile_s(0.95),
            "ttft_p99_s": of.quantile_s(0.99),
        }

    real = one.measured
    data = {
        "function": one.function,
        "recorded_requests": one.before.requests,
        "requests": one.requests,
        "recorded": {"rule": one.recorded, **figures(one.before)},
        "proposed": {"rule": one.proposed, **figures(one.after)},
        "elsewhere": one.elsewhere,
        "measured": {
            "hit_rate": real.hit_rate,
            "ttft_mean_s": sum(real.ttft_s) / len(real.ttft_s) if real.ttft_s else None,
        },
    }
    return dict(camel(data))
