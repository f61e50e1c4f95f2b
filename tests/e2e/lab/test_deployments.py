"""From commits alone: what is written in Git comes up on SkyPilot, changes, is repaired and goes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.e2e.lab.lab import Lab
from tests.e2e.lab.lab_site import counts, deployment, function, lab_site, routed_traffic

pytestmark = [pytest.mark.e2e, pytest.mark.skypilot, pytest.mark.timeout(3600)]


BY_LOAD = ", maxReplicas: 3, metric: concurrency, target: 2, upscaleDelay: 2s, downscaleDelay: 30s"


async def test_the_life_of_deployments(lab: Lab, tmp_path: Path) -> None:
    async with lab_site(tmp_path, lab) as site, routed_traffic(site) as clients:
        site.repo.commit(
            {
                "functions/chat.yaml": function("chat", replicas=2),
                "functions/small.yaml": function("small", gpu="L4"),
                "functions/busy.yaml": function("busy", by_load=BY_LOAD),
                "deployments/chat.yaml": deployment("chat"),
                "deployments/small.yaml": deployment("small"),
                "deployments/busy.yaml": deployment("busy"),
            }
        )
        site.reconcile()
        born = await site.reaches(
            "2 + 1 replicas on H100 and 1 on L4 are routed to",
            counts(chat=2, small=1, busy=1),
            timeout_s=1200,
        )
        assert len(await site.services()) == 3
        assert len(await site.jobs("H100")) == 3
        assert len(await site.jobs("L4")) == 1
        for model in ("chat", "small", "busy"):
            first = await clients.say(model, "Hello")
            assert not first.wrong
            assert first.replica in born[model]

        async with clients.steady("chat"):
            # Three times as many where it is asked for; all the while, one that fails is replaced.
            async with clients.steady("busy", clients=8):
                victim = next(job for job in await site.jobs("H100") if "chat" in job.name)
                cancelled = time.monotonic()
                lab.cancel(victim)
                site.say(f"cancelled the job on {victim.node}")
                left = await site.reaches(
                    "the lost replica is routed to no more",
                    lambda r: len(r["chat"] & born["chat"]) < 2,
                    timeout_s=400,
                )
                await site.reaches(
                    "it is replaced, and load has made 3 of 1",
                    counts(chat=2, busy=3),
                    timeout_s=1200,
                )
            (lost,) = born["chat"] - left["chat"]
            for failed in clients.failures():
                assert failed.replica == lost, failed
                assert failed.began < cancelled + 5, failed
            site.say(f"{len(clients.asked)} requests, {len(clients.failures())} cut off with it")
            clients.asked.clear()
            assert (await site.routed())["small"] == born["small"]

            # The API server goes away in the middle of everything, and comes back.
            before, jobs = await site.routed(), await site.jobs()
            lab.kill_api_server()
            site.say("killed the API server")
            site.repo.commit({"functions/chat.yaml": function("chat", replicas=2, itl_s=0.01)})
            await asyncio.sleep(8)  # some passes of a reconciler that knows nothing
            assert await site.routed() == before
            took_s = await asyncio.to_thread(lab.start_api_server)
            site.say(f"API server back, healthy after {took_s:.0f} s")
            assert {job.id for job in jobs} <= {job.id for job in await site.jobs()}

            # What was committed meanwhile rolls now, and what load made goes with the load.
            await site.reaches(
                "2 replicas of the new spec alone, and 1 of 3",
                lambda r: counts(chat=2, busy=1)(r) and not r["chat"] & before["chat"],
                timeout_s=1200,
            )
        assert clients.failures()[:5] == []
        site.say(f"{len(clients.asked)} requests meanwhile, none failed")
        assert (await site.routed())["small"] == born["small"]

        await site.remove(["small", "busy", "chat"])
        assert await site.services() == {}
        assert "Traceback" not in site.log()
