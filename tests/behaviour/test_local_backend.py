"""The local backend with real processes: crashes, rolls, drains, full disks and foreign neighbours."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from reconciler.backends.local import LocalBackend
from reconciler.backends.local.processes import all_running, environ_of
from reconciler.backends.local.replica import ReplicaSettings
from reconciler.core.action import Create, Delete, Update
from reconciler.core.observed import Observation, ObservedReplica, ObservedWorkload, Phase
from reconciler.core.workload import Workload
from reconciler.errors import Stalled, Transient
from schemas.function import Readiness
from tests.engines import engines_of, local_workload, processes_of
from tests.support import eventually, free_port

FAST = ReplicaSettings(restart_base_s=0.05, restart_cap_s=0.5)


class Bench:
    """A backend under an owner of its own, and what tests ask about it."""

    def __init__(self, path: Path) -> None:
        self.path, self.owner = path, f"test-{uuid.uuid4().hex}"
        self.state = path / "state"
        self.script = path / "engine.py"
        self.told = 0
        self.options: dict[str, Any] = {"settings": FAST}
        self.backend = self._new()

    def _new(self) -> LocalBackend:
        def notify() -> None:
            self.told += 1

        return LocalBackend(self.state, self.owner, notify=notify, **self.options)

    async def start(self, **options: Any) -> None:
        self.options |= options
        self.backend = self._new()
        await self.backend.start()

    async def restart(self, **options: Any) -> None:
        await self.backend.close()
        await self.start(**options)

    def workload(self, *behaviour: str, **options: Any) -> Workload:
        return local_workload(self.script, *behaviour, **options)

    async def create(self, workload: Workload) -> None:
        await self.backend.apply(Create(workload, "new"))

    async def seen(self, name: str = "chat--here") -> ObservedWorkload | None:
        observation = await self.backend.observe()
        assert isinstance(observation, Observation), observation
        return observation.workloads.get(name)

    async def replicas(self, name: str = "chat--here") -> tuple[ObservedReplica, ...]:
        now = await self.seen(name)
        return now.replicas if now else ()

    async def until(
        self,
        condition: Callable[[ObservedWorkload], bool],
        *,
        name: str = "chat--here",
        release: bool = False,
    ) -> ObservedWorkload:
        async def probe() -> ObservedWorkload | None:
            now = await self.seen(name)
            assert now is not None
            if release:
                drained = [r.id for r in now.replicas if r.phase is Phase.DRAINING]
                await self.backend.release(drained)
            return now if condition(now) else None

        found = await eventually(probe)
        assert found is not None
        return found

    async def until_ready(self, workload: Workload, *, release: bool = True) -> ObservedWorkload:
        return await self.until(
            lambda now: (
                [(r.phase, r.spec_digest) for r in now.replicas]
                == [(Phase.READY, workload.spec_digest)] * workload.replicas
            ),
            name=workload.name,
            release=release,
        )

    def pids(self) -> dict[str, int]:
        return engines_of(self.owner)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    await made.start()
    yield made
    await made.backend.stop_all(grace_s=0.5)
    assert processes_of(made.owner) == []


async def get(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return await answer.text()


# --- starting, failing, restarting


async def test_a_killed_engine_comes_back_under_a_new_id_and_port(bench: Bench) -> None:
    workload = bench.workload(replicas=2)
    await bench.create(workload)
    before = await bench.until_ready(workload)
    victim, other = before.replicas
    os.kill(bench.pids()[victim.id], signal.SIGKILL)
    failed = await bench.until(lambda now: now.count(Phase.FAILED) == 1)
    assert "SIGKILL" in next(r.detail for r in failed.replicas if r.phase is Phase.FAILED)
    after = await bench.until_ready(workload)
    assert {r.id for r in after.replicas} == {other.id, after.replicas[1].id}
    assert victim.id not in {r.id for r in after.replicas}
    assert after.replicas[1].restarts == 1
    assert set(bench.pids()) == {r.id for r in after.replicas}


async def test_an_engine_that_cannot_start_fails_with_its_last_words_and_backs_off(
    bench: Bench,
) -> None:
    await bench.create(bench.workload("die"))
    now = await bench.until(
        lambda now: bool(now.replicas) and "no such weights" in now.replicas[0].detail
    )
    assert now.replicas[0].detail.startswith("exited with code 3 before it was ready")
    again = await bench.until(lambda now: bool(now.replicas) and now.replicas[0].restarts >= 3)
    assert len(again.replicas) == 1
    assert again.count(Phase.READY) == 0


async def test_an_engine_that_is_never_ready_fails_when_its_time_is_over(bench: Bench) -> None:
    impatient = Readiness.model_validate(
        {"initialDelay": "300ms", "timeout": "100ms", "interval": "50ms"}
    )
    await bench.create(bench.workload("late", readiness=impatient))
    now = await bench.until(lambda now: now.count(Phase.FAILED) == 1)
    assert "not ready for 0.3 s" in now.replicas[0].detail
    assert "engine starts with late" in now.replicas[0].detail
    await bench.until(lambda now: bool(now.replicas) and now.replicas[0].restarts >= 1)


async def test_a_sick_engine_is_not_ready_and_heals(bench: Bench) -> None:
    workload = bench.workload()
    await bench.create(workload)
    ready = await bench.until_ready(workload)
    await get(f"{ready.replicas[0].url}/sick")
    now = await bench.until(lambda now: now.count(Phase.NOT_READY) == 1)
    assert "503" in now.replicas[0].detail
    await get(f"{now.replicas[0].url}/heal")
    healed = await bench.until_ready(workload)
    assert healed.replicas[0].id == ready.replicas[0].id


async def test_children_of_an_engine_go_with_it(bench: Bench) -> None:
    workload = bench.workload("child")
    await bench.create(workload)
    ready = await bench.until_ready(workload)
    leader = bench.pids()[ready.replicas[0].id]

    def session() -> set[int]:
        return {p.id.pid for p in all_running() if p.session == leader}

    children = session() - {leader}
    assert len(children) == 1
    os.kill(leader, signal.SIGKILL)
    await eventually(lambda: not session())
    await bench.until_ready(workload)


async def test_changes_are_told_at_once(bench: Bench) -> None:
    workload = bench.workload()
    await bench.create(workload)
    await bench.until_ready(workload)
    told = bench.told
    first = await bench.backend.observe()
    assert await bench.backend.observe() is first, "nothing moved: nothing is computed"
    assert bench.told == told
    os.kill(next(iter(bench.pids().values())), signal.SIGKILL)
    await eventually(lambda: bench.told > told)
    assert await bench.backend.observe() is not first


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({"command": ["no-such-program"]}, "no-such-program is not on the reconciler's PATH"),
        ({"command": ["/nowhere/engine"]}, "/nowhere/engine is no program"),
        ({"secrets": {"TOKEN": {"fromEnv": "NOT_SET_ANYWHERE"}}}, "NOT_SET_ANYWHERE is not set"),
        ({"secrets": {"TOKEN": {"fromFile": "/nowhere/token"}}}, "/nowhere/token cannot be read"),
        ({"secrets": {"TOKEN": {"kubernetesSecret": "a/b"}}}, "no Kubernetes Secrets"),
        ({"engine": "triton", "command": []}, "give runtime.command"),
    ],
)
async def test_what_can_never_work_is_refused_in_words_and_changes_nothing(
    bench: Bench, runtime: dict[str, Any], words: str
) -> None:
    workload = bench.workload()
    await bench.create(workload)
    before = await bench.until_ready(workload)
    with pytest.raises(Stalled, match=words):
        await bench.backend.apply(Update(bench.workload(spec="bad", **runtime), "roll", "bad"))
    assert await bench.seen() == before


async def test_a_secret_reaches_the_engine_and_nothing_else(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    token = f"canary-{uuid.uuid4().hex}"
    await bench.restart(environ={**os.environ, "SOURCE": token, "DETOSERVE_REDIS_URL": "hidden"})
    workload = bench.workload("secret", "die", secrets={"TOKEN": {"fromEnv": "SOURCE"}})
    await bench.create(workload)
    now = await bench.until(
        lambda now: bool(now.replicas) and "the token is [secret]" in now.replicas[0].detail
    )
    assert token not in repr(now)
    assert token not in caplog.text
    holding = [
        str(f)
        for f in bench.state.rglob("*")
        if f.is_file() and f.suffix != ".log" and token in f.read_text()
    ]
    assert holding == []


async def test_engines_do_not_inherit_what_concerns_the_reconciler(bench: Bench) -> None:
    await bench.restart(
        environ={**os.environ, "DETOSERVE_REDIS_URL": "x", "GIT_TOKEN": "x", "HF_HOME": "/m"}
    )
    workload = bench.workload(env={"PLACE": "{host}:{port} {replica} {other}"})
    await bench.create(workload)
    ready = await bench.until_ready(workload)
    replica = ready.replicas[0]
    environ = environ_of(bench.pids()[replica.id])
    assert environ["HF_HOME"] == "/m"
    assert "DETOSERVE_REDIS_URL" not in environ
    assert "GIT_TOKEN" not in environ
    host_port = (replica.url or "").removeprefix("http://")
    assert environ["PLACE"] == f"{host_port} {replica.id} {{other}}"


# --- neighbours


async def test_a_foreign_process_on_the_port_is_never_routed_to_nor_touched(bench: Bench) -> None:
    port = free_port()
    code = (
        "import http.server, sys\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "    def log_message(self, *a): pass\n"
        f"http.server.HTTPServer(('127.0.0.1', {port}), H).serve_forever()\n"
    )
    foreign = subprocess.Popen([sys.executable, "-S", "-c", code])
    try:

        async def serves() -> bool:
            await get(f"http://127.0.0.1:{port}/")
            return True

        await eventually(serves)
        offered = iter([port])
        await bench.restart(pick_port=lambda host: next(offered, 0) or _kernels_choice(host))
        workload = bench.workload()
        urls: list[str | None] = []
        await bench.create(workload)

        def ready_elsewhere(now: ObservedWorkload) -> bool:
            urls.extend(r.url for r in now.replicas if r.phase is Phase.READY)
            failed = [r.detail for r in now.replicas if r.phase is Phase.FAILED]
            details.extend(failed)
            return now.count(Phase.READY) == 1

        details: list[str] = []
        now = await bench.until(ready_elsewhere)
        assert f"http://127.0.0.1:{port}" not in urls
        assert now.replicas[0].restarts == 1
        assert any("Address already in use" in d for d in details)
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def _kernels_choice(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


async def test_an_engine_of_another_state_directory_is_left_alone(
    bench: Bench, tmp_path: Path
) -> None:
    workload = bench.workload()
    await bench.create(workload)
    await bench.until_ready(workload)
    pids = bench.pids()
    neighbour = LocalBackend(tmp_path / "other", bench.owner, notify=lambda: None)
    await neighbour.start()
    await neighbour.stop_all(grace_s=0)
    assert bench.pids() == pids
    assert (await bench.until_ready(workload)).replicas[0].restarts == 0


async def test_a_second_reconciler_in_the_same_directory_is_refused(bench: Bench) -> None:
    second = LocalBackend(bench.state, bench.owner, notify=lambda: None)
    with pytest.raises(Stalled, match="another reconciler"):
        await second.start()
    await second.close()


# --- adoption


async def test_adoption_keeps_pid_port_and_stream(bench: Bench) -> None:
    workload = bench.workload(replicas=2)
    await bench.create(workload)
    before = await bench.until_ready(workload)
    pids = bench.pids()
    url = before.replicas[0].url
    async with aiohttp.ClientSession() as session, session.get(f"{url}/stream") as answer:
        await answer.content.readany()
        await bench.restart()
        assert await bench.seen() == before, "ready from the first look on"
        assert bench.pids() == pids
        await get(f"{url}/finish")
        assert (await answer.content.read()).endswith(b"end")
    assert (await bench.until_ready(workload)) == before


async def test_an_adopted_engine_that_dies_is_restarted(bench: Bench) -> None:
    workload = bench.workload()
    await bench.create(workload)
    before = await bench.until_ready(workload)
    await bench.restart()
    os.kill(bench.pids()[before.replicas[0].id], signal.SIGKILL)
    await bench.until(lambda now: now.replicas[0].id != before.replicas[0].id)
    await bench.until_ready(workload)


async def test_what_died_while_nobody_watched_is_started_again(bench: Bench) -> None:
    workload = bench.workload(replicas=2)
    await bench.create(workload)
    before = await bench.until_ready(workload)
    await bench.backend.close()
    os.kill(bench.pids()[before.replicas[0].id], signal.SIGKILL)
    await eventually(lambda: len(bench.pids()) == 1)
    await bench.start()
    after = await bench.until_ready(workload)
    assert before.replicas[1].id in {r.id for r in after.replicas}


async def test_a_record_that_cannot_be_read_quarantines_its_name_and_stops_nothing(
    bench: Bench,
) -> None:
    workload = bench.workload()
    await bench.create(workload)
    before = await bench.until_ready(workload)
    pids = bench.pids()
    await bench.backend.close()
    (bench.state / "workloads" / workload.name / "workload.json").write_text('{"owner": ')
    await bench.start()
    now = await bench.seen()
    assert now is not None
    assert now.quarantined
    assert now.replicas == before.replicas
    assert "workload.json cannot be understood" in now.detail
    for action in (Create(workload, ""), Delete(workload.name, "chat", "local", "")):
        with pytest.raises(Stalled, match="quarantined"):
            await bench.backend.apply(action)
    assert bench.pids() == pids


# --- rolling


async def test_a_roll_never_has_fewer_ready_than_before(bench: Bench) -> None:
    old, new = bench.workload("one", replicas=3), bench.workload("two", replicas=3)
    await bench.create(old)
    await bench.until_ready(old)
    await bench.backend.apply(Update(new, "roll", "changed"))
    ready: list[int] = []
    total: list[int] = []

    def watch(now: ObservedWorkload) -> bool:
        ready.append(now.count(Phase.READY))
        total.append(len(now.replicas) - now.count(Phase.DRAINING))
        return [r.spec_digest for r in now.replicas] == ["two"] * 3 and ready[-1] == 3

    await bench.until(watch, release=True)
    assert min(ready) >= 3
    assert max(total) <= 4


async def test_blue_green_drains_all_old_ones_together(bench: Bench) -> None:
    blue = {"strategy": "blueGreen"}
    old = bench.workload("one", replicas=2, rollout=blue)
    new = bench.workload("two", replicas=2, rollout=blue)
    await bench.create(old)
    await bench.until_ready(old)
    await bench.backend.apply(Update(new, "roll", "changed"))
    now = await bench.until(lambda now: now.count(Phase.DRAINING) > 0)
    assert now.count(Phase.DRAINING) == 2
    assert now.count(Phase.READY) == 2
    await bench.until_ready(new)


async def test_a_spec_that_does_not_start_leaves_the_old_one_serving(bench: Bench) -> None:
    old, bad = bench.workload("one", replicas=2), bench.workload("die", replicas=2)
    await bench.create(old)
    before = await bench.until_ready(old)
    await bench.backend.apply(Update(bad, "roll", "changed"))
    now = await bench.until(lambda now: "no such weights" in now.detail)
    assert "2 replicas of the old one left serving" in now.detail
    serving = {r.id for r in now.replicas if r.phase is Phase.READY}
    assert serving == {r.id for r in before.replicas}

    good = bench.workload("three", replicas=2)
    await bench.backend.apply(Update(good, "roll", "fixed"))
    await bench.until_ready(good)


async def test_reverting_cancels_the_roll(bench: Bench) -> None:
    old, bad = bench.workload("one", replicas=2), bench.workload("late", replicas=2)
    await bench.create(old)
    before = await bench.until_ready(old)
    await bench.backend.apply(Update(bad, "roll", "changed"))
    await bench.until(lambda now: now.count(Phase.STARTING) == 1)
    await bench.backend.apply(Update(old, "roll", "reverted"))
    assert (await bench.until_ready(old)) == before


async def test_max_processes_rolls_one_by_one(bench: Bench) -> None:
    old = bench.workload("one", replicas=2, max_processes=2)
    new = bench.workload("two", replicas=2, max_processes=2)
    await bench.create(old)
    await bench.until_ready(old)
    await bench.backend.apply(Update(new, "roll", "changed"))
    ready: list[int] = []
    details: set[str] = set()

    def watch(now: ObservedWorkload) -> bool:
        ready.append(now.count(Phase.READY))
        details.add(now.detail)
        assert len(bench.pids()) <= 2
        return [r.spec_digest for r in now.replicas] == ["two"] * 2 and ready[-1] == 2

    await bench.until(watch, release=True)
    assert min(ready) == 1
    assert any("maxProcesses 2" in d for d in details)


async def test_a_workload_without_room_waits_for_it(bench: Bench) -> None:
    first = bench.workload(name="first--here", replicas=2, max_processes=2)
    second = bench.workload(name="second--here", replicas=1, max_processes=2)
    await bench.create(first)
    await bench.until_ready(first)
    await bench.create(second)
    now = await bench.until(lambda now: bool(now.detail), name=second.name)
    assert now.detail == "maxProcesses 2 is reached: 1 replica waiting"
    assert now.replicas == ()
    await bench.backend.apply(Delete(first.name, "first", "local", "gone"))
    await bench.backend.release([r.id for r in await bench.replicas(first.name)])
    assert (await bench.until_ready(second)).detail == ""


# --- draining


async def test_a_drain_waits_for_the_stream_that_is_under_way(bench: Bench) -> None:
    workload = bench.workload()
    await bench.create(workload)
    replica = (await bench.until_ready(workload)).replicas[0]
    async with aiohttp.ClientSession() as session, session.get(f"{replica.url}/stream") as answer:
        await answer.content.readany()
        await bench.backend.apply(Delete(workload.name, "chat", "local", "gone"))
        await bench.backend.release([replica.id])
        # Told to stop, it takes no new connection, and what it carries goes on.
        await eventually(lambda: _refuses(replica.url or ""))
        assert await answer.content.readany()
        assert (await bench.replicas())[0].phase is Phase.DRAINING
        os.kill(bench.pids()[replica.id], signal.SIGUSR1)
        assert (await answer.content.read()).endswith(b"end")

    async def gone() -> bool:
        return await bench.seen() is None

    await eventually(gone)
    assert not (bench.state / "workloads" / workload.name).exists()
    assert list((bench.state / "replicas").iterdir()) == []
    assert (bench.state / "logs" / "engines" / f"{replica.id}.log").exists()


async def _refuses(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with suppress(OSError):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.close()
        return False
    return True


async def test_an_engine_that_does_not_stop_is_killed_with_its_children(bench: Bench) -> None:
    await bench.restart(settings=ReplicaSettings(unserved_grace_s=0.2))
    workload = bench.workload("stubborn", "child", rollout={"drainTimeout": "200ms"})
    await bench.create(workload)
    await bench.until_ready(workload)
    await bench.backend.apply(Delete(workload.name, "chat", "local", "gone"))

    async def gone() -> bool:
        return await bench.seen() is None

    # Nobody released it: its drain timeout did.
    await eventually(gone)
    await eventually(lambda: processes_of(bench.owner) == [])


async def test_a_drain_goes_on_after_a_restart_of_the_reconciler(bench: Bench) -> None:
    workload = bench.workload()
    await bench.create(workload)
    replica = (await bench.until_ready(workload)).replicas[0]
    await bench.backend.apply(Delete(workload.name, "chat", "local", "gone"))
    await bench.restart()
    now = await bench.seen()
    assert now is not None
    assert now.deleting
    assert [(r.id, r.phase, r.url) for r in now.replicas] == [
        (replica.id, Phase.DRAINING, replica.url)
    ]
    await bench.backend.release([replica.id])

    async def gone() -> bool:
        return await bench.seen() is None

    await eventually(gone)


# --- disks


async def test_a_full_disk_for_logs_stops_neither_engine_nor_reconciler(bench: Bench) -> None:
    workload = bench.workload()
    await bench.create(workload)
    await bench.until_ready(workload)
    # The log writer of the next engine may write no more than a few bytes.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noisy = bench.workload("chatty")
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        await bench.backend.apply(Update(noisy, "roll", "changed"))
        now = await bench.until(lambda now: len(now.replicas) == 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ready = await bench.until_ready(noisy)
    assert ready.replicas[0].id == now.replicas[1].id, "it printed 1.6 MB and never noticed"
    log = bench.state / "logs" / "engines" / f"{ready.replicas[0].id}.log"
    assert log.stat().st_size == 64 * 1024


async def test_a_disk_that_takes_no_records_delays_starts_and_loses_nothing(bench: Bench) -> None:
    one = bench.workload("one")
    await bench.create(one)
    before = await bench.until_ready(one)
    (bench.state / "replicas").rename(bench.state / "aside")
    (bench.state / "replicas").write_text("no folder any more")
    two = bench.workload("one", replicas=2)
    await bench.backend.apply(Update(two, "scale", "more"))
    now = await bench.until(lambda now: now.count(Phase.FAILED) == 1)
    assert "cannot be started" in now.replicas[1].detail
    assert now.count(Phase.READY) == 1
    assert set(bench.pids()) == {before.replicas[0].id}
    (bench.state / "replicas").unlink()
    (bench.state / "aside").rename(bench.state / "replicas")
    await bench.until_ready(two)


async def test_what_cannot_be_promised_on_disk_is_not_begun(bench: Bench) -> None:
    (bench.state / "workloads" / "chat--here").write_text("in the way")
    with pytest.raises(Transient, match="cannot be recorded"):
        await bench.create(bench.workload())
    assert bench.pids() == {}
    (bench.state / "workloads" / "chat--here").unlink()
    await bench.create(bench.workload())
    await bench.until_ready(bench.workload())


async def test_logs_are_bounded_and_those_of_ended_replicas_too(bench: Bench) -> None:
    await bench.restart(settings=ReplicaSettings(log_size_bytes=100_000))
    workload = bench.workload("chatty")
    await bench.create(workload)
    replica = (await bench.until_ready(workload)).replicas[0]
    logs = bench.state / "logs" / "engines"
    sizes = [f.stat().st_size for f in logs.glob(f"{replica.id}.log*")]
    assert len(sizes) == 2
    assert max(sizes) <= 100_000
    for index in range(70):
        (logs / f"old-{index:02}.log").write_text("ended")
        (logs / f"old-{index:02}.log.1").write_text("ended")
    await bench.restart()
    assert len(list(logs.glob("old-*.log"))) == 50
    assert len(list(logs.glob("old-*.log.1"))) == 50
    assert (logs / f"{replica.id}.log").exists()


# --- the end


async def test_stop_all_leaves_no_process_and_a_next_start_brings_all_back(bench: Bench) -> None:
    workload = bench.workload("child", replicas=2)
    await bench.create(workload)
    await bench.until_ready(workload)
    await bench.backend.stop_all(grace_s=2)
    assert processes_of(bench.owner) == []
    await bench.start()
    again = await bench.until_ready(workload)
    assert [r.restarts for r in again.replicas] == [0, 0]


async def test_stop_all_kills_what_does_not_listen(bench: Bench) -> None:
    workload = bench.workload("stubborn", "child", replicas=2)
    await bench.create(workload)
    await bench.until_ready(workload)
    await bench.backend.stop_all(grace_s=0.1)
    assert processes_of(bench.owner) == []
