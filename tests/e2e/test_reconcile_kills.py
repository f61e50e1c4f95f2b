"""`detoserve reconcile` killed, stopped and doubled: the same fixpoint, and nothing twice."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reconciler.publish.valkey import EmbeddedValkey
from schemas.wire import redis_keys
from tests.config_text import tenant
from tests.e2e.reconcile_process import Site, engine_function, quick_deployment
from tests.support import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with EmbeddedValkey(tmp_path / "valkey") as valkey:
        made = Site(tmp_path, valkey.url, owner=f"kills-{uuid.uuid4().hex[:8]}")
        made.first_commit()
        try:
            yield made
        finally:
            await made.close()


async def test_kills_at_random_moments_end_in_exactly_what_is_wanted(site: Site) -> None:
    rng = random.Random(20250117)
    wanted = {"chat": 1}
    replicas, word = 1, 0
    for turn in range(15):
        process = site.start()
        match turn % 4:
            case 0:
                name = f"extra{turn}"
                wanted[name] = 0
                site.repo.commit({f"deployments/{name}.yaml": quick_deployment(name)})
            case 1 | 3:
                replicas = rng.choice([1, 2, 3])
                word += turn % 4 == 3
                text = engine_function(site.script, replicas=replicas, word=f"w{word}")
                site.repo.commit({"functions/chat.yaml": text})
            case _:
                name = rng.choice(sorted(wanted.keys() - {"chat"}))
                del wanted[name]
                site.repo.commit({f"deployments/{name}.yaml": None})
        # Not waiting for anything: the moment is what the test is about.
        await asyncio.sleep(rng.uniform(0.6, 2.2))
        process.kill()
        process.wait()
    site.start()
    await site.converged(dict.fromkeys(wanted, replicas))
    # And it stays so: what died half-started has not come back.
    site.repo.commit({"README.md": "done"})
    await site.converged(dict.fromkeys(wanted, replicas))
    assert "Traceback" not in site.log()


async def test_the_next_reconciler_adopts_what_runs(site: Site) -> None:
    process = site.start()
    await site.converged({"chat": 1})
    before = site.engines()
    for signum in (signal.SIGKILL, signal.SIGTERM):
        process.send_signal(signum)
        process.wait()
        assert site.engines() == before
        if signum == signal.SIGTERM:
            assert process.returncode == 0
            assert await site.redis.exists(redis_keys.LEASE) == 0
        site.repo.commit({"README.md": f"after {signum}"})
        process = site.start()
        await site.converged({"chat": 1})
        assert site.engines() == before


async def test_a_second_reconciler_in_one_state_directory_says_so(site: Site) -> None:
    site.start()
    await site.converged({"chat": 1})
    second = site.start()
    assert second.wait(20) == 2
    assert f"{site.folder}/state; stop it, or use another state directory" in site.log()


async def test_a_stopped_leader_is_replaced_and_writes_nothing_when_it_wakes(site: Site) -> None:
    first = site.start("state", "--lease-ttl-s", "1.5")
    await site.converged({"chat": 1})
    # One key for both, as two replicas of one service have it.
    (site.folder / "second").mkdir()
    shutil.copy(site.folder / "state" / "routes-signing-key.pem", site.folder / "second")
    second = site.start("second", "--lease-ttl-s", "1.5")
    await eventually(lambda: "not writing: " in site.log("second"))
    assert (await site.table()).lease == 1

    first.send_signal(signal.SIGSTOP)
    site.repo.commit({"tenants/acme.yaml": tenant("acme", models="chat")})

    async def taken_over() -> bool:
        table = await site.table()
        return table.lease == 2 and table.tenants[0].models == ("chat",)

    await eventually(taken_over, timeout_s=20)
    await eventually(lambda: next(site.lease_story()) == 2, timeout_s=20)
    first.send_signal(signal.SIGCONT)
    await eventually(lambda: "took the lease with generation 2" in site.log("state"))
    head = site.repo.commit({"tenants/acme.yaml": tenant("acme", models="chat, other")})
    await eventually(lambda: site.summary()["revision"] == head, timeout_s=20)
    story = list(site.lease_story())
    assert story == sorted(story, reverse=True)
    assert story[0] == 2
    table = await site.table()
    assert table.lease == 2
    assert table.tenants[0].models == ("chat", "other")

    second.send_signal(signal.SIGTERM)
    assert second.wait(20) == 0

    async def back() -> bool:
        return (await site.table()).lease == 3

    await eventually(back, timeout_s=20)
    await site.converged({"chat": 1})
    assert "Traceback" not in site.log("state") + site.log("second")
