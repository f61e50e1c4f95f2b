"""`detoserve validate`, `render` and `schemas`, and what all commands share, as processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reconciler.cli import COMMANDS
from schemas.api_keys import create
from tests.behaviour.cli_process import (
    ENVIRON,
    commit,
    detoserve,
    edit,
    example_repo,
    git,
    on_terminal,
)

FUNCTION = "functions/chat.yaml"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return example_repo(tmp_path / "repo")


def test_help_lists_every_command_and_loads_none() -> None:
    code = (
        "import sys; from reconciler.cli import main\n"
        "sys.argv = ['detoserve', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "slow = {'pydantic', 'git', 'ruamel', 'rich', 'asyncio', 'redis', 'aiohttp'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRON, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    for name, entry in COMMANDS.items():
        assert f"  {name} " in made.stdout
        assert entry.summary in made.stdout


def test_validate_loads_no_git() -> None:
    code = "import sys, reconciler.cli.validate; assert 'git' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=ENVIRON, check=True)


def test_usage_errors_exit_with_2_and_say_what_is_near() -> None:
    made = detoserve("validat")
    assert made.returncode == 2
    assert "Did you mean 'validate'" in made.stderr
    assert detoserve("validate", "--nope").returncode == 2


def test_a_valid_folder(repo: Path) -> None:
    made = detoserve("validate", cwd=repo)
    assert made.returncode == 0
    assert made.stdout == ""
    count = len(list(repo.rglob("*.yaml")))
    assert made.stderr == f"{count} objects in {count} files: no problems\n"


def test_problems_have_a_place_in_every_form(repo: Path) -> None:
    edit(repo, FUNCTION, "minReplicas: 2", "minReplicaz: 2")
    line = 1 + (repo / FUNCTION).read_text().splitlines().index("    minReplicaz: 2")
    made = detoserve("validate", "repo", cwd=repo.parent)
    assert made.returncode == 1
    assert made.stdout.startswith(f"repo/{FUNCTION}:{line}:5: error: ")
    assert 'did you mean "minReplicas"?' in made.stdout
    assert "error" in made.stderr.splitlines()[-1]

    data = json.loads(detoserve("validate", repo, "-o", "json").stdout)
    assert data["errors"] == len([p for p in data["problems"] if p["severity"] == "error"]) > 0
    first = data["problems"][0]
    assert (first["line"], first["column"], first["object"]) == (line, 5, "Function/chat")
    assert data["revision"] is None

    made = detoserve("validate", "repo", "-o", "github", cwd=repo.parent)
    assert made.stdout.startswith(f"::error file=repo/{FUNCTION},line={line},col=5::")


def test_a_terminal_shows_the_line_and_a_caret(repo: Path) -> None:
    edit(repo, FUNCTION, "minReplicas: 2", "minReplicaz: 2")
    seen = on_terminal("validate", cwd=repo, no_color="1")
    assert " |     minReplicaz: 2\n" in seen
    assert " |     ^\n" in seen
    assert "\033[" not in seen
    assert "\033[" in on_terminal("validate", cwd=repo)


def test_a_key_in_the_repo_is_found_and_not_repeated(repo: Path) -> None:
    key = create().text
    (repo / "notes.txt").write_text(f"the key is {key}\n")
    made = detoserve("validate", repo)
    assert made.returncode == 1
    assert "notes.txt:1:12" in made.stdout
    assert key not in made.stdout + made.stderr
    assert key not in on_terminal("validate", cwd=repo)


def test_a_revision_whatever_the_files_are(repo: Path) -> None:
    git(repo, "branch", "good")
    edit(repo, FUNCTION, "kind: Function", "kind: Funktion")
    commit(repo, "Break it")
    assert detoserve("validate", repo, "--ref", "good").returncode == 0
    made = detoserve("validate", repo, "--ref", "main", "-o", "json")
    assert made.returncode == 1
    data = json.loads(made.stdout)
    assert data["revision"] == git(repo, "rev-parse", "main")
    assert data["problems"][0]["path"] == FUNCTION


def test_bare_repositories_and_urls(repo: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.git"
    git(tmp_path, "clone", "--quiet", "--bare", str(repo), str(bare))
    assert detoserve("validate", bare, "--ref", "main").returncode == 0
    assert detoserve("validate", f"file://{bare}").returncode == 0
    made = detoserve("validate", f"file://{bare}", "--ref", "nope")
    assert (made.returncode, made.stderr.count("\n")) == (2, 1)
    assert "has no branch nope" in made.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["/nowhere"], "is no folder"),
        ([".", "--ref", "nope"], "has no revision 'nope'"),
        ([".", "--ref", "main", "--path", "nope"], "is no folder at"),
        (["https://user:hunter2@127.0.0.1:9/x.git"], "cannot be read"),
        (["ext::sh"], "is no folder"),
    ],
)
def test_what_cannot_be_read_exits_with_2(repo: Path, args: list[str], said: str) -> None:
    made = detoserve("validate", *args, cwd=repo)
    assert made.returncode == 2
    assert made.stderr.startswith("error: ")
    assert said in made.stderr
    assert "Traceback" not in made.stderr
    assert "hunter2" not in made.stderr


def test_symlinks_in_git_are_problems(repo: Path) -> None:
    (repo / "functions" / "link.yaml").symlink_to("/etc/passwd")
    commit(repo, "Link")
    made = detoserve("validate", repo, "--ref", "main")
    assert made.returncode == 1
    assert "functions/link.yaml" in made.stdout
    assert "root:" not in made.stdout


def test_warnings_fail_only_when_strict(repo: Path) -> None:
    edit(repo, "tenants/demo.yaml", 'models: ["*"]', 'models: ["*", "nothing-of-the-kind-*"]')
    assert detoserve("validate", repo).returncode == 0
    assert detoserve("validate", repo, "--strict").returncode == 1


def test_render(repo: Path) -> None:
    data = json.loads(detoserve("render", repo, "chat", "-o", "json").stdout)
    assert [d["deployment"] for d in data] == ["chat"]
    assert data[0]["argv"][1:3] == ["-m", "agent.simulated"]
    assert detoserve("render", "chat", cwd=repo).stdout.startswith("deployment: chat\n")
    made = detoserve("render", repo, "cht")
    assert made.returncode == 2
    assert 'did you mean "chat"?' in made.stderr
    routes = json.loads(detoserve("render", repo, "--routes", "-o", "json").stdout)
    assert [f["name"] for f in routes[0]["functions"]] == ["chat", "embed"]


def test_schemas(tmp_path: Path) -> None:
    made = detoserve("schemas", tmp_path / "out")
    assert made.returncode == 0
    assert json.loads((tmp_path / "out" / "all.json").read_text())
    assert made.stdout.count("\n") == len(list((tmp_path / "out").iterdir()))
    (tmp_path / "file").write_text("")
    refused = detoserve("schemas", tmp_path / "file")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")


def test_a_full_disk_behind_stderr_does_not_change_the_exit_code(tmp_path):
    detoserve = Path(sys.executable).parent / "detoserve"
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run(
            [detoserve, "validate", tmp_path / "missing"], stderr=full, check=False, timeout=30
        )
    assert done.returncode == 2
