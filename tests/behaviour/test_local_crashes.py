"""The reconciler killed at every step of its work: what comes after is exactly what was wanted."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.backends.local import LocalBackend
from reconciler.core.action import Create, Delete, Update
from reconciler.core.observed import Observation, Phase
from reconciler.core.workload import Workload
from tests.engines import engines_of, local_workload, processes_of
from tests.support import eventually

# Reads "STORY STATE_DIR OWNER SCRIPT N" a line; does the story in a fork that is killed at the N-th
# step that touches the world, and prints "killed" or "done".
DRIVER = """
import asyncio, os, pathlib, signal, sys
from reconciler.backends.local import LocalBackend
from reconciler.core.action import Create, Delete, Update
from reconciler.core.observed import Phase
from tests.engines import local_workload
from tests.support import eventually

def arm(last):
    count = 0
    def step():
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
    def wrap(owner, name):
        real = getattr(owner, name)
        def wrapped(*args, **kwargs):
            step()
            result = real(*args, **kwargs)
            step()
            return result
        setattr(owner, name, wrapped)
    wrap(os, "posix_spawn")
    wrap(os, "fsync")
    for name in ("replace", "mkdir", "unlink"):
        wrap(pathlib.Path, name)

async def story(kind, state, owner, script):
    backend = LocalBackend(pathlib.Path(state), owner, notify=lambda: None)
    one = local_workload(pathlib.Path(script), "one", replicas=2)
    two = local_workload(pathlib.Path(script), "two", replicas=2)
    async def reached(wanted):
        now = (await backend.observe()).workloads.get(one.name)
        await backend.release([r.id for r in (now.replicas if now else ())])
        if now is None or wanted is None:
            return now is None and wanted is None
        return [r.spec_digest for r in now.replicas if r.phase is Phase.READY] == [wanted] * 2 == [
            r.spec_digest for r in now.replicas
        ]
    await backend.start()
    if kind == "create":
        await backend.apply(Create(one, ""))
        await eventually(lambda: reached("one"))
    if kind == "roll":
        await backend.apply(Update(two, "roll", ""))
        await eventually(lambda: reached("two"))
    if kind == "delete":
        await backend.apply(Delete(one.name, "chat", "local", ""))
        await eventually(lambda: reached(None))

for line in sys.stdin:
    kind, state, owner, script, last = line.split()
    child = os.fork()
    if child == 0:
        arm(int(last))
        asyncio.run(story(kind, state, owner, script))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else "done" if status == 0 else "failed", flush=True)
"""


class Driver:
    def __init__(self, path: Path) -> None:
        file = path / "driver.py"
        file.write_text(DRIVER)
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            [sys.executable, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )

    def run(self, *words: object) -> str:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    made = Driver(tmp_path)
    yield made
    made.close()


async def settle(backend: LocalBackend, owner: str, wanted: Workload | None) -> None:
    """Until exactly the wanted engines run and are all observed, and then still do."""

    async def reached() -> bool:
        observation = await backend.observe()
        assert isinstance(observation, Observation)
        replicas = [r for w in observation.workloads.values() for r in w.replicas]
        await backend.release([r.id for r in replicas])
        if wanted is None and observation.workloads:
            return False
        ready = {r.id for r in replicas if r.phase is Phase.READY}
        fits = [r.spec_digest for r in replicas] == (
            [wanted.spec_digest] * wanted.replicas if wanted else []
        )
        return fits and set(engines_of(owner)) == ready == {r.id for r in replicas}

    await eventually(reached)


# Strides that are odd, so that points before and after a step alternate: a replica's steps repeat
# those of the other, and a run of every point takes a minute.
@pytest.mark.parametrize(("story", "stride"), [("create", 7), ("roll", 13), ("delete", 7)])
async def test_killed_anywhere_the_next_one_gets_exactly_what_is_wanted(
    story: str, stride: int, driver: Driver, tmp_path: Path
) -> None:
    script = tmp_path / "engine.py"
    one = local_workload(script, "one", replicas=2)
    two = local_workload(script, "two", replicas=2)
    killed = 0
    for point in range(1, 400, stride):
        owner, state = f"test-{uuid.uuid4().hex}", tmp_path / f"state-{point}"
        backend = LocalBackend(state, owner, notify=lambda: None)
        try:
            if story != "create":
                await backend.start()
                await backend.apply(Create(one, ""))
                await settle(backend, owner, one)
                await backend.close()
            outcome = await asyncio.to_thread(driver.run, story, state, owner, script, point)
            assert outcome in ("killed", "done")
            killed += outcome == "killed"
            await backend.start()
            # What the next pass of the reconciler does, whatever the last one had come to.
            match story:
                case "create":
                    await backend.apply(Create(one, ""))
                    await settle(backend, owner, one)
                case "roll":
                    await backend.apply(Update(two, "roll", ""))
                    await settle(backend, owner, two)
                case _:
                    await backend.apply(Delete(one.name, "chat", "local", ""))
                    await settle(backend, owner, None)
        finally:
            await backend.stop_all(grace_s=0)
        assert processes_of(owner) == []
        if outcome == "done":
            break
    assert killed >= 5


async def test_an_engine_whose_process_was_not_recorded_is_adopted_by_its_mark(
    tmp_path: Path,
) -> None:
    owner, state = f"test-{uuid.uuid4().hex}", tmp_path / "state"
    workload = local_workload(tmp_path / "engine.py")
    backend = LocalBackend(state, owner, notify=lambda: None)
    try:
        await backend.start()
        await backend.apply(Create(workload, ""))
        await settle(backend, owner, workload)
        before = engines_of(owner)
        await backend.close()
        (replica,) = (state / "replicas").iterdir()
        (replica / "process.json").unlink()
        await backend.start()
        await settle(backend, owner, workload)
        assert engines_of(owner) == before
        assert (replica / "process.json").exists()
    finally:
        await backend.stop_all(grace_s=0)


async def test_an_engine_without_any_record_is_ended(tmp_path: Path) -> None:
    owner, state = f"test-{uuid.uuid4().hex}", tmp_path / "state"
    workload = local_workload(tmp_path / "engine.py")
    backend = LocalBackend(state, owner, notify=lambda: None)
    try:
        await backend.start()
        await backend.apply(Create(workload, ""))
        await settle(backend, owner, workload)
        (stray,) = engines_of(owner)
        await backend.close()
        (state / "replicas" / stray / "replica.json").unlink()
        await backend.start()
        await settle(backend, owner, workload)
        assert stray not in engines_of(owner)
    finally:
        await backend.stop_all(grace_s=0)


UP = """
import asyncio, os, pathlib, subprocess, sys
from reconciler.backends.local import LocalBackend
from reconciler.core.action import Create
from tests.engines import local_workload

async def main():
    state, owner, script = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
    read_end, write_end = os.pipe()
    reaper = subprocess.Popen(
        [sys.executable, "-m", "reconciler.backends.local.reaper", "--lifeline-fd", str(read_end),
         "--state-dir", str(state), "--owner", owner, "--grace-s", "0.3"],
        pass_fds=(read_end,), start_new_session=True, stdout=subprocess.DEVNULL,
    )
    os.close(read_end)
    (state / "up").mkdir(parents=True)
    child = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
    (state / "up" / "router.pid").write_text(f"{child.pid}\\n")
    (state / "up" / "stale.pid").write_text(f"{os.getppid()}\\n")
    os.utime(state / "up" / "stale.pid", (0, 0))
    backend = LocalBackend(state, owner, notify=lambda: None)
    await backend.start()
    await backend.apply(Create(local_workload(script, *sys.argv[4:], replicas=2), ""))
    print(reaper.pid, child.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("moment", ["at once", "when they run"])
async def test_nothing_is_left_after_the_parent_is_killed(moment: str, tmp_path: Path) -> None:
    file, owner, state = tmp_path / "up.py", f"test-{uuid.uuid4().hex}", tmp_path / "state"
    file.write_text(UP)
    root = Path(__file__).resolve().parents[2]
    # One that ignores SIGTERM and has a child, so that only the hard way ends it.
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, str(file), str(state), owner, str(tmp_path / "engine.py")),
        *("stubborn", "child"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert parent.stdout is not None
    reaper_pid, child_pid = map(int, (await parent.stdout.readline()).split())
    try:
        if moment == "when they run":
            # Two engines, a child and a log writer of each.
            await eventually(lambda: len(processes_of(owner)) == 6)
            # What a terminal sends must not end it.
            os.kill(reaper_pid, signal.SIGINT)
        parent.kill()
        await parent.wait()
        await eventually(lambda: not _alive(reaper_pid), what="the reaper has finished")
        assert processes_of(owner) == []
        assert not _alive(child_pid)
        assert list((state / "up").glob("*.pid")) == []
    finally:
        for process in processes_of(owner):
            os.kill(process.id.pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
