"""A reconciler that is killed at any step of a create or a delete leaves neither two nor a half."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.e2e.lab.api_proxy import STAGES, api_proxy
from tests.e2e.lab.lab import Lab
from tests.e2e.lab.lab_site import deployment, function, lab_site
from tests.e2e.lab.layout import API_URL

pytestmark = [pytest.mark.e2e, pytest.mark.skypilot, pytest.mark.timeout(3600)]

CREATE = [
    ("/serve/up", "sent"),
    ("/serve/up", "taken"),
    ("/serve/up", "answered"),
    ("/api/get /serve/up", "sent"),
    ("/api/get /serve/up", "answered"),
]
DELETE = [("/serve/down", stage) for stage in STAGES]


async def test_killed_at_every_step_each_deployment_is_there_once(lab: Lab, tmp_path: Path) -> None:
    """One deployment a step: all are created by one commit, and each kills at its own step."""
    names = [f"d{number}" for number in range(len(CREATE))]
    killed: list[tuple[str, str]] = []
    restart = asyncio.Event()

    async with lab_site(tmp_path, lab) as site:

        def at(stage: str, call: str, service: str) -> bool:
            step = (call, stage)
            if step not in CREATE + DELETE or step in killed or restart.is_set():
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
            files = {f"deployments/{name}.yaml": deployment(name) for name in names}
            files |= {f"functions/{name}.yaml": function(name) for name in names}
            site.repo.commit(files)
            site.reconcile()
            await site.reaches(
                f"{len(names)} replicas are routed to",
                lambda r: all(len(r.get(name, ())) == 1 for name in names),
                timeout_s=1200,
            )
            assert set(killed) == set(CREATE), killed
            services = await site.services()
            assert sorted(services) == sorted(set(services))
            assert len(services) == len(names), services
            assert len(await site.jobs()) == len(names)
            ups = {service: n for (call, service), n in proxy.taken.items() if call == "/serve/up"}
            assert len(ups) == len(names)
            assert set(ups.values()) == {1}, ups

            await site.remove(names)
            assert set(killed) == {*CREATE, *DELETE}, killed
            reviving.cancel()
        assert await site.services() == {}
        assert await site.jobs() == []
