"""The seam between the reconciler and wherever the config repo lies.

A source says which files there are (`fetch`) and gives their bytes by content address (`read`).
Calls block, each bounded by the source's own timeouts: an event loop runs them in a thread.
Not here: what the files mean (loader), or when to look again (watch, webhook).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from reconciler.core.config import Problem


class FileEntry(NamedTuple):
    """One regular file. `blob` is Git's hash of the content: equal blobs, equal bytes.

    `path` is relative to the repo's root, with `/`, so that a person can open what a message names.
    """

    path: str
    blob: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The desired paths of one revision.

    `root` is the sub-path ("" for the whole repo); `entries` are sorted by path. `problems` name
    entries under it that are no regular files or have names that are not accepted.
    `rewritten_from` is the last accepted revision where the branch no longer descends from it:
    nothing may be pruned until someone accepts the new history.
    """

    revision: str
    root: str
    entries: tuple[FileEntry, ...]
    problems: tuple[Problem, ...] = ()
    branch: str = ""
    rewritten_from: str | None = None

    @property
    def rewritten(self) -> bool:
        return self.rewritten_from is not None


class Source(Protocol):
    """A config repo. One contract suite is run over every implementation."""

    def fetch(self) -> Snapshot:
        """What the repo holds now. Cheap when nothing moved.

        Raises:
            SourceUnreachable: it did not answer; the last snapshot stays good.
            SourceInvalid: it answered and cannot be used (branch gone, empty, sub-path missing).
        """
        ...

    def read(self, entries: Iterable[FileEntry]) -> Iterator[tuple[FileEntry, bytes]]:
        """The bytes of files of a snapshot, in no particular order, a few MiB at a time.

        Raises:
            Transient: the content is no longer there as it was; fetch again.
        """
        ...

    def earlier_versions(self, path: str, *, limit: int = 50) -> Iterator[FileEntry]:
        """Older contents of one file, newest first, under whatever name it had; each once.

        Its content in the newest snapshot is not among them.
        """
        ...
