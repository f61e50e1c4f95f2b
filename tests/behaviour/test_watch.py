from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from watchfiles import Change

from reconciler.sources.watch import local_git_dir, moves_a_branch, poll, watch_refs
from tests.git_repo import GitRepo, git
from tests.support import eventually


class Notices:
    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self) -> None:
        self.times.append(time.perf_counter())


@pytest.fixture(autouse=True)
def _check_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reconciler.sources.watch._CHECK_MS", 50)
    monkeypatch.setattr("reconciler.sources.watch._LOST_PAUSE_S", 0.02)


@pytest.fixture
def repo(tmp_path: Path) -> GitRepo:
    made = GitRepo(tmp_path / "repo")
    made.commit({"a.yaml": "a: 1\n"})
    return made


@asynccontextmanager
async def watching(remote: Path | str, branch: str = "main") -> AsyncIterator[Notices]:
    """Gives notices from when the watch is certain to be there: each folder says so once."""
    notices = Notices()
    task = asyncio.create_task(watch_refs(str(remote), branch, notices))
    try:
        await eventually(lambda: len(notices.times) >= 2)
        notices.times.clear()
        yield notices
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_commit_is_noticed_within_a_moment(repo):
    async with watching(repo.path) as notices:
        for n in range(3):
            notices.times.clear()
            await asyncio.to_thread(repo.commit, {"a.yaml": f"a: {n}\n"})
            done = time.perf_counter()
            await eventually(lambda: notices.times)
            assert notices.times[0] - done < 0.5


async def test_other_branches_tags_and_files_are_no_news(repo):
    async with watching(repo.path) as notices:
        for args in (
            ("branch", "detoserve/status"),
            ("branch", "mainly"),
            ("tag", "v1"),
            ("config", "user.name", "Grace"),
        ):
            await asyncio.to_thread(repo.git, *args)
        (repo.path / "a.yaml").write_text("not committed")
        began = time.perf_counter()
        await asyncio.to_thread(repo.commit, {"b.yaml": "b: 1\n"})
        await eventually(lambda: notices.times)
        assert notices.times[0] >= began


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("refs/heads/main", True),
        ("packed-refs", True),
        ("reftable/0x01-0x02-ab.ref", True),
        ("refs/heads/main.lock", False),
        ("refs/heads/mainly", False),
        ("refs/heads/main/sub", False),
        ("refs/heads/detoserve/status", False),
        ("refs/tags/main", False),
        ("packed-refs.lock", False),
        ("HEAD", False),
        ("index", False),
    ],
)
def test_only_what_can_move_the_branch_is_news(name, matters, tmp_path):
    nested = moves_a_branch("env/eu/prod", tmp_path)
    assert nested(Change.added, str(tmp_path / "refs/heads/env/eu"))
    assert not nested(Change.added, str(tmp_path / "refs/heads/env/us"))
    assert not nested(Change.modified, str(tmp_path / "refs/heads"))
    assert moves_a_branch("main", tmp_path)(Change.modified, str(tmp_path / name)) is matters


async def test_a_branch_in_a_folder_and_a_packed_one_are_noticed(repo):
    repo.git("branch", "env/prod")
    repo.git("pack-refs", "--all")
    async with watching(repo.path, "env/prod") as notices:
        await asyncio.to_thread(repo.git, "commit", "--allow-empty", "-qm", "On main")
        await asyncio.to_thread(repo.git, "branch", "-f", "env/prod", "main")
        await eventually(lambda: notices.times)


async def test_a_push_to_a_bare_repo_is_noticed(repo, tmp_path):
    bare = repo.bare_clone(tmp_path / "bare.git")
    async with watching(bare.as_uri()) as notices:
        repo.commit({"a.yaml": "a: 2\n"})
        await asyncio.to_thread(repo.git, "push", "--quiet", str(bare), "main")
        await eventually(lambda: notices.times)


async def test_a_commit_in_a_linked_work_tree_is_noticed(repo, tmp_path):
    repo.git("worktree", "add", "--quiet", "-b", "side", str(tmp_path / "linked"))
    async with watching(tmp_path / "linked", "side") as notices:
        await asyncio.to_thread(
            git, tmp_path / "linked", "commit", "--quiet", "--allow-empty", "-m", "x"
        )
        await eventually(lambda: notices.times)


async def test_a_repo_that_was_replaced_is_watched_again(repo):
    async with watching(repo.path) as notices:
        await asyncio.to_thread(shutil.rmtree, repo.path)
        again = await asyncio.to_thread(GitRepo, repo.path)
        await asyncio.to_thread(again.commit, {"a.yaml": "a: 1\n"})
        await eventually(lambda: len(notices.times) >= 2)
        notices.times.clear()
        await asyncio.to_thread(again.commit, {"a.yaml": "a: 2\n"})
        await eventually(lambda: notices.times)


@pytest.mark.parametrize("remote", ["https://127.0.0.1/x.git", "git@host:x.git", "/does/not/exist"])
async def test_what_is_elsewhere_is_not_watched(remote):
    assert local_git_dir(remote) is None
    await asyncio.wait_for(watch_refs(remote, "main", lambda: None), 1)


async def test_polling_follows_its_interval():
    notices = Notices()
    interval_s = 60.0
    task = asyncio.create_task(poll(notices, lambda: interval_s))
    await asyncio.sleep(0)
    assert notices.times == []
    task.cancel()
    interval_s = 0.0  # never faster than ten times a second, whatever is set
    task = asyncio.create_task(poll(notices, lambda: interval_s))
    began = time.perf_counter()
    await eventually(lambda: len(notices.times) >= 3)
    assert time.perf_counter() - began >= 0.3
    task.cancel()
