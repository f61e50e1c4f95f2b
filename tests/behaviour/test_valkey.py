from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from redis.exceptions import OutOfMemoryError

from reconciler.errors import Stalled
from reconciler.publish.redis_edge import connect
from reconciler.publish.valkey import EmbeddedValkey
from tests.behaviour.publish_fixtures import running_valkey
from tests.support import eventually


async def test_it_answers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (valkey, redis):
        await redis.set("a", "1")
        assert await redis.get("a") == b"1"
        pid = valkey.pid
        assert pid is not None
        assert (tmp_path / "valkey.pid").read_text() == f"{pid}\n"
        assert stat.S_IMODE((tmp_path / "valkey.sock").stat().st_mode) == 0o700
    assert not psutil.pid_exists(pid)
    assert not (tmp_path / "valkey.pid").exists()
    assert not (tmp_path / "valkey.sock").exists()


async def test_killed_it_comes_back_on_the_same_socket_empty(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (valkey, redis):
        await redis.set("a", "1")
        first = valkey.pid
        for _ in range(2):
            pid = valkey.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await eventually(lambda pid=pid: valkey.pid not in (None, pid))
            assert await eventually(redis.ping)
        assert await redis.get("a") is None
        assert valkey.pid != first


async def test_what_does_not_fit_is_refused_and_nothing_is_evicted(tmp_path: Path) -> None:
    async with EmbeddedValkey(tmp_path, max_memory="3mb") as valkey:
        redis = connect(valkey.url)
        await redis.xadd("usage", {"a": "1"})
        fitting = 0
        with contextlib.suppress(OutOfMemoryError):
            for n in range(100):
                await redis.set(f"k{n}", b"x" * 100_000)
                fitting += 1
        assert 1 <= fitting < 40
        assert await redis.dbsize() == fitting + 1
        assert await redis.xlen("usage") == 1
        await redis.aclose()


async def test_a_deep_directory_gets_a_short_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    async with running_valkey(deep) as (valkey, redis):
        assert await redis.ping()
        socket = Path(valkey.url.removeprefix("unix://"))
        assert socket.exists()
    assert not socket.parent.exists()


async def test_odd_characters_in_the_path_do_no_harm(tmp_path: Path) -> None:
    async with running_valkey(tmp_path / "a b?#%41'\"") as (_, redis):
        assert await redis.ping()


async def test_two_do_not_share_a_directory(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (valkey, redis):
        with pytest.raises(Stalled, match="another process runs its Valkey"):
            async with EmbeddedValkey(tmp_path):
                pass
        assert await redis.ping()
        assert (tmp_path / "valkey.pid").read_text() == f"{valkey.pid}\n"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/bin/sh\necho wrong libc >&2; exit 3\n", "exit code 3: wrong libc"),
        ("no program at all", "Exec format error"),
    ],
)
async def test_a_binary_that_cannot_run_says_so(tmp_path: Path, script: str, said: str) -> None:
    binary = tmp_path / "valkey-server"
    binary.write_text(script)
    binary.chmod(0o755)
    with pytest.raises(Stalled, match=said) as error:
        async with EmbeddedValkey(tmp_path / "state", binary=binary):
            pass
    assert "give its URL" in str(error.value)


async def test_one_that_never_answers_is_given_up_and_killed(tmp_path: Path) -> None:
    binary = tmp_path / "valkey-server"
    binary.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    binary.chmod(0o755)
    with pytest.raises(Stalled, match=r"did not answer within 0\.3 s"):
        async with EmbeddedValkey(tmp_path / "state", binary=binary, ready_timeout_s=0.3):
            pass
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


async def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import asyncio, pathlib\n"
        "from reconciler.publish.valkey import EmbeddedValkey\n"
        "async def main():\n"
        f"    async with EmbeddedValkey(pathlib.Path({str(tmp_path)!r})) as valkey:\n"
        "        print(valkey.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    started = time.monotonic()
    await eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")
    assert time.monotonic() - started < 2
    async with running_valkey(tmp_path) as (_, redis):
        assert await redis.ping()
