"""The seam between the reconciler and wherever work runs.

A backend is level-triggered by what it is told (`apply`) and answers with what it sees (`observe`).
It converges in its own time: rolling one replica after another, restarting what dies, draining what
goes. Not here: deciding what should run (core), or any one backend.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from reconciler.core.action import Effect
from reconciler.core.observed import Observation, Unknown


class Backend(Protocol):
    """One place where workloads run. One contract suite is run over every implementation.

    Every created thing carries an ownership mark (the config repo's identity), is found again by it
    after a crash, and is never touched without it.
    """

    name: str

    async def observe(self) -> Observation | Unknown:
        """What exists now. Never raises for an outage: that is `Unknown`. Cheap when nothing moved."""
        ...

    async def apply(self, action: Effect) -> None:
        """Takes one action on and returns once it would survive a crash of the reconciler: because it is
        written down, or because the next one would plan it again from what it sees.

        Idempotent: applying the same action twice equals applying it once; Delete of what is not
        there is done already. A rolling update keeps as many ready replicas as it had.

        Raises:
            NotOurs: the name exists under another mark.
            Stalled: this can never work as written (no such command, secret missing).
            Waiting: not now (a name still being deleted).
            Transient: the backend did not answer.
        """
        ...

    async def release(self, replica_ids: Collection[str]) -> None:
        """No router sends to these draining replicas any more: they may stop.

        A replica that is never released stops by itself at its drain timeout. Unknown ids are ignored.
        """
        ...

    async def close(self) -> None:
        """Lets go of connections and watchers; what runs goes on running."""
        ...
