"""The config repo and the key that `detoserve up` makes, and what it leaves to others."""

from __future__ import annotations

from pathlib import Path

import pytest
from git import Actor, Repo

from reconciler.errors import SourceInvalid
from reconciler.up.api_key import api_key_for
from reconciler.up.config_repo import open_or_create
from schemas import api_keys

PERSON = Actor("A Person", "person@example.com")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path


def in_git(path: Path, key: str) -> bool:
    with Repo(path) as repo:
        assert not repo.is_dirty(untracked_files=True)
        text = str(repo.git.show("HEAD:local/tenants/demo.yaml"))
    assert key not in text
    return api_keys.digest(key).hex() in text


def test_a_new_repo_has_a_key_that_later_starts_show_again(place: Path) -> None:
    made = open_or_create(place / "config")
    key = api_key_for(made, "local", place / "state")
    assert key is not None
    assert in_git(made.path, key)
    assert (place / "state/api-key.json").stat().st_mode & 0o077 == 0
    again = open_or_create(place / "config")
    assert not again.created
    assert api_key_for(again, "local", place / "state") == key


def test_a_start_killed_before_the_key_was_committed_is_made_good(place: Path) -> None:
    open_or_create(place / "config")
    again = open_or_create(place / "config")
    key = api_key_for(again, "local", place / "state")
    assert key is not None
    assert in_git(again.path, key)


def test_a_repo_of_others_gets_no_key_and_no_commit(place: Path) -> None:
    open_or_create(place / "ours")
    with Repo.init(place / "theirs", initial_branch="main") as repo:
        (place / "theirs/local").mkdir()
        text = (place / "ours/local/tenants/demo.yaml").read_text()
        (place / "theirs/local/demo.yaml").write_text(text)
        repo.git.add(all=True)
        head = repo.index.commit("Mine", author=PERSON, committer=PERSON)
        assert api_key_for(open_or_create(place / "theirs"), "local", place / "state") is None
        assert repo.head.commit == head


def test_a_folder_that_is_no_repo_is_left_as_it_is(place: Path) -> None:
    (place / "notes").mkdir()
    (place / "notes/todo.txt").write_text("milk")
    with pytest.raises(SourceInvalid, match="git init"):
        open_or_create(place / "notes")
    assert [f.name for f in (place / "notes").iterdir()] == ["todo.txt"]
