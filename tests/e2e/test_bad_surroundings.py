"""`detoserve up` where things are in its way, break under it, or look for secrets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import openai
import psutil
import pytest
import redis

from reconciler.errors import Stalled
from reconciler.up import run as up_run
from schemas.wire import redis_keys
from tests.config_text import cluster, deployment, function
from tests.e2e.test_story import say, steady_requests
from tests.e2e.up_process import DETOSERVE, Up
from tests.git_repo import GitRepo
from tests.support import eventually_sync

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def refused(folder: Path, *args: str) -> str:
    """What `detoserve up` says when it does not come up at all."""
    done = subprocess.run(
        [DETOSERVE, "up", "--state-dir", folder / "refused", *args],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    return done.stderr


# --- in its way


def test_a_taken_port_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as foreign:
        port = foreign.getsockname()[1]
        said = refused(tmp_path, "--port", str(port))
    assert f"port {port} is taken by" in said
    assert f"pid {os.getpid()}" in said
    assert not (tmp_path / "detoserve-config").exists()


def test_an_address_that_is_not_here_is_said(tmp_path: Path) -> None:
    assert "cannot listen on 192.0.2.1" in refused(tmp_path, "--host", "192.0.2.1")


def test_where_the_default_port_is_taken_a_free_one_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []

    class Listener:
        warn = said.append

    settings = up_run.UpSettings(config=tmp_path, path=None, state_dir=tmp_path)
    with closing(socket.create_server(("127.0.0.1", 0))) as foreign:
        port = foreign.getsockname()[1]
        monkeypatch.setattr(up_run, "DEFAULT_PORT", port)
        assert up_run._port(settings, Listener()) == 0  # type: ignore[arg-type]
        assert f"port {port} is taken by" in said[0]
        explicit = up_run.UpSettings(config=tmp_path, path=None, state_dir=tmp_path, port=port)
        with pytest.raises(Stalled, match="give another --port"):
            up_run._port(explicit, Listener())  # type: ignore[arg-type]
    assert up_run._port(settings, Listener()) == port  # type: ignore[arg-type]


def test_a_folder_that_is_no_repo_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert "is no Git repository" in refused(tmp_path, "--config", str(folder))
    assert [f.name for f in folder.iterdir()] == ["notes.txt"]


def test_a_second_up_in_one_place_says_so(start_up: Callable[..., Up], tmp_path: Path) -> None:
    up = start_up()
    up.wait(lambda e: e["event"] == "step")
    said = refused(tmp_path, "--state-dir", str(up.state_dir))
    assert f"runs already here (pid {up.process.pid})" in said
    assert up.process.poll() is None


FILES: dict[str, str | bytes | None] = {
    "function.yaml": function("chat"),
    "cluster.yaml": cluster("here"),
    "deployment.yaml": deployment("chat", placement="cluster: here"),
}


def test_an_empty_repo_then_an_invalid_one_then_one_without_tenants(
    start_up: Callable[..., Up], tmp_path: Path
) -> None:
    repo = GitRepo(tmp_path / "detoserve-config")
    up = start_up()
    up.wait(lambda e: e["event"] == "problem" and "has no commit yet" in e["text"])
    repo.commit({**FILES, "deployment.yaml": "kind: Deployment\n"})
    up.wait(lambda e: e["event"] == "problem" and e["text"].startswith("deployment.yaml:1"))
    repo.commit(FILES)
    ready = up.ready()
    assert ready["api_key"] is None
    with pytest.raises(openai.AuthenticationError):
        say(up.client(ready, key="ds_nobody"), "Hello!")


# --- what breaks under it


def redis_of(up: Up) -> redis.Redis:
    pid = int((up.state_dir / "up" / "valkey.pid").read_text())
    argv = psutil.Process(pid).cmdline()
    sockets = [c.laddr for c in psutil.Process(pid).net_connections("unix") if c.laddr]
    assert sockets, argv
    return redis.Redis(unix_socket_path=str(sockets[0]))


def valkey_pid(up: Up) -> int:
    return int((up.state_dir / "up" / "valkey.pid").read_text())


def test_valkey_hanging_and_dying_loses_no_request(start_up: Callable[..., Up]) -> None:
    up = start_up()
    ready = up.ready()
    client = up.client(ready)
    with steady_requests(client) as (failures, done):
        pid = valkey_pid(up)
        os.kill(pid, signal.SIGSTOP)
        try:
            before = done[0]
            eventually_sync(lambda: done[0] > before + 30, timeout_s=30)
        finally:
            os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGKILL)
        eventually_sync(lambda: valkey_pid(up) != pid, timeout_s=20)

        def table_back() -> bool:
            with closing(redis_of(up)) as there:
                return bool(there.exists(redis_keys.ROUTES_CURRENT))

        eventually_sync(table_back, timeout_s=30)
        grown = up.replace("local/functions/chat.yaml", "minReplicas: 2", "minReplicas: 3")
        up.live("chat", 3, revision=grown)
        before = done[0]
        eventually_sync(lambda: done[0] > before + 10, timeout_s=20)
    assert not failures
    eventually_sync(lambda: grown in up.story(), timeout_s=20)


def test_a_full_disk_for_logs_stops_nothing(start_up: Callable[..., Up], tmp_path: Path) -> None:
    logs = tmp_path / "state" / "logs"
    logs.mkdir(parents=True)
    (logs / "router.log").symlink_to("/dev/full")
    (tmp_path / "state" / "valkey").mkdir()
    (tmp_path / "state" / "valkey" / "valkey.log").symlink_to("/dev/full")
    (tmp_path / "stderr.txt").symlink_to("/dev/full")
    up = start_up("--verbose")
    ready = up.ready()
    client = up.client(ready)
    assert say(client, "Hello!")
    with pytest.raises(openai.NotFoundError):
        say(client, "Hello!", model="nobody")
    grown = up.replace("local/functions/chat.yaml", "minReplicas: 2", "minReplicas: 3")
    up.live("chat", 3, revision=grown)
    assert say(client, "Hello!")
    assert up.stop() == 0


# --- secrets


def test_keys_and_prompts_stay_where_they_belong(
    start_up: Callable[..., Up], tmp_path: Path
) -> None:
    prompt = f"prompt-canary-{uuid.uuid4().hex}"
    wrong = f"ds_wrong{uuid.uuid4().hex}"
    up = start_up("--verbose")
    ready = up.ready()
    key: str = ready["api_key"]
    client = up.client(ready)
    assert say(client, prompt)
    for model, used in (("nobody", key), (prompt, key), ("chat", wrong)):
        with pytest.raises(openai.APIStatusError):
            say(up.client(ready, key=used), prompt, model=model)
    broken = urllib.request.Request(
        f"{ready['endpoint']}/chat/completions",
        data=f'{{"model": "chat", "messages": [{{"{prompt}'.encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        urllib.request.urlopen(broken, timeout=10)
    refused.value.close()
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": prompt}], max_tokens=-1
        )
    engines = up.processes(running="agent.simulated")
    for engine in engines:
        engine.suspend()
    with pytest.raises(openai.APIError):
        say(client.with_options(timeout=1), prompt)
    for engine in engines:
        engine.resume()

    needles = [prompt.encode(), key.encode(), wrong.encode()]
    with urllib.request.urlopen(f"{ready['admin']}/metrics", timeout=10) as answer:
        places: dict[str, bytes] = {"metrics": answer.read()}
    with closing(redis_of(up)) as there:
        for name in there.scan_iter():
            places[f"Redis {name!r}"] = bytes(name) + bytes(there.dump(name) or b"")
    for process in up.processes():
        with suppress(psutil.Error):
            places[f"argv of {process.pid}"] = " ".join(process.cmdline()).encode()
    up.stop()
    places["stderr"] = (tmp_path / "stderr.txt").read_bytes()
    for repo in (up.config / ".git", *up.state_dir.glob("*.git")):
        places[str(repo)] = subprocess.run(
            ["git", f"--git-dir={repo}", "cat-file", "--batch", "--batch-all-objects"],
            capture_output=True,
            check=True,
        ).stdout
    for file in up.state_dir.rglob("*"):
        if file.is_file() and file.name != "api-key.json":
            places[str(file)] = file.read_bytes()
    found = [place for place, data in places.items() if any(n in data for n in needles)]
    assert not found
    assert (up.state_dir / "api-key.json").stat().st_mode & 0o077 == 0
    assert json.loads((up.state_dir / "api-key.json").read_text())["key"] == key
    assert any("objects" not in place and b"chat" in data for place, data in places.items())
