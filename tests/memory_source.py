"""A config repo in memory: a Source whose files are a dict, with every earlier content of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

from reconciler.core.config import Problem
from reconciler.sources.base import FileEntry, Snapshot


class MemorySource:
    """`commit` replaces all files; `reads` counts the files whose bytes were asked for."""

    def __init__(self, files: Mapping[str, bytes | str] | None = None, *, root: str = "") -> None:
        self.root = root
        self.reads: list[str] = []
        self._contents: dict[str, bytes] = {}
        self._history: list[dict[str, str]] = []
        self.problems: tuple[Problem, ...] = ()
        self.commit(files or {})

    def commit(self, files: Mapping[str, bytes | str]) -> None:
        tree: dict[str, str] = {}
        for path, content in files.items():
            raw = content.encode() if isinstance(content, str) else content
            blob = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
            self._contents[blob] = raw
            tree[path] = blob
        self._history.append(tree)

    def fetch(self) -> Snapshot:
        tree = self._history[-1]
        entries = tuple(sorted(self._entry(path, blob) for path, blob in tree.items()))
        return Snapshot(f"r{len(self._history)}", self.root, entries, self.problems)

    def read(self, entries: Iterable[FileEntry]) -> Iterator[tuple[FileEntry, bytes]]:
        for entry in entries:
            self.reads.append(entry.path)
            yield entry, self._contents[entry.blob]

    def earlier_versions(self, path: str, *, limit: int = 50) -> Iterator[FileEntry]:
        blobs = [tree[path] for tree in reversed(self._history) if path in tree]
        current = self._history[-1].get(path)
        for blob in [b for b in dict.fromkeys(blobs) if b != current][:limit]:
            yield self._entry(path, blob)

    def _entry(self, path: str, blob: str) -> FileEntry:
        return FileEntry(path, blob, len(self._contents[blob]))
