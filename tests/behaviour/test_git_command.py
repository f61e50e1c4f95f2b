from __future__ import annotations

import stat
import time
from pathlib import Path

import psutil
import pytest

from reconciler.git_command import (
    GitFailed,
    GitTimeout,
    environment,
    hide_credentials,
    protocol_of,
    redact,
    run_git,
)
from tests.support import eventually

CANARY = "canary-5f1d"


@pytest.mark.parametrize(
    "text",
    [
        f"fatal: unable to access 'https://user:{CANARY}@host/x.git/': 401",
        f"https://{CANARY}@host/x",
        f"https://user:p@{CANARY}@host/x",
        f"ssh://git:{CANARY}@host:22/x",
        f"https://host/x.git?access_token={CANARY}&a=1",
        f"https://host/x.git?private_token={CANARY}",
        f"-c http.extraHeader=Authorization: Bearer {CANARY}",
        f"authorization: {CANARY}",
        f"PRIVATE-TOKEN: {CANARY}",
        f"ghp_{CANARY.replace('-', '')}",
        f"glpat-{CANARY}",
    ],
)
def test_credentials_are_taken_out(text: str) -> None:
    assert CANARY not in redact(text)
    assert CANARY.replace("-", "") not in redact(text)


def test_the_rest_stays_readable() -> None:
    assert redact("https://u:p@host/a/b.git refs/heads/main") == (
        "https://***@host/a/b.git refs/heads/main"
    )
    assert redact("git@host:a/b.git") == "git@host:a/b.git"


@pytest.mark.parametrize(
    ("remote", "protocol"),
    [
        ("https://host/x", "https"),
        ("HTTP://host/x", "http"),
        ("ssh://host/x", "ssh"),
        ("git://host/x", "git"),
        ("git@host:x.git", "ssh"),
        ("host:x", "ssh"),
        ("/srv/x.git", "file"),
        ("./a:b/x", "file"),
        ("x", "file"),
        ("file:///srv/x", "file"),
    ],
)
def test_a_remote_names_its_one_transport(remote: str, protocol: str) -> None:
    assert protocol_of(remote) == protocol


@pytest.mark.parametrize("remote", ["ext::sh -c x", "ftp://host/x", f"weird://u:{CANARY}@host"])
def test_other_transports_are_refused(remote: str) -> None:
    with pytest.raises(ValueError, match="use https://") as error:
        protocol_of(remote)
    assert CANARY not in str(error.value)


def test_surroundings_cannot_redirect_git() -> None:
    base = {
        "HOME": "/home/x",
        "GIT_DIR": "/elsewhere",
        "GIT_TRACE_CURL": "1",
        "GIT_INDEX_FILE": "i",
        "GIT_SSH_COMMAND": "ssh -i key",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "credential.helper",
        "GIT_CONFIG_VALUE_0": "store",
    }
    made = environment(base, protocol=None)
    assert {"GIT_DIR", "GIT_TRACE_CURL", "GIT_INDEX_FILE"}.isdisjoint(made)
    assert made["HOME"] == "/home/x"
    assert made["GIT_SSH_COMMAND"] == "ssh -i key"
    assert made["GIT_CONFIG_VALUE_0"] == "store"
    assert made["GIT_ALLOW_PROTOCOL"] == "none"


async def test_a_failure_tells_the_command_and_gits_words(tmp_path: Path) -> None:
    await run_git(tmp_path / "r.git", "init", "--bare", "--quiet")
    with pytest.raises(GitFailed, match="git rev-parse --verify nothing: fatal") as error:
        await run_git(tmp_path / "r.git", "rev-parse", "--verify", "nothing")
    assert error.value.returncode == 128


async def test_a_transport_that_was_not_asked_for_is_refused(tmp_path: Path) -> None:
    await run_git(tmp_path / "r.git", "init", "--bare", "--quiet")
    with pytest.raises(GitFailed, match="transport 'file' not allowed"):
        await run_git(tmp_path / "r.git", "ls-remote", str(tmp_path / "r.git"), protocol="https")


async def test_a_hanging_git_and_its_children_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run_git(tmp_path / "r.git", "init", "--bare", "--quiet")
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("GIT_SSH", str(ssh))
    started = time.monotonic()
    with pytest.raises(GitTimeout, match=r"no end after 0\.5 s"):
        await run_git(tmp_path / "r.git", "ls-remote", "ssh://h/x", protocol="ssh", timeout_s=0.5)
    assert time.monotonic() - started < 5
    pid = int((tmp_path / "pid").read_text())
    await eventually(lambda: not psutil.pid_exists(pid))


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("fatal: Authentication failed for 'https://h/x/'", True),
        ("fatal: could not read Username for 'https://h': terminal prompts disabled", True),
        ("git@h: Permission denied (publickey).", True),
        ("error: The requested URL returned error: 403", True),
        ("Host key verification failed.", True),
        ("ssh: connect to host h port 22: Connection refused", False),
        ("fatal: unable to access 'https://h/': Could not resolve host: h", False),
        ("error: The requested URL returned error: 503", False),
    ],
)
def test_refused_credentials_are_told_from_an_outage(said: str, refused: bool) -> None:
    assert GitFailed(["fetch"], 128, b"", said.encode()).credentials_refused == refused


def test_the_password_in_a_url_is_in_no_argument() -> None:
    args = ("fetch", "--", "https://al%40ice:pa%2Fss@host/x.git", "+refs/heads/main:refs/x")
    bare, settings, env = hide_credentials(args)
    assert bare == ["fetch", "--", "https://host/x.git", "+refs/heads/main:refs/x"]
    assert not [text for text in (*bare, *settings) if "pa/ss" in text or "pa%2Fss" in text]
    assert env == {"DETOSERVE_GIT_USERNAME": "al@ice", "DETOSERVE_GIT_PASSWORD": "pa/ss"}
    for plain in ("https://alice@host/x.git", "git@host:x.git", "/srv/a:b@c"):
        assert hide_credentials([plain]) == ([plain], [], {})
