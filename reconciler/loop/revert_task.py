"""Proposes, beside the passes, to take back templates that failed their canary.

Not here: whether one failed (core.steer), or the branch itself (publish.revert_branch).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from reconciler.core.canary import Canary
from reconciler.core.config import ObjectKey
from reconciler.core.last_good import Objects
from reconciler.core.workload import Desired
from reconciler.errors import Stalled, Transient
from reconciler.loop.ports import Reverts
from reconciler.publish.revert_branch import Revert

log = logging.getLogger("detoserve.reconciler")

AGAIN_S = 30.0


class RevertTask:
    """One proposal a workload at a time. `proposed` hears the workload, its template and the branch."""

    def __init__(self, reverts: Reverts, proposed: Callable[[str, str, str], None]) -> None:
        self._reverts = reverts
        self._proposed = proposed
        self._running: dict[str, asyncio.Task[None]] = {}

    def look(self, canaries: Mapping[str, Canary], compiled: Desired, objects: Objects) -> None:
        """Begins what is due."""
        for name, canary in canaries.items():
            workload = compiled.workloads.get(name)
            running = self._running.get(name)
            if (
                workload is None
                or not canary.rejected
                or canary.revert_branch
                or canary.stable is None
                or not canary.stable.revision
                or not (running is None or running.done())
            ):
                continue
            keys = (
                ObjectKey("Function", workload.function),
                ObjectKey("Deployment", workload.deployment),
            )
            paths = sorted({objects[k].location.path for k in keys if k in objects})
            revert = Revert(
                workload.deployment,
                canary.rejected,
                canary.stable.revision,
                tuple(paths),
                canary.why,
            )
            self._running[name] = asyncio.create_task(self._propose(name, revert))

    def cancel(self) -> None:
        """Stops what runs; what is due is found again by the next reconciler."""
        for task in self._running.values():
            task.cancel()

    async def _propose(self, name: str, revert: Revert) -> None:
        while True:
            try:
                branch = await self._reverts.propose(revert)
            except Transient as error:
                log.warning("%s", error)
                await asyncio.sleep(AGAIN_S)
                continue
            except Stalled as error:
                log.warning("no revert of %s is proposed: %s", revert.deployment, error)
                branch = f"none: {error}"
            else:
                log.info("Deployment/%s: revert on branch %s", revert.deployment, branch)
            break
        self._proposed(name, revert.digest, branch)
