"""`detoserve keys` as a process: keys are shown once, and only hashes reach files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from schemas.api_keys import create, key_id
from tests.behaviour.cli_process import (
    COMMAND,
    ENVIRON,
    commit,
    detoserve,
    example_repo,
    git,
    on_terminal,
)

TENANT = "tenants/demo.yaml"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return example_repo(tmp_path / "repo")


def test_the_key_is_alone_on_stdout_and_its_hash_on_stderr() -> None:
    made = detoserve("keys", "create", "--tenant", "acme")
    assert made.returncode == 0
    key = made.stdout.removesuffix("\n")
    assert key_id(key) is not None
    assert hashlib.sha256(key.encode()).hexdigest() in made.stderr
    assert key not in made.stderr
    assert f"- id: {key_id(key)}" in made.stderr


def test_json_is_one_object() -> None:
    made = detoserve(
        *("keys", "create", "-t", "acme", "--id", "web", "--scopes", "inference,usage"),
        *("--expires", "90d", "-o", "json"),
    )
    data = json.loads(made.stdout)
    assert data["id"] == "web"
    assert data["tenant"] == "acme"
    assert data["entry"]["sha256"] == hashlib.sha256(data["key"].encode()).hexdigest()
    assert data["entry"]["scopes"] == ["inference", "usage"]
    left = datetime.fromisoformat(data["entry"]["expires"]) - datetime.now(UTC)
    assert timedelta(days=89, hours=23) < left <= timedelta(days=90)
    assert made.stderr == ""


def test_into_the_tenants_file_committed_alone(repo: Path) -> None:
    (repo / "other.txt").write_text("staged, but not ours")
    git(repo, "add", "other.txt")
    before = (repo / TENANT).read_text()
    made = detoserve("keys", "create", "-t", "demo", "--repo", repo, "--commit")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    after = (repo / TENANT).read_text()
    assert after.startswith(before.splitlines()[0])
    assert hashlib.sha256(key.encode()).hexdigest() in after
    assert git(repo, "log", "-1", "--format=%s") == f"Add key {key_id(key)} for tenant demo"
    assert git(repo, "show", "--name-only", "--format=", "HEAD") == TENANT
    assert git(repo, "status", "--short") == "A  other.txt"
    assert key not in git(repo, "log", "-p")
    assert detoserve("validate", repo).returncode == 0


def test_a_sub_path_of_the_repo(tmp_path: Path) -> None:
    example_repo(tmp_path / "repo" / "inner")
    made = detoserve(
        "keys", "create", "-t", "demo", "--repo", tmp_path / "repo" / "inner", "--path", "."
    )
    assert made.returncode == 0, made.stderr
    assert "sha256" in (tmp_path / "repo" / "inner" / TENANT).read_text()


def test_where_a_hook_refuses_nothing_is_left_and_no_key_shown(repo: Path) -> None:
    hook = repo / ".git" / "hooks" / "pre-commit"
    hook.write_text("#!/bin/sh\necho not on Fridays >&2\nexit 1\n")
    hook.chmod(0o755)
    before = (repo / TENANT).read_text()
    made = detoserve("keys", "create", "-t", "demo", "--repo", repo, "--commit")
    assert made.returncode == 2
    assert made.stdout == ""
    assert "not on Fridays" in made.stderr
    assert (repo / TENANT).read_text() == before


def test_an_unknown_tenant_is_told_with_the_likely_one(repo: Path) -> None:
    made = detoserve("keys", "create", "-t", "dem", "--repo", repo)
    assert made.returncode == 2
    assert made.stdout == ""
    assert 'did you mean "demo"?' in made.stderr


def test_a_key_is_not_written_into_a_file_of_a_repository(repo: Path, tmp_path: Path) -> None:
    argv = [*COMMAND, "keys", "create", "-t", "demo"]
    for target, code in ((repo / "key.txt", 2), (tmp_path / "key.txt", 0)):
        with target.open("w") as out:
            made = subprocess.run(
                argv, stdout=out, stderr=subprocess.PIPE, text=True, env=ENVIRON, check=False
            )
        assert made.returncode == code, made.stderr
        assert bool(target.read_text()) == (code == 0)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--expires", "2020-01-01"], "--expires 2020-01-01 is in the past"),
        (["--expires", "soon"], "--expires: 'soon' is no time; write a duration from now"),
        (["--scopes", "root"], "--scopes: Input should be 'inference'"),
        (["--id", "no spaces"], "--id: "),
        (["--commit"], "--commit needs --repo DIR"),
    ],
)
def test_what_cannot_be_is_one_line(args: list[str], said: str) -> None:
    made = detoserve("keys", "create", "-t", "demo", *args)
    assert made.returncode == 2
    assert made.stdout == ""
    assert said in made.stderr
    assert made.stderr.count("\n") == 1


def test_a_foreign_key_is_imported_from_stdin_and_seen_nowhere(repo: Path) -> None:
    key = "sk-from-another-gateway-0123456789"
    made = detoserve("keys", "import", "-t", "demo", "--stdin", "--repo", repo, stdin=f"{key}\n")
    assert made.returncode == 0, made.stderr
    hashed = hashlib.sha256(key.encode()).hexdigest()
    assert hashed in (repo / TENANT).read_text()
    assert f"imported-{hashed[:8]}" in (repo / TENANT).read_text()
    assert key not in made.stdout + made.stderr
    assert detoserve("validate", repo).returncode == 0


def test_import_takes_a_hash_and_refuses_a_key_in_its_place() -> None:
    made = detoserve("keys", "import", "-t", "demo", "--sha256", "AB" * 32, "--id", "old")
    assert made.stdout == f"    - id: old\n      sha256: {'ab' * 32}\n"
    key = create().text
    refused = detoserve("keys", "import", "-t", "demo", "--sha256", key)
    assert refused.returncode == 2
    assert "belongs on stdin" in refused.stderr
    assert key not in refused.stdout + refused.stderr
    assert detoserve("keys", "import", "-t", "demo").returncode == 2
    assert detoserve("keys", "import", "-t", "demo", "--stdin", stdin="a b").returncode == 2


def test_rotate_then_revoke(repo: Path) -> None:
    made = detoserve(
        *("keys", "create", "-t", "demo", "--id", "web", "--scopes", "usage"), "--repo", repo
    )
    assert made.returncode == 0, made.stderr
    commit(repo, "Add web")
    turned = detoserve(
        *("keys", "rotate", "-t", "demo", "--id", "web", "--new-id", "web2", "--overlap", "7d"),
        *("--commit", "-o", "json"),
        cwd=repo,
    )
    assert turned.returncode == 0, turned.stderr
    data = json.loads(turned.stdout)
    assert data["entry"]["scopes"] == ["usage"]
    assert data["commit"] == git(repo, "rev-parse", "HEAD")
    text = (repo / TENANT).read_text()
    expires = datetime.fromisoformat(text.split("expires: '")[1].split("'")[0])
    assert timedelta(days=6, hours=23) < expires - datetime.now(UTC) <= timedelta(days=7)
    gone = detoserve("keys", "revoke", "-t", "demo", "--id", "web", "--commit", cwd=repo)
    assert gone.returncode == 0, gone.stderr
    text = (repo / TENANT).read_text()
    assert "id: web2" in text
    assert "id: web\n" not in text
    again = detoserve("keys", "revoke", "-t", "demo", "--id", "web", cwd=repo)
    assert again.returncode == 2
    assert "it has web2" in again.stderr


def test_on_a_terminal_a_person_is_told_what_to_do(tmp_path: Path) -> None:
    seen = on_terminal("keys", "create", "-t", "acme", cwd=tmp_path)
    assert seen.startswith("The key, shown only this once:\nds_")
    assert "Add its hash to spec.keys of Tenant/acme" in seen


def test_no_traceback_shows_a_key_when_stdout_is_closed(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    made = subprocess.run(
        [*COMMAND, "keys", "create", "-t", "acme"],
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRON,
        cwd=tmp_path,
        check=False,
    )
    os.close(theirs)
    assert made.returncode != 0
    assert "ds_" not in made.stderr
