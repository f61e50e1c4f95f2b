"""What a reconciler on this machine runs, read from its state directory while it goes on running.

What it was told and took on, that is: a replica that is starting or has just died counts as wanted.
Nothing is started, adopted or written. Not here: observing processes (backends.local).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reconciler.backends.local.state import StateDir, Unreadable
from reconciler.core.compile import compile_workloads
from reconciler.core.last_good import Effective, Objects
from reconciler.core.observed import Observation, ObservedWorkload, Unknown
from reconciler.core.plan import PlanPolicy, plan, predict, template_data
from reconciler.errors import SourceInvalid
from reconciler.loop.state import StateFile

BACKENDS = ("external", "local", "skypilot", "skypilot-jobs")


@dataclass(frozen=True, slots=True)
class Live:
    """`objects` are those in effect; `known` the deployments the repo has named (None: not known)."""

    observed: tuple[Observation | Unknown, ...]
    objects: Objects
    known: frozenset[str] | None


def read_live(state_dir: Path) -> Live:
    """The state that the directory holds.

    Raises:
        SourceInvalid: it is no reconciler's state directory, or cannot be read.
    """
    state = StateFile(state_dir / "last-good.json").load()
    if state.objects is None:
        raise SourceInvalid(
            f"{state_dir} is not the state directory of a reconciler that has read its config; "
            "give the --state-dir that detoserve up or reconcile runs with"
        )
    try:
        local = Observation("local", _recorded(StateDir(state_dir)))
    except OSError as error:
        raise SourceInvalid(f"{error.filename} cannot be read: {error.strerror}") from None
    others = predicted(Effective("", "", state.objects, (), frozenset()))
    return Live(
        tuple(local if seen.backend == "local" else seen for seen in others),
        state.objects,
        state.known,
    )


def nothing() -> tuple[Observation, ...]:
    """A world in which nothing runs yet."""
    return tuple(Observation(backend) for backend in BACKENDS)


def predicted(wanted: Effective) -> tuple[Observation | Unknown, ...]:
    """What the world becomes once these objects have been taken in."""
    made = plan(compile_workloads(wanted), nothing(), PlanPolicy(), now=0.0)
    return predict(made, nothing())


def _recorded(state: StateDir) -> Mapping[str, ObservedWorkload]:
    if not state.workloads.is_dir():
        return {}
    found: dict[str, ObservedWorkload] = {}
    for record in state.read_workloads():
        if isinstance(record, Unreadable):
            found[record.name] = ObservedWorkload(
                record.name, "", "", 0, detail=record.reason, quarantined=True
            )
            continue
        told = record.workload
        if told.arm:
            continue  # of a roll under way, which no plan of the repo's knows
        found[told.name] = ObservedWorkload(
            name=told.name,
            deployment=told.deployment,
            spec_digest=told.spec_digest,
            replicas_wanted=told.replicas,
            deleting=record.deleting,
            template=template_data(told.template),
        )
    return found
