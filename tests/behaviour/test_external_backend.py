"""Engines that somebody else runs: followed by probing, never touched."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import web

from reconciler.backends.external import ExternalBackend
from reconciler.core.action import Create, Update
from reconciler.core.observed import ObservedWorkload, Phase
from reconciler.errors import Stalled
from tests.engines import external_workload, local_workload
from tests.support import eventually, free_port

READY, NOT_READY, DRAINING = Phase.READY, Phase.NOT_READY, Phase.DRAINING


class Engine:
    """Somebody else's: healthy until told otherwise."""

    def __init__(self) -> None:
        self.status = 200
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        if self.status == 302:
            raise web.HTTPFound("/elsewhere")
        return web.Response(status=self.status if request.path == "/health" else 200)


@pytest.fixture
async def engines() -> AsyncIterator[list[Engine]]:
    async with AsyncExitStack() as stack:
        made = [Engine() for _ in range(3)]
        for engine in made:
            app = web.Application()
            app.router.add_get("/{path:.*}", engine.answer)
            runner = web.AppRunner(app)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            engine.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield made


@pytest.fixture
async def backend() -> AsyncIterator[ExternalBackend]:
    made = ExternalBackend(notify=lambda: None)
    yield made
    await made.close()


async def seen(backend: ExternalBackend) -> ObservedWorkload:
    return (await backend.observe()).workloads["chat--there"]


async def phases(backend: ExternalBackend) -> dict[str | None, Phase]:
    return {r.url: r.phase for r in (await seen(backend)).replicas}


async def test_the_first_look_after_create_tells_what_is(
    backend: ExternalBackend, engines: list[Engine]
) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    engines[1].status = 503
    await backend.apply(Create(external_workload([engines[0].url, engines[1].url, dead]), "new"))
    assert await phases(backend) == {
        engines[0].url: READY,
        engines[1].url: NOT_READY,
        dead: NOT_READY,
    }
    details = {r.url: r.detail for r in (await seen(backend)).replicas}
    assert details[engines[1].url] == f"{engines[1].url}/health answers 503"
    assert "Connect call failed" in details[dead] or "refused" in details[dead].lower()


async def test_a_redirect_is_no_health(backend: ExternalBackend, engines: list[Engine]) -> None:
    engines[0].status = 302
    await backend.apply(Create(external_workload([engines[0].url]), "new"))
    assert await phases(backend) == {engines[0].url: NOT_READY}


async def test_health_is_followed_both_ways(
    backend: ExternalBackend, engines: list[Engine]
) -> None:
    await backend.apply(Create(external_workload([engines[0].url]), "new"))
    engines[0].status = 500

    async def is_now(phase: Phase) -> bool:
        return await phases(backend) == {engines[0].url: phase}

    await eventually(lambda: is_now(NOT_READY))
    engines[0].status = 200
    await eventually(lambda: is_now(READY))


async def test_a_changed_list_adds_and_drains_and_may_bring_back(
    backend: ExternalBackend, engines: list[Engine]
) -> None:
    a, b, c = (engine.url for engine in engines)
    await backend.apply(Create(external_workload([a, b]), "new"))
    ids = {r.url: r.id for r in (await seen(backend)).replicas}
    await backend.apply(Update(external_workload([b, c], spec="two"), "roll", "list"))
    assert await phases(backend) == {a: DRAINING, b: READY, c: READY}
    assert {r.spec_digest for r in (await seen(backend)).replicas} == {"two"}

    await backend.apply(Update(external_workload([a, b], spec="three"), "roll", "back"))
    assert await phases(backend) == {a: READY, b: READY, c: DRAINING}
    now = {r.url: r.id for r in (await seen(backend)).replicas}
    assert {url: now[url] for url in (a, b)} == ids
    await backend.release([now[c]])
    assert await phases(backend) == {a: READY, b: READY}


async def test_ids_are_the_same_for_the_next_reconciler(
    backend: ExternalBackend, engines: list[Engine]
) -> None:
    workload = external_workload([engine.url for engine in engines])
    await backend.apply(Create(workload, "new"))
    other = ExternalBackend(notify=lambda: None)
    await other.apply(Create(workload, "new"))
    assert await seen(other) == await seen(backend)
    await other.close()


async def test_suspended_means_no_replicas(backend: ExternalBackend, engines: list[Engine]) -> None:
    url = engines[0].url
    await backend.apply(Create(external_workload([url]), "new"))
    await backend.apply(Update(external_workload([url], replicas=0), "scale", "suspended"))
    assert await phases(backend) == {url: DRAINING}


async def test_a_function_without_endpoint_is_said(backend: ExternalBackend) -> None:
    await backend.apply(Create(external_workload([]), "new"))
    now = await seen(backend)
    assert now.replicas == ()
    assert now.detail == "cluster there names no endpoint for function test"


async def test_what_is_not_external_is_refused(backend: ExternalBackend, tmp_path: Path) -> None:
    with pytest.raises(Stalled, match="only watches endpoints"):
        await backend.apply(Create(local_workload(tmp_path / "engine.py"), "new"))
