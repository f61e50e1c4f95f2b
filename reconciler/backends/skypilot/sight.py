"""What is seen of SkyPilot's services: one status call, read with what is known from before.

Unknown is not absent: where an answer may hide services, it is no answer. Not here: what follows from
what is seen (backend).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf
from typing import Final

from reconciler.backends.skypilot.api import Refusal, SkyPilotApi
from reconciler.backends.skypilot.notes import Notes
from reconciler.backends.skypilot.rows import RowReader
from reconciler.core.observed import Phase
from reconciler.core.skypilot.service import Service
from reconciler.core.skypilot.states import Stage, gave_up, replica_state, service_state
from reconciler.errors import BackendUnreachable

RETRY_CAP_S: Final = 4 * 3600.0
_AT_REST: Final = frozenset({Phase.READY, Phase.FAILED})


class Sight:
    """Looks, and remembers since when each service of ours shows what it shows."""

    def __init__(
        self, api: SkyPilotApi, notes: Notes, owner: str, clock: Callable[[], float]
    ) -> None:
        self._api = api
        self._notes = notes
        self._owner = owner
        self._clock = clock
        self._reader = RowReader()
        self._since: dict[str, tuple[str, float]] = {}
        self._failing: dict[str, tuple[float, int]] = {}
        """Since when SkyServe has given up on it, and how often it was tried again by then."""
        self.services: dict[str, Service] | None = None
        """As of the last look that succeeded."""

    async def look(self) -> dict[str, Service]:
        """All services of the server.

        Raises:
            Refusal, BackendUnreachable: nothing is known.
        """
        services = await self._ask()
        self.services = services
        now, since = self._clock(), {}
        for name, service in self.ours.items():
            shows = service.status if service.answering else f"{service.status} silent"
            before = self._since.get(name)
            since[name] = before if before and before[0] == shows else (shows, now)
        self._since = since
        self._watch_failing(now)
        return services

    def retry_due(self, name: str, base_s: float) -> bool:
        """SkyServe gave up on it, and that is long enough ago: longer after every try."""
        since, tries = self._failing.get(name, (inf, 0))
        return self._clock() - since >= min(base_s * 2.0 ** min(tries, 20), RETRY_CAP_S)

    def tried_again(self, name: str) -> None:
        _, tries = self._failing.get(name, (inf, 0))
        self._failing[name] = (inf, tries + 1)

    def _watch_failing(self, now: float) -> None:
        failing = {}
        for name, service in self.ours.items():
            since, tries = self._failing.get(name, (inf, 0))
            newest = {r.status for r in service.replicas if r.version == service.version}
            if gave_up(service):
                failing[name] = (min(since, now), tries)
            elif tries and "READY" not in newest:
                failing[name] = (inf, tries)
        self._failing = failing

    def is_ours(self, service: Service) -> bool:
        return service.marks is not None and service.marks.owner == self._owner

    @property
    def ours(self) -> dict[str, Service]:
        return {n: s for n, s in (self.services or {}).items() if self.is_ours(s)}

    @property
    def foreign(self) -> frozenset[str]:
        there = self.services or {}
        return frozenset(n for n, s in there.items() if s.marks is not None and not self.is_ours(s))

    @property
    def moving(self) -> bool:
        """Something of ours is on its way, and worth another look soon."""
        for service in self.ours.values():
            stage = service_state(service.status, service.name).stage
            phases = {replica_state(r.status).phase for r in service.replicas}
            if stage in (Stage.BUSY, Stage.LEAVING) or not phases <= _AT_REST:
                return True
        return False

    def stuck(self, service: Service, after_s: float) -> str:
        """Why a human should look, once a passing state has not passed for so long; "" before."""
        name = service.name
        shows, since = self._since.get(name, ("", self._clock()))
        for_s = self._clock() - since
        stage = service_state(service.status, name).stage
        if for_s < after_s:
            return ""
        if stage is Stage.LEAVING:
            return (
                f"SkyPilot has been taking it down for {for_s / 60:.0f} min; if it stays so, look for "
                f"machines left running, then run: sky serve down --purge {name}"
            )
        if stage is Stage.BUSY or shows.endswith("silent"):
            return (
                f"its controller has not come up or not answered for {for_s / 60:.0f} min; look at: "
                f"sky serve logs --controller {name}"
            )
        return ""

    async def _ask(self) -> dict[str, Service]:
        try:
            rows = await self._api.status()
        except Refusal as error:
            if error.kind != "ClusterNotUpError" or "No live services" not in str(error):
                raise
            # So it says where there never was a controller, and where it takes one for stopped.
            if self.services or self._notes:
                await self._believe_gone()
            return {}
        services: Mapping[str, Service] = await asyncio.to_thread(self._reader.read, rows)
        return {name: self._with_task(service) for name, service in services.items()}

    async def _believe_gone(self) -> None:
        """Raises: BackendUnreachable, where services may well live on under a controller that is not seen."""
        if await self._api.has_controller():
            raise BackendUnreachable(
                "SkyPilot takes the controller of its services for stopped; start it again with: "
                "sky start NAME, where sky status -u shows its name"
            )

    def _with_task(self, service: Service) -> Service:
        """The service as of its last version that had a task: an update numbers the next one first.

        An update that was cut off leaves it so; what was last known of the service is then in its note.
        """
        note = self._notes.of(service.name)
        if service.marks is not None or note.incarnation != service.incarnation:
            return service
        return replace(service, version=max(note.digests, default=1), marks=note.marks)
