"""The external backend: engines that somebody else runs. It watches them and never touches them.

What it is told is kept in memory alone: the config repo says it again after a restart. Ids come from
workload and URL, so that an endpoint keeps its id over restarts. Not here: starting anything (local).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

from reconciler.backends.probe import Prober, follow
from reconciler.core.action import Create, Delete, Effect, Update
from reconciler.core.observed import Observation, ObservedReplica, ObservedWorkload, Phase
from reconciler.core.plan import template_data
from reconciler.core.workload import Workload
from reconciler.errors import Stalled, Waiting
from schemas.cluster import ExternalProvider

_FIRST_ANSWER_S: Final = 2.0


@dataclass(slots=True)
class _Endpoint:
    """One URL of a workload, and what probing it says."""

    id: str
    url: str
    phase: Phase = Phase.STARTING
    detail: str = "not probed yet"
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    probing: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    def still(self) -> None:
        if self.probing is not None:
            self.probing.cancel()
            self.probing = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


@dataclass(slots=True)
class _Told:
    workload: Workload
    endpoints: dict[str, _Endpoint] = field(default_factory=dict)
    deleting: bool = False


class ExternalBackend:
    """Endpoints as replicas: READY while they answer, DRAINING once the repo no longer names them.

    `notify` is called whenever an observation would differ. A workload with 0 replicas (suspended)
    has none of its endpoints; with any other number it has all of them.
    """

    name = "external"

    def __init__(self, *, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._prober = Prober()
        self._told: dict[str, _Told] = {}
        self._seen: Observation | None = None

    async def observe(self) -> Observation:
        if self._seen is None:
            workloads = {name: _observed(told) for name, told in sorted(self._told.items())}
            self._seen = Observation(self.name, workloads)
        return self._seen

    async def apply(self, action: Effect) -> None:
        """As the Protocol says; waits up to two seconds for the first answer of new endpoints."""
        match action:
            case Create(workload=workload) | Update(workload=workload):
                await self._take(workload)
            case Delete(name=name):
                self._delete(name)

    async def release(self, replica_ids: Collection[str]) -> None:
        for told in list(self._told.values()):
            for endpoint in list(told.endpoints.values()):
                if endpoint.id in replica_ids and endpoint.phase is Phase.DRAINING:
                    self._forget(told, endpoint)

    async def close(self) -> None:
        for told in self._told.values():
            for endpoint in told.endpoints.values():
                endpoint.still()
        await self._prober.close()

    async def _take(self, workload: Workload) -> None:
        if not isinstance(workload.provider, ExternalProvider):
            raise Stalled(
                f"cluster {workload.cluster} is {workload.provider.type}; the external backend only "
                "watches endpoints"
            )
        told = self._told.get(workload.name)
        if told is not None and told.deleting:
            raise Waiting(f"{workload.name} is still being deleted", retry_after_s=1.0)
        if told is not None and told.workload == workload:
            return
        same_probe = (
            told is not None and told.workload.template.readiness == workload.template.readiness
        )
        if told is None:
            told = self._told[workload.name] = _Told(workload)
        told.workload = workload
        urls = [e.url for e in workload.template.endpoints] if workload.replicas else []
        for endpoint in list(told.endpoints.values()):
            if endpoint.url not in urls:
                self._drain(told, endpoint)
        fresh = []
        for url in urls:
            endpoint = told.endpoints.get(url) or _Endpoint(_id(workload.name, url), url)
            told.endpoints[url] = endpoint
            if endpoint.phase is Phase.DRAINING:
                endpoint.phase, endpoint.detail = Phase.STARTING, "not probed yet"
                endpoint.answered.clear()
                endpoint.still()
            if endpoint.probing is None or not same_probe:
                self._watch(told, endpoint)
                fresh.append(endpoint)
        self._news()
        await _all_answered(fresh)

    def _delete(self, name: str) -> None:
        told = self._told.get(name)
        if told is None:
            return
        told.deleting = True
        for endpoint in list(told.endpoints.values()):
            self._drain(told, endpoint)
        if not told.endpoints:
            del self._told[name]
        self._news()

    def _watch(self, told: _Told, endpoint: _Endpoint) -> None:
        readiness = told.workload.template.readiness

        def report(ready: bool, why: str) -> None:
            phase = Phase.READY if ready else Phase.NOT_READY
            changed = (phase, why) != (endpoint.phase, endpoint.detail)
            endpoint.phase, endpoint.detail = phase, why
            endpoint.answered.set()
            if changed:
                self._news()

        async def ask() -> str | None:
            return await self._prober.ask(endpoint.url + readiness.path, readiness.timeout)

        endpoint.still()
        endpoint.probing = asyncio.create_task(
            follow(ask, readiness, ready=endpoint.phase is Phase.READY, report=report)
        )

    def _drain(self, told: _Told, endpoint: _Endpoint) -> None:
        if endpoint.phase is Phase.DRAINING:
            return
        endpoint.still()
        if endpoint.phase is Phase.STARTING:
            # Nobody was ever sent to it.
            self._forget(told, endpoint)
            return
        endpoint.phase, endpoint.detail = Phase.DRAINING, "finishes its requests"
        endpoint.timer = asyncio.get_running_loop().call_later(
            told.workload.rollout.drain_timeout, self._forget, told, endpoint
        )
        self._news()

    def _forget(self, told: _Told, endpoint: _Endpoint) -> None:
        endpoint.still()
        told.endpoints.pop(endpoint.url, None)
        if told.deleting and not told.endpoints:
            self._told.pop(told.workload.name, None)
        self._news()

    def _news(self) -> None:
        self._seen = None
        self._notify()


async def _all_answered(endpoints: Collection[_Endpoint]) -> None:
    """Until each has answered or failed once, so that the next observation says what is."""
    try:
        async with asyncio.timeout(_FIRST_ANSWER_S):
            await asyncio.gather(*(endpoint.answered.wait() for endpoint in endpoints))
    except TimeoutError:
        return


def _id(workload: str, url: str) -> str:
    return f"{workload}-{hashlib.blake2b(url.encode(), digest_size=4).hexdigest()}"


def _observed(told: _Told) -> ObservedWorkload:
    workload = told.workload
    detail = ""
    if told.deleting:
        detail = f"deleting: {len(told.endpoints)} endpoints finish their requests"
    elif not workload.template.endpoints:
        detail = f"cluster {workload.cluster} names no endpoint for function {workload.function}"
    return ObservedWorkload(
        name=workload.name,
        deployment=workload.deployment,
        spec_digest=workload.spec_digest,
        replicas_wanted=workload.replicas,
        replicas=tuple(
            ObservedReplica(
                id=endpoint.id,
                phase=endpoint.phase,
                # What they run is not ours to change: they always run what they run.
                spec_digest=workload.spec_digest,
                url=endpoint.url,
                detail=endpoint.detail,
            )
            for endpoint in sorted(told.endpoints.values(), key=lambda e: e.url)
        ),
        deleting=told.deleting,
        template=template_data(workload.template),
        detail=detail,
    )
