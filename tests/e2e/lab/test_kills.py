"""A reconciler that is killed at any step of a create or a delete leaves neither two nor a half."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.e2e.lab.api_proxy import STAGES, api_proxy
from tests.e2e.lab.lab import Lab
from tests.e2e.lab.lab_site import counts, deployment, function, lab_site
from tests.e2e.lab.layout import API_URL

pytestmark = [pytest.mark.e2e, pytest.mark.skypilot, pytest.mark.timeout(3600)]

UP = [("/serve/up", stage) for stage in STAGES]
RESULT = [("/api/get /serve/up", "sent"), ("/api/get /serve/up", "answered")]
DOWN = [("/serve/down", stage) for stage in STAGES]


async def test_killed_at_every_step_each_deployment_is_there_once(lab: Lab, tmp_path: Path) -> None:
    """Three are created at once, and each is killed over at a step of its own; then one more."""
    names = [f"d{number}" for number in range(4)]
    wanted: list[tuple[str, str]] = []
    killed: list[tuple[str, str]] = []
    restart = asyncio.Event()

    async with lab_site(tmp_path, lab) as site:

        def at(stage: str, call: str, service: str) -> bool:
            step = (call, stage)
            if step not in wanted or step in killed or restart.is_set():
                return False
            killed.append(step)
            site.kill()
            site.say(f"killed with {call} of {service} {stage}")
            restart.set()
            return True

        async with api_proxy(API_URL, at) as proxy:
            site.api_url = proxy.url

            async def revive() -> None:
                while True:
                    await restart.wait()
                    restart.clear()
                    site.reconcile()

            reviving = asyncio.create_task(revive())
            site.reconcile()
            for steps, created in ((UP, names[:3]), (RESULT, names[3:])):
                wanted += steps
                files = {f"deployments/{name}.yaml": deployment(name) for name in created}
                files |= {f"functions/{name}.yaml": function(name) for name in created}
                site.repo.commit(files)
                await site.reaches(
                    f"{created} are routed to",
                    counts(**dict.fromkeys(created, 1)),
                    timeout_s=1200,
                )
                assert set(killed) == set(wanted)
            services = await site.services()
            assert len(services) == len(names), services
            assert len(await site.jobs()) == len(names)
            ups = {service: n for (call, service), n in proxy.taken.items() if call == "/serve/up"}
            assert len(ups) == len(names)
            assert set(ups.values()) == {1}, ups

            wanted += DOWN
            await site.remove(names)
            assert set(killed) == set(wanted)
            reviving.cancel()
        assert await site.services() == {}
        assert await site.jobs() == []
