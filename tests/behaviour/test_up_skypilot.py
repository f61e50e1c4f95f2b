"""The API server that `detoserve up --skypilot` starts: a module `sky.server.server`, as SkyPilot's is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from reconciler.backends.skypilot import SkyPilotApi
from reconciler.errors import Stalled
from reconciler.up.skypilot import local_server
from tests.sky_api_server import SkyApiServer
from tests.support import eventually, free_port

# Its executor ignores SIGTERM, as SkyPilot's orphaned ones do.
SERVER = """
import asyncio, os, signal, subprocess, sys
from tests.sky_api_server import main
assert os.environ["IS_SKYPILOT_SERVER"] == "true"
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
executor = subprocess.Popen([sys.executable, "-S", "-c", code])
open("executor.pid", "w").write(str(executor.pid))
asyncio.run(main())
"""


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return []


def install(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    (folder / "fake/sky/server").mkdir(parents=True)
    for file, text in {
        "__init__.py": "",
        "server/__init__.py": "",
        "server/server.py": code,
    }.items():
        (folder / "fake/sky" / file).write_text(text)
    monkeypatch.syspath_prepend(str(folder / "fake"))
    path = os.pathsep.join([str(folder / "fake"), *filter(None, sys.path)])
    port = str(free_port())
    return {**os.environ, "PYTHONPATH": path, "SKYPILOT_API_SERVER_LOCAL_PORT": port}


async def test_an_own_server_comes_up_and_leaves_nothing(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = install(tmp_path, SERVER, monkeypatch)
    async with local_server(tmp_path, environ, say=said.append, warn=said.append) as settings:
        api = SkyPilotApi(settings, "me")
        assert await api.status() == b"[]"
        await api.close()
        executor = int((tmp_path / "executor.pid").read_text())
        assert psutil.pid_exists(executor)
    await eventually(lambda: _gone(executor))
    assert not list((tmp_path / "up").glob("*.pid"))
    assert said[-1] == f"SkyPilot's API server at {settings.endpoint}"


async def test_one_that_is_there_is_used_and_left_alone(tmp_path: Path, said: list[str]) -> None:
    async with SkyApiServer().running() as server:
        environ = {"SKYPILOT_API_SERVER_LOCAL_PORT": server.url.rpartition(":")[2]}
        async with local_server(tmp_path, environ, say=said.append, warn=said.append) as settings:
            assert settings.endpoint == server.url
        async with local_server(tmp_path, environ, say=said.append, warn=said.append):
            assert "was there already" in said[-1]


async def test_one_that_does_not_start_says_where_to_look(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = install(tmp_path, "raise SystemExit('no database')", monkeypatch)
    with pytest.raises(Stalled, match=r"does not start; see .*skypilot\.log"):
        async with local_server(tmp_path, environ, say=said.append, warn=said.append):
            pass
    assert "no database" in (tmp_path / "logs/skypilot.log").read_text()


async def test_without_skypilot_it_says_what_to_install(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    environ = {"SKYPILOT_API_SERVER_LOCAL_PORT": str(free_port())}
    with pytest.raises(Stalled, match=r"pip install 'detoserve\[skypilot\]'"):
        async with local_server(tmp_path, environ, say=said.append, warn=said.append):
            pass


def _gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
