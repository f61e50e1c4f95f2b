"""The status branch's documents as people want to see them: a table, or one object in full. Pure.

Not here: what the documents say and why (core.status), or reading them (status).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from reconciler.cli.instants import format_age
from reconciler.cli.terminal import Paint, Style

SUMMARY: Final = "Summary"
_KINDS: Final = ("Deployment", "Function", "Cluster", "Tenant", "Platform")
_ABNORMAL: Final = ("Stalled", "Degraded")
_HEADER: Final = ("NAME", "READY", "REPLICAS", "REVISION", "AGE", "MESSAGE")


@dataclass(frozen=True, slots=True)
class ObjectStatus:
    """One object's document, read leniently: what is not there is empty."""

    kind: str
    name: str
    status: Mapping[str, Any]
    idle: bool = False
    """A function that is not ready because none of its deployments is meant to run anything."""

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def conditions(self) -> Mapping[str, Mapping[str, Any]]:
        return {c.get("type", ""): c for c in self.status.get("conditions", ())}

    @property
    def ready(self) -> bool | None:
        """None: unknown."""
        word = self.conditions.get("Ready", {}).get("status")
        return {"True": True, "False": False}.get(str(word))

    @property
    def abnormal(self) -> Mapping[str, Any] | None:
        """The condition that needs a look, if there is one."""
        for name in _ABNORMAL:
            condition = self.conditions.get(name, {})
            if condition.get("status") == "True":
                return condition
        return None

    @property
    def fine(self) -> bool:
        """Nothing to wait for and nothing to mend."""
        if self.conditions.get("Stalled", {}).get("status") == "True":
            return False
        return self.ready is True or self.idle

    @property
    def message(self) -> str:
        shown = self.abnormal or self.conditions.get("Ready", {})
        return str(shown.get("message", ""))

    @property
    def since(self) -> str:
        """When Ready last changed, RFC 3339; "" where not known."""
        return str(self.conditions.get("Ready", {}).get("lastTransitionTime", ""))


@dataclass(frozen=True, slots=True)
class StatusView:
    """All of one status commit. `revision` is the config's that it speaks of."""

    commit: str
    revision: str
    routing: Mapping[str, Any] = field(default_factory=dict)
    source_problem: str = ""
    refused: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    objects: tuple[ObjectStatus, ...] = ()

    @property
    def fine(self) -> bool:
        return not self.source_problem and all(one.fine for one in self.objects)

    def find(self, kind: str, name: str) -> ObjectStatus | None:
        for one in self.objects:
            if one.kind.casefold() == kind.casefold() and one.name == name:
                return one
        return None


def status_view(commit: str, documents: Sequence[Mapping[str, Any]]) -> StatusView:
    """Documents of the branch, in any order; those that are no status are left out."""
    summary: Mapping[str, Any] = {}
    objects: list[ObjectStatus] = []
    for document in documents:
        match document:
            case {"kind": "Summary"}:
                summary = document
            case {"kind": str(kind), "metadata": {"name": str(name)}, "status": dict(status)}:
                objects.append(ObjectStatus(kind, name, status))
            case _:
                pass
    return StatusView(
        commit=commit,
        revision=str(summary.get("revision", "")),
        routing=summary.get("routing", {}),
        source_problem=str(summary.get("source", "")),
        refused=tuple(summary.get("refused", ())),
        problems=tuple(summary.get("problems", ())),
        objects=tuple(sorted(_with_idle(objects), key=_order)),
    )


def _with_idle(objects: Sequence[ObjectStatus]) -> Iterator[ObjectStatus]:
    fine = {one.name for one in objects if one.kind == "Deployment" and one.fine}
    for one in objects:
        deployments = one.status.get("deployments", ())
        if one.kind == "Function" and one.ready is False and fine.issuperset(deployments):
            yield replace(one, idle=True)
        else:
            yield one


def _order(one: ObjectStatus) -> tuple[int, str, str]:
    place = _KINDS.index(one.kind) if one.kind in _KINDS else len(_KINDS)
    return place, one.kind, one.name


def table_lines(
    view: StatusView, now: datetime, paint: Paint, width: int | None = None
) -> Iterator[str]:
    """Everything at a glance: trouble first. Cut at `width` columns, where given."""
    yield paint(_heading(view), "strong")
    if view.source_problem:
        yield f"{paint('config repo:', 'error')} {view.source_problem}"
    for refusal in view.refused:
        yield f"{paint('refused:', 'error')} {refusal}"
    for problem in view.problems:
        yield f"{paint('problem:', 'warning')} {problem}"
    yield ""
    rows = [_HEADER, *(_cells(one, now) for one in view.objects)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER) - 1)]
    for index, row in enumerate(rows):
        cells = [cell.ljust(size) for cell, size in zip(row, widths, strict=False)]
        used = sum(widths) + 2 * len(widths)
        message = row[-1] if width is None else _cut(row[-1], width - used)
        if index == 0:
            yield paint("  ".join((*cells, message)).rstrip(), "faint")
            continue
        one = view.objects[index - 1]
        cells[1] = paint(cells[1], _style(one))
        yield "  ".join((*cells, message)).rstrip()


def object_lines(one: ObjectStatus, now: datetime, paint: Paint) -> Iterator[str]:
    """One object in full."""
    status = one.status
    yield f"{paint(one.key, 'strong')}  {paint(_ready_word(one), _style(one))}"
    facts = {
        "source": status.get("source"),
        "revision": str(status.get("observedRevision") or "")[:12],
        "generation": status.get("observedGeneration"),
        "workload": status.get("workload"),
        "cluster": status.get("cluster"),
        "replicas": _replica_words(status.get("replicas")),
        "placement": _placement_words(status.get("placement")),
        "scaling": _scaling_words(status.get("scaling")),
        "canary": _canary_words(status.get("canary")),
        "job": _job_words(status.get("job")),
        "ready": status.get("readyReplicas"),
        "deployments": ", ".join(status.get("deployments", ())),
        "idle fields": ", ".join(status.get("notActedOnYet", ())),
    }
    for name, value in facts.items():
        if value not in (None, ""):
            yield f"  {paint(name.ljust(12), 'faint')} {value}"
    if endpoints := status.get("endpoints"):
        yield f"  {paint('endpoints', 'faint')}"
        for endpoint in endpoints:
            yield "    " + "  ".join(str(endpoint.get(k, "")) for k in ("replica", "phase", "url"))
    yield f"  {paint('conditions', 'faint')}"
    for condition in status.get("conditions", ()):
        facts_line = (condition.get(k, "") for k in ("type", "status", "reason"))
        age = _age(str(condition.get("lastTransitionTime", "")), now)
        yield f"    {'  '.join(str(fact) for fact in facts_line)}  {age}"
        if message := condition.get("message"):
            yield f"      {message}"


def _placement_words(placed: Mapping[str, Any] | None) -> str:
    if not placed:
        return ""
    return (
        f"{placed.get('gpus')} {placed.get('gpuType')}, {placed.get('pricePerHour')} an hour: "
        f"{placed.get('reason')}"
    )


def _scaling_words(scaling: Mapping[str, Any] | None) -> str:
    if not scaling:
        return ""
    last = f"; last {scaling['last']}" if "last" in scaling else ""
    return f"{scaling.get('replicas')}, of {scaling.get('min')} to {scaling.get('max')}{last}"


def _canary_words(canary: Mapping[str, Any] | None) -> str:
    if not canary:
        return ""
    return (
        f"{canary.get('weightPercent')} % of sessions on {str(canary.get('specDigest'))[:8]}, "
        f"step {canary.get('step')} of {canary.get('steps')}"
    )


def _job_words(job: Mapping[str, Any] | None) -> str:
    if not job:
        return ""
    attempt = f", attempt {job['attempt']}" if "attempt" in job else ""
    return f"{job.get('kind')} run {job.get('run')}: {job.get('state')}{attempt}"


def status_json(view: StatusView) -> dict[str, Any]:
    """The view as plain data; fields are only ever added."""
    return {
        "commit": view.commit,
        "revision": view.revision,
        "ready": view.fine,
        "routing": dict(view.routing),
        "source": view.source_problem or None,
        "refused": list(view.refused),
        "problems": list(view.problems),
        "objects": [object_json(one) for one in view.objects],
    }


def object_json(one: ObjectStatus) -> dict[str, Any]:
    return {
        "object": one.key,
        "ready": one.ready,
        "fine": one.fine,
        "message": one.message,
        "since": one.since or None,
        "status": dict(one.status),
    }


def _heading(view: StatusView) -> str:
    generation = view.routing.get("generation", 0)
    routers = view.routing.get("routers", 0)
    count = sum(one.fine for one in view.objects)
    return (
        f"{view.revision[:10] or 'no revision'}: {count} of {len(view.objects)} objects as wanted; "
        f"routing table {generation} on {routers} router{'' if routers == 1 else 's'}"
    )


def _cells(one: ObjectStatus, now: datetime) -> tuple[str, ...]:
    replicas = one.status.get("replicas")
    shown = f"{replicas.get('ready', 0)}/{replicas.get('wanted', 0)}" if replicas else "-"
    revision = str(one.status.get("observedRevision") or "-")[:10]
    return one.key, _ready_word(one), shown, revision, _age(one.since, now), one.message


def _ready_word(one: ObjectStatus) -> str:
    if one.ready is None:
        return "unknown"
    return "yes" if one.ready else "idle" if one.idle else "no"


def _style(one: ObjectStatus) -> Style:
    if not one.fine:
        return "error"
    return "warning" if one.abnormal else "good" if one.ready else "faint"


def _replica_words(replicas: Mapping[str, int] | None) -> str | None:
    if replicas is None:
        return None
    return ", ".join(f"{count} {name}" for name, count in replicas.items())


def _age(instant: str, now: datetime) -> str:
    try:
        return format_age((now - datetime.fromisoformat(instant)).total_seconds())
    except (ValueError, TypeError):
        return "-"


def _cut(text: str, width: int) -> str:
    width = max(width, 20)
    return text if len(text) <= width else f"{text[: width - 3]}..."
