"""A job as a SkyPilot managed job: the task that is sent, and what the queue says of it. Pure.

A managed job carries its identity in its name: workload, digest of its spec, owner. SkyPilot allows any
number of one name, so who launches must have looked. Not here: sending or asking (backends).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from reconciler.core.observed import Phase
from reconciler.core.skypilot.render import service_task
from reconciler.core.workload import Workload

_NAME: Final = re.compile(r"(?P<workload>.+)\.(?P<digest>[0-9a-f]{16})\.(?P<owner>[0-9a-f]{8})")
_END: Final = "DETOSERVE_JOB_END"

PHASES: Final[Mapping[str, Phase]] = {
    "PENDING": Phase.PENDING,
    "SUBMITTED": Phase.PENDING,
    "STARTING": Phase.STARTING,
    "RUNNING": Phase.RUNNING,
    "WINDING_DOWN": Phase.RUNNING,
    "RECOVERING": Phase.STARTING,
    "CANCELLING": Phase.DRAINING,
    "SUCCEEDED": Phase.SUCCEEDED,
    "CANCELLED": Phase.FAILED,
    "FAILED": Phase.FAILED,
    "FAILED_SETUP": Phase.FAILED,
    "FAILED_PRECHECKS": Phase.FAILED,
    "FAILED_NO_RESOURCE": Phase.FAILED,
    "FAILED_CONTROLLER": Phase.FAILED,
}
CANCELLED: Final = frozenset({"CANCELLED", "CANCELLING"})


@dataclass(frozen=True, slots=True)
class JobRow:
    """One managed job of ours."""

    id: int
    workload: str
    digest: str
    status: str
    detail: str = ""
    recoveries: int = 0

    @property
    def phase(self) -> Phase:
        """A status that this version does not know is one of a job that is not over."""
        return PHASES.get(self.status, Phase.STARTING)

    @property
    def over(self) -> bool:
        return self.phase in (Phase.SUCCEEDED, Phase.FAILED)


def job_name(workload: Workload, owner: str) -> str:
    return f"{workload.name}.{workload.spec_digest}.{_owner_mark(owner)}"


def job_row(row: Mapping[str, Any], owner: str) -> JobRow | None:
    """None for a job that is not ours."""
    found = _NAME.fullmatch(str(row.get("job_name") or ""))
    if found is None or found["owner"] != _owner_mark(owner) or row.get("job_id") is None:
        return None
    return JobRow(
        int(row["job_id"]),
        found["workload"],
        found["digest"],
        str(row.get("status") or ""),
        str(row.get("failure_reason") or ""),
        int(row.get("recovery_count") or 0),
    )


def job_task(workload: Workload, owner: str) -> dict[str, Any]:
    """What SkyPilot is told to run, without values of secrets.

    Raises:
        Stalled: it can never run as written; says what to do instead.
    """
    job = workload.template.job
    assert job is not None
    task = service_task(workload, owner)
    del task["service"]
    task["name"] = job_name(workload, owner)
    resources = dict(task["resources"])
    resources.pop("ports", None)
    if job.retries:
        resources["job_recovery"] = {"max_restarts_on_errors": job.retries}
    task["resources"] = resources
    # A managed job knows no deadline of its own.
    task["run"] = (
        f"timeout --kill-after=10 {ceil(job.timeout)} bash <<'{_END}'\n"
        f"{task['run'].rstrip()}\n{_END}\n"
    )
    return task


def _owner_mark(owner: str) -> str:
    return hashlib.sha256(f"detoserve:{owner}".encode()).hexdigest()[:8]
