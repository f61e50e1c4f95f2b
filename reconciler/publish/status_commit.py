"""What a status commit says and contains, as bytes for `git fast-import`. Pure.

Not here: running git, or who may push (status_branch).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

SUMMARY: Final = "status/summary.yaml"
_MANAGED: Final = re.compile(r"status/(?:summary|[a-z][a-z0-9-]*/[A-Za-z0-9][A-Za-z0-9._-]*)\.yaml")
_FILE_MODE: Final = "100644"
_SUBJECT_MAX: Final = 72


@dataclass(frozen=True, slots=True)
class Blob:
    """One file of a tree."""

    mode: str
    sha: str


@dataclass(frozen=True, slots=True)
class Delta:
    """What makes one tree of another; paths in order."""

    written: tuple[tuple[str, bytes], ...]
    deleted: tuple[str, ...]

    @property
    def empty(self) -> bool:
        return not self.written and not self.deleted

    @property
    def objects(self) -> list[str]:
        """Paths of what changed, the summary aside."""
        paths = [path for path, _ in self.written] + list(self.deleted)
        return sorted(path for path in paths if path != SUMMARY)


def is_managed(path: str) -> bool:
    """Paths that are the reconciler's own; whatever else stands on the branch is left alone."""
    return bool(_MANAGED.fullmatch(path))


def blob_sha(data: bytes, algorithm: str) -> str:
    """As git names it; `algorithm` is sha1 or sha256."""
    return hashlib.new(
        algorithm, b"blob %d\0" % len(data) + data, usedforsecurity=False
    ).hexdigest()


def parse_tree(listing: bytes) -> dict[str, Blob]:
    """`git ls-tree -r -z` by path."""
    tree = {}
    for entry in listing.split(b"\0")[:-1]:
        meta, _, path = entry.partition(b"\t")
        mode, _, sha = meta.decode().split(" ")
        tree[path.decode(errors="surrogateescape")] = Blob(mode, sha)
    return tree


def delta(
    tree: Mapping[str, Blob], documents: Mapping[str, bytes], shas: Mapping[str, str]
) -> Delta:
    """From a tree to `documents`, whose blobs are `shas`; managed files not in them go.

    Raises:
        ValueError: for a path that is not managed.
    """
    if wrong := next((path for path in documents if not is_managed(path)), None):
        raise ValueError(f"{wrong!r} is no path of a status document")
    written = [
        (path, documents[path])
        for path in sorted(documents)
        if tree.get(path) != Blob(_FILE_MODE, shas[path])
    ]
    deleted = [path for path in sorted(tree) if path not in documents and is_managed(path)]
    return Delta(tuple(written), tuple(deleted))


def additions(
    tree: Mapping[str, Blob], documents: Mapping[str, bytes], shas: Mapping[str, str]
) -> Delta:
    """From a tree to the same with `documents`, whose blobs are `shas`; nothing else changes.

    Raises:
        ValueError: for the path of a status document.
    """
    if wrong := next((path for path in documents if is_managed(path)), None):
        raise ValueError(f"{wrong!r} is a status document's path")
    written = [
        (path, documents[path])
        for path in sorted(documents)
        if tree.get(path) != Blob(_FILE_MODE, shas[path])
    ]
    return Delta(tuple(written), ())


def lease_message(subject: str, lease_generation: int) -> str:
    """A commit message that says under which lease it was made."""
    return f"{subject[:_SUBJECT_MAX]}\n\nDetoserve-Lease: {lease_generation}\n"


def message(
    change: Delta, *, source_branch: str, revision: str, plan_digest: str, lease_generation: int
) -> str:
    """The commit message: a subject of at most 72 characters and the trailers."""
    objects = change.objects
    match objects:
        case []:
            what = "summary changed"
        case [_]:
            what = "1 object changed"
        case _:
            what = f"{len(objects)} objects changed"
    subject = f"status: {what} at {source_branch}@{revision[:7]}"
    if len(subject) > _SUBJECT_MAX:
        subject = f"status: {what} at {revision[:7]}"
    trailers = {
        "Detoserve-Source-Revision": revision,
        "Detoserve-Plan-Digest": plan_digest,
        "Detoserve-Lease": lease_generation,
    }
    lines = [f"{name}: {value}" for name, value in trailers.items() if value != ""]
    return "\n".join([subject, "", *lines, ""])


def fast_import(change: Delta, *, parent: str | None, ref: str) -> bytes:
    """A stream that applies `change` to the parent's tree and prints the id of the new one."""
    out = [
        b"feature done\n",
        # A scratch commit: the one that is pushed is made by commit-tree, which can sign.
        f"commit {ref}\nmark :1\ncommitter status <status@detoserve.invalid> 0 +0000\n".encode(),
        b"data 0\n\n",
    ]
    if parent is not None:
        out.append(f"from {parent}\n".encode())
    # Deletions first: a file may give way to a folder of its name.
    out += [f"D {path}\n".encode() for path in change.deleted]
    for path, data in change.written:
        out.append(f"M {_FILE_MODE} inline {path}\ndata {len(data)}\n".encode())
        out += [data, b"\n"]
    # The empty line ends the commit; before it, mark :1 is not known.
    out.append(b'\nls :1 ""\ndone\n')
    return b"".join(out)
