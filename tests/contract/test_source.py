"""What every source promises, run over each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from reconciler.cli.repository import Repository, RevisionSource
from reconciler.errors import SourceInvalid, Transient
from reconciler.sources.base import Source
from reconciler.sources.directory_source import DirectorySource
from reconciler.sources.git_source import GitSource
from reconciler.sources.loader import Loader
from tests.config_text import cluster, deployment, function
from tests.git_repo import GitRepo
from tests.memory_source import MemorySource

FILES: dict[str, str] = {
    "a b.yaml": function(),
    "clusters/local.yaml": cluster(),
    "clusters/ünï.yml": deployment(),
    "README.md": "text\n",
    "empty.txt": "",
    ".detoserveignore": "drafts/\n",
}


class World(Protocol):
    """One implementation with what the suite needs around it."""

    remembers: bool

    def commit(self, files: Mapping[str, str]) -> None:
        """Makes the repo hold exactly these files."""
        ...

    def source(self) -> Source: ...


class GitWorld:
    remembers = True

    def __init__(self, path: Path) -> None:
        self.repo = GitRepo(path / "repo")
        self._source = GitSource(str(self.repo.path), path / "mirror.git")

    def commit(self, files: Mapping[str, str]) -> None:
        tracked = self.repo.git("ls-files", "-z").split("\0")[:-1]
        self.repo.commit({**dict.fromkeys(tracked), **files})

    def source(self) -> Source:
        return self._source


class DirectoryWorld:
    remembers = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def commit(self, files: Mapping[str, str]) -> None:
        for file in self.path.rglob("*"):
            if file.is_file():
                file.unlink()
        for name, text in files.items():
            file = self.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def source(self) -> Source:
        return DirectorySource(self.path)


class MemoryWorld:
    remembers = True

    def __init__(self, path: Path) -> None:
        del path
        self._source = MemorySource()

    def commit(self, files: Mapping[str, str]) -> None:
        self._source.commit(files)

    def source(self) -> Source:
        return self._source


class RevisionWorld(GitWorld):
    """As commands read a repo: one revision, opened anew after each commit."""

    remembers = False

    def source(self) -> Source:
        with Repository.open(str(self.repo.path)) as repository:
            return RevisionSource(repository, self.repo.head, "")


@pytest.fixture(params=[GitWorld, DirectoryWorld, MemoryWorld, RevisionWorld])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    make: Callable[[Path], World] = request.param
    made = make(tmp_path)
    made.commit(FILES)
    return made


def test_every_file_is_listed_by_content_in_order_of_path(world):
    snapshot = world.source().fetch()
    assert [entry.path for entry in snapshot.entries] == sorted(FILES)
    for entry in snapshot.entries:
        raw = FILES[entry.path].encode()
        assert entry.size_bytes == len(raw)
        assert entry.blob == hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
    assert snapshot.problems == ()
    assert not snapshot.rewritten


def test_what_is_read_is_what_was_listed(world):
    source = world.source()
    entries = source.fetch().entries
    read = dict(source.read(entries))
    assert {entry.path: raw.decode() for entry, raw in read.items()} == FILES
    assert [entry for entry, _ in source.read(entries[1:2])] == [entries[1]]
    assert list(source.read([])) == []


def test_nothing_new_is_the_same(world):
    assert world.source().fetch() == world.source().fetch()


def test_changes_are_seen(world):
    before = world.source().fetch()
    world.commit({"a b.yaml": FILES["a b.yaml"], "new.yaml": "x: 1\n"})
    after = world.source().fetch()
    assert [entry.path for entry in after.entries] == ["a b.yaml", "new.yaml"]
    assert after.entries[0] in before.entries


def test_an_old_snapshot_gives_its_own_content_or_none(world):
    source = world.source()
    before = source.fetch()
    world.commit({"a b.yaml": "changed\n"})
    for entry in before.entries:
        try:
            assert [raw.decode() for _, raw in source.read([entry])] == [FILES[entry.path]]
        except Transient:
            assert not world.remembers


def test_earlier_versions_are_older_and_newest_first(world):
    texts = [f"version: {n}\n" for n in range(4)]
    for text in (*texts, texts[1], "current: 1\n"):
        world.commit({"d.yaml": text, "other.yaml": text * 2})
    source = world.source()
    source.fetch()
    found = list(source.earlier_versions("d.yaml"))
    if world.remembers:
        read = {entry: raw.decode() for entry, raw in source.read(found)}
        assert [read[entry] for entry in found] == [texts[1], texts[3], texts[2], texts[0]]
    else:
        assert found == []


def test_all_sources_of_one_content_load_to_one_digest(world):
    expected = MemorySource(FILES)
    source = world.source()
    loaded = Loader().load(source.fetch(), source)
    assert loaded.digest == Loader().load(expected.fetch(), expected).digest
    assert loaded.problems == ()
    assert len(loaded.objects) == 3


def test_a_repo_without_yaml_is_an_error(world):
    world.commit({"README.md": "x"})
    source = world.source()
    with pytest.raises(SourceInvalid, match="never deletes"):
        Loader().load(source.fetch(), source)
