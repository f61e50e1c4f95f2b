"""What git prints of trees and histories -> records. Pure: bytes in, records out.

Not here: running git (git_source).
"""

from __future__ import annotations

from typing import Final

from reconciler.core.config import Location, Problem
from reconciler.sources.base import FileEntry
from reconciler.sources.entry_names import name_problem, printable

_REGULAR: Final = frozenset({b"100644", b"100664", b"100755"})
_MODES: Final = {
    b"120000": "symlinks are not followed; put the file itself here",
    b"160000": "submodules are not read; put the files themselves here",
}


def parse_tree(raw: bytes) -> tuple[tuple[FileEntry, ...], tuple[Problem, ...]]:
    """`git ls-tree -r -z -l` -> regular files, and what is refused; both sorted by path."""
    entries: list[FileEntry] = []
    problems: list[Problem] = []
    for line in raw.split(b"\0")[:-1]:
        meta, _, name = line.partition(b"\t")
        mode, _, blob, size = meta.split()
        path = name.decode("utf-8", "surrogateescape")
        if message := name_problem(path) or _mode_problem(mode):
            problems.append(Problem(Location(printable(path)), message))
        else:
            entries.append(FileEntry(path, blob.decode(), int(size)))
    return tuple(sorted(entries)), tuple(sorted(problems))


def parse_history(raw: bytes, path: str) -> tuple[str, ...]:
    """`git log --follow --raw -z --no-abbrev --format=` -> blobs of one file, newest first, each once.

    Follows it through renames. Contents it had as a symlink or a submodule are left out, and so are
    other files that git lists where the path was a folder.
    """
    fields = iter(raw.split(b"\0"))
    name = path.encode("utf-8", "surrogateescape")
    blobs: dict[str, None] = {}
    for field in fields:
        if not field.startswith(b":"):
            continue
        _, mode, _, blob, status = field.split()
        before = next(fields)
        after = next(fields) if status[:1] in b"RC" else before
        if after != name:
            continue
        name = before
        if mode in _REGULAR:
            blobs[blob.decode()] = None
    return tuple(blobs)


def _mode_problem(mode: bytes) -> str | None:
    if mode in _REGULAR:
        return None
    return _MODES.get(mode, f"mode {mode.decode(errors='replace')} is no regular file; delete it")
