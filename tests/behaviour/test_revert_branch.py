"""Reverts as branches of a real repo: what they hold, and that nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.errors import Stalled, Transient
from reconciler.publish.revert_branch import Revert, RevertBranches
from tests.git_repo import GitRepo


def revert(to: str, *paths: str, why: str = "canary of 0123 went back: 5 % failed") -> Revert:
    return Revert("chat", "0123456789abcdef", to, paths or ("f/chat.yaml",), why)


def reverts(folder: Path, repo: GitRepo) -> RevertBranches:
    return RevertBranches(folder / "revert.git", str(repo.path), "main")


async def test_a_revert_is_one_commit_on_top_that_gives_the_files_back(tmp_path):
    repo = GitRepo(tmp_path / "repo")
    good = repo.commit({"f/chat.yaml": "good\n", "t.yaml": "one\n", "gone.yaml": "x\n"})
    repo.commit({"f/chat.yaml": "bad\n", "gone.yaml": None, "new.yaml": "y\n"})
    head = repo.commit({"t.yaml": "two\n"})
    asked = revert(good, "f/chat.yaml", "gone.yaml", "new.yaml")
    branch = await reverts(tmp_path, repo).propose(asked)
    assert branch == "detoserve/revert/chat-01234567"
    assert repo.git("rev-parse", f"{branch}^") == head
    assert repo.head == head
    assert repo.git("diff", "--name-status", head, branch).split("\n") == [
        "M\tf/chat.yaml",
        "A\tgone.yaml",
        "D\tnew.yaml",
    ]
    assert repo.git("show", f"{branch}:f/chat.yaml") == "good"
    message = repo.git("log", "-1", "--format=%B", branch)
    assert message.startswith(f"Revert chat to {good[:12]}\n")
    assert "5 % failed" in message
    assert f"Detoserve-Reverts-To: {good}" in message
    assert repo.git("status", "--porcelain") == ""


async def test_a_revert_is_proposed_once(tmp_path):
    repo = GitRepo(tmp_path / "repo")
    good = repo.commit({"f/chat.yaml": "good\n"})
    repo.commit({"f/chat.yaml": "bad\n"})
    branch = await reverts(tmp_path, repo).propose(revert(good))
    first = repo.git("rev-parse", branch)
    repo.commit({"other.yaml": "z\n"})
    assert await reverts(tmp_path / "again", repo).propose(revert(good)) == branch
    assert repo.git("rev-parse", branch) == first


async def test_where_nothing_differs_or_the_commit_is_not_known_it_says_so(tmp_path):
    repo = GitRepo(tmp_path / "repo")
    good = repo.commit({"f/chat.yaml": "good\n"})
    with pytest.raises(Stalled, match="say the same"):
        await reverts(tmp_path, repo).propose(revert(good))
    with pytest.raises(Transient):
        await reverts(tmp_path, repo).propose(revert("0" * 40))
    assert repo.git("for-each-ref", "refs/heads/detoserve") == ""


async def test_a_remote_that_is_gone_is_tried_again(tmp_path):
    repo = GitRepo(tmp_path / "repo")
    good = repo.commit({"f/chat.yaml": "good\n"})
    there = reverts(tmp_path, repo)
    repo.path.rename(tmp_path / "away")
    with pytest.raises(Transient):
        await there.propose(revert(good))
