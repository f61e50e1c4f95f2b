"""`detoserve plan` as a process: against revisions, and against what runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from reconciler.backends.local.state import StateDir, WorkloadRecord
from reconciler.core.compile import compile_workloads
from reconciler.core.last_good import effective
from reconciler.loop.state import State, StateFile
from reconciler.sources.loader import load_directory
from tests.behaviour.cli_process import EXAMPLE, commit, detoserve, edit, example_repo, git

FUNCTION = "functions/chat.yaml"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return example_repo(tmp_path / "repo")


def verbs(data: dict[str, Any]) -> dict[str, str]:
    return {row["deployment"]: row["verb"] for row in data["workloads"]}


def plan_of(*args: str | Path, cwd: Path, code: int = 0) -> dict[str, Any]:
    made = detoserve("plan", *args, "-o", "json", cwd=cwd)
    assert made.returncode == code, made.stderr
    data: dict[str, Any] = json.loads(made.stdout)
    return data


def test_nothing_changed_then_uncommitted_edits(repo: Path) -> None:
    assert plan_of("--exit-code", cwd=repo)["changes"] is False
    edit(repo, FUNCTION, "minReplicas: 2", "minReplicas: 4")
    data = plan_of("--exit-code", cwd=repo, code=2)
    assert verbs(data) == {"chat": "scale"}
    assert data["workloads"][0]["replicas"] == {"before": 2, "after": 4}
    assert data["before"].startswith("HEAD (")


def test_a_branch_is_held_against_where_it_left_main(repo: Path) -> None:
    git(repo, "checkout", "--quiet", "-b", "change")
    edit(repo, FUNCTION, "--itl-s=0.02", "--itl-s=0.05")
    commit(repo, "Slower")
    git(repo, "checkout", "--quiet", "main")
    edit(repo, "functions/embed.yaml", "=20000", "=30000")
    commit(repo, "Main goes on")
    git(repo, "checkout", "--quiet", "change")
    made = detoserve("plan", "--format", "markdown", cwd=repo)
    assert made.returncode == 0
    assert "### Plan: 1 to roll; 1 unchanged" in made.stdout
    assert '- runtime.args[1]: "--itl-s=0.02"\n+ runtime.args[1]: "--itl-s=0.05"' in made.stdout
    # Against main's tip, its later commit would be undone.
    data = plan_of("--against", "main", cwd=repo)
    assert verbs(data) == {"chat": "roll", "embed": "roll"}
    # The same without a work tree.
    git(repo, "clone", "--quiet", "--bare", ".", "../bare.git")
    bare = plan_of("../bare.git", "--ref", "change", cwd=repo)
    assert verbs(bare) == {"chat": "roll"}


def test_a_sub_path_and_a_broken_file_keeps_what_it_held(tmp_path: Path) -> None:
    top = tmp_path / "repo"
    shutil.copytree(EXAMPLE, top / "sub")
    git(top, "init", "--quiet", "--initial-branch=main")
    commit(top, "Start")
    edit(top, f"sub/{FUNCTION}", "kind: Function", "kind: [")
    edit(top, "sub/deployments/embed.yaml", "function: embed", "function: embedd")
    made = detoserve("plan", "sub", "-o", "json", cwd=top)
    assert made.returncode == 1
    data = json.loads(made.stdout)
    assert data["workloads"] == []
    assert data["counts"]["unchanged"] == 2
    assert {p["path"] for p in data["problems"]} >= {
        f"sub/{FUNCTION}",
        "sub/deployments/embed.yaml",
    }


def test_deletions_and_their_confirmation(repo: Path) -> None:
    start = git(repo, "rev-parse", "HEAD")
    git(repo, "checkout", "--quiet", "-b", "drop")
    git(repo, "rm", "--quiet", "-r", "deployments")
    commit(repo, "Drop all")
    data = plan_of("--exit-code", cwd=repo)
    assert verbs(data) == {"chat": "held", "embed": "held"}
    assert f"Detoserve-Confirm-Deletions: 2 {start[:12]}" in data["refusals"][0]
    commit(repo, f"Mean it\n\nDetoserve-Confirm-Deletions: 2 {start[:12]}")
    data = plan_of("--exit-code", cwd=repo, code=2)
    assert verbs(data) == {"chat": "delete", "embed": "delete"}
    assert data["refusals"] == []


def test_without_git_everything_is_new(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "plain")
    data = plan_of("plain", cwd=tmp_path)
    assert verbs(data) == {"chat": "create", "embed": "create"}
    made = detoserve("plan", "plain", "--against", "main", cwd=tmp_path)
    assert made.returncode == 2
    assert "is in no Git repository" in made.stderr


def test_unreadable_is_not_taken_for_changes(repo: Path) -> None:
    assert detoserve("plan", "--against", "nope", cwd=repo).returncode == 2
    assert detoserve("plan", "--against", "nope", "--exit-code", cwd=repo).returncode == 1


def test_against_what_runs(repo: Path, tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    wanted = effective(load_directory(repo), None)
    state = StateDir(state_dir)
    state.create()
    for workload in compile_workloads(wanted).workloads.values():
        state.write_workload(WorkloadRecord("test", workload))
    StateFile(state_dir / "last-good.json").save(
        State(objects=wanted.objects, known=frozenset({"chat", "embed"}))
    )
    live = ("--against", "live", "--state-dir", state_dir)
    assert plan_of(*live, cwd=repo)["counts"]["unchanged"] == 2

    edit(repo, FUNCTION, "--itl-s=0.02", "--itl-s=0.05")
    (repo / "deployments" / "embed.yaml").unlink()
    data = plan_of(*live, cwd=repo)
    assert verbs(data) == {"chat": "roll", "embed": "delete"}
    assert data["workloads"][0]["changes"] == [
        {"path": "runtime.args[1]", "before": "--itl-s=0.02", "after": "--itl-s=0.05"}
    ]

    # What somebody else took away is wanted again, and half a record is for a human.
    (state.workloads / "chat--local" / "workload.json").write_text("{}")
    state.remove_workload("embed--local")
    git(repo, "checkout", "--quiet", ".")
    data = plan_of(*live, cwd=repo)
    assert verbs(data) == {"embed": "create", "chat": "held"}
    assert "cannot be understood" in data["workloads"][1]["reason"]


def test_against_live_needs_a_state_directory(repo: Path, tmp_path: Path) -> None:
    made = detoserve("plan", "--against", "live", cwd=repo)
    assert (made.returncode, made.stderr.count("\n")) == (2, 1)
    made = detoserve("plan", "--against", "live", "--state-dir", tmp_path, cwd=repo)
    assert made.returncode == 2
    assert "is not the state directory of a reconciler" in made.stderr
