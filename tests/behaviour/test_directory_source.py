from __future__ import annotations

import os
from pathlib import Path

import pytest

from reconciler.errors import SourceInvalid, Transient
from reconciler.sources.directory_source import DirectorySource
from reconciler.sources.loader import load_directory
from schemas import api_keys
from tests.config_text import cluster, function


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "config"
    (path / "sub").mkdir(parents=True)
    (path / "f.yaml").write_text(function())
    (path / "sub" / "c.yaml").write_text(cluster())
    return path


def test_a_folder_loads_by_the_rules_of_the_repo(folder):
    (folder / "bad.yaml").write_text("a: [")
    (folder / ".env").write_text(api_keys.create().text)
    loaded = load_directory(folder)
    assert {str(key) for key in loaded.objects} == {"Function/chat", "Cluster/local"}
    assert [str(p.location) for p in loaded.problems] == [".env:1:1", "bad.yaml:1:5"]
    assert loaded.revision == ""


def test_dot_folders_hold_what_git_does_not(folder):
    for name in (".git", ".venv", "sub/.cache"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.yaml").write_text(api_keys.create().text)
    assert load_directory(folder).problems == ()


def test_links_and_odd_files_are_refused_and_not_followed(folder, tmp_path):
    (tmp_path / "outside.yaml").write_text(cluster("outside"))
    (folder / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.yaml").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe.yaml")
    loaded = load_directory(folder)
    assert {str(key) for key in loaded.objects} == {"Function/chat", "Cluster/local"}
    assert {(p.location.path, p.message.split(";")[0]) for p in loaded.problems} == {
        ("gone.yaml", "symlinks are not followed"),
        ("link.yaml", "symlinks are not followed"),
        ("loop", "symlinks are not followed"),
        ("pipe.yaml", "this is no regular file"),
    }


@pytest.mark.parametrize("name", ["none", "config/f.yaml"])
def test_what_is_no_folder_is_said(folder, tmp_path, name):
    with pytest.raises(SourceInvalid, match="is no folder"):
        load_directory(tmp_path / name)


def test_a_file_that_changes_meanwhile_is_never_half_read(folder, tmp_path):
    source = DirectorySource(folder)
    entries = {entry.path: entry for entry in source.fetch().entries}
    (folder / "f.yaml").write_text("short")
    (folder / "sub" / "c.yaml").unlink()
    (folder / "sub" / "c.yaml").symlink_to(tmp_path)
    for entry in entries.values():
        with pytest.raises(Transient, match="changed while it was read"):
            list(source.read([entry]))
