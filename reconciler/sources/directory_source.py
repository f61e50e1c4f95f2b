"""A plain folder as a source: for `validate` before a commit. No history, no revision.

Dot-folders are left out (they hold what Git does not: .git, .venv). Symlinks and whatever is no
regular file are refused, as in Git.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from reconciler.core.config import Location, Problem
from reconciler.errors import SourceInvalid, Transient
from reconciler.sources.base import FileEntry, Snapshot
from reconciler.sources.entry_names import name_problem

_CHUNK_BYTES = 1024 * 1024


class DirectorySource:
    """Files under a folder, paths relative to it; blobs are what Git would call their contents."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def fetch(self) -> Snapshot:
        if not self._root.is_dir():
            raise SourceInvalid(f"{self._root} is no folder; give the config repo's folder")
        entries: list[FileEntry] = []
        problems: list[Problem] = []
        for path, file in self._walk(self._root, ""):
            message = name_problem(path) or _kind_problem(file)
            if message:
                problems.append(Problem(Location(path), message))
                continue
            try:
                entries.append(FileEntry(path, *_git_blob(Path(file.path))))
            except OSError as error:
                raise SourceInvalid(f"{path} cannot be read: {error.strerror}") from None
        return Snapshot("", "", tuple(sorted(entries)), tuple(sorted(problems)))

    def read(self, entries: Iterable[FileEntry]) -> Iterator[tuple[FileEntry, bytes]]:
        for entry in entries:
            try:
                descriptor = os.open(self._root / entry.path, os.O_RDONLY | os.O_NOFOLLOW)
                with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
                    raw = file.read(entry.size_bytes + 1)
            except OSError as error:
                raise Transient(
                    f"{entry.path} changed while it was read: {error.strerror}"
                ) from None
            if len(raw) != entry.size_bytes:
                raise Transient(f"{entry.path} changed while it was read")
            yield entry, raw

    def earlier_versions(self, path: str, *, limit: int = 50) -> Iterator[FileEntry]:
        """None: a folder has no history."""
        del path, limit
        return iter(())

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        try:
            with os.scandir(folder) as found:
                children = sorted(found, key=lambda child: child.name)
        except OSError as error:
            raise SourceInvalid(f"{folder} cannot be read: {error.strerror}") from None
        for child in children:
            if not child.is_dir(follow_symlinks=False):
                yield prefix + child.name, child
            elif not child.name.startswith("."):
                yield from self._walk(Path(child.path), f"{prefix}{child.name}/")


def _kind_problem(file: os.DirEntry[str]) -> str | None:
    if file.is_symlink():
        return "symlinks are not followed; put the file itself here"
    if not file.is_file(follow_symlinks=False):
        return "this is no regular file; delete it"
    return None


def _git_blob(path: Path) -> tuple[str, int]:
    """Git's hash of a file's content, and its size in bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "no regular file")
        digest = hashlib.sha1(b"blob %d\0" % status.st_size, usedforsecurity=False)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest(), status.st_size
