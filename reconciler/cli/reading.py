"""What a command was pointed at, loaded: a folder as it stands, or a revision of a repository.

Not here: Git (repository), or judging and showing what was read (validate, plan, render).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from reconciler.core.config import Loaded, Location
from reconciler.core.last_good import Effective, Objects, effective
from reconciler.sources.loader import Loader, load_directory

if TYPE_CHECKING:
    from reconciler.cli.repository import Repository

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|[\w.-]+@[\w.-]+:")


@dataclass(frozen=True, slots=True)
class Reading:
    """`label` says what was read, for people; `revision` is "" for a folder."""

    label: str
    revision: str
    loaded: Loaded
    raw: Callable[[str], bytes | None]
    """A file's bytes by the path that `loaded` has for it."""
    prefix: str = ""
    """What leads from the working directory to the files; "" for a revision."""

    def effective(self, before: Objects | None = None) -> Effective:
        """What would be acted on, given what was in effect before."""
        return effective(self.loaded, before)

    def place(self, location: Location) -> Location:
        """A place as a person would type it."""
        return replace(location, path=f"{self.prefix}{location.path}")

    def line(self, location: Location) -> str | None:
        """The line of text that a place is in; None where there is none to show."""
        raw = self.raw(location.path) if location.line else None
        lines = raw.decode("utf-8", "replace").splitlines() if raw is not None else []
        return lines[location.line - 1] if 0 < location.line <= len(lines) else None


def is_url(where: str) -> bool:
    """Whether it names a remote rather than a folder on this machine."""
    return bool(_URL.match(where))


def read_directory(path: Path) -> Reading:
    """A folder as it stands.

    Raises:
        SourceInvalid: it is no folder, or holds no YAML file.
    """

    def raw(name: str) -> bytes | None:
        with contextlib.suppress(OSError):
            return (path / name).read_bytes()
        return None

    shown = os.path.relpath(path)
    if shown.startswith(".."):
        shown = str(path)
    prefix = "" if shown == "." else f"{shown}/"
    return Reading(str(path), "", load_directory(path), raw, prefix)


def read_revision(repository: Repository, revision: str, sub_path: str) -> Reading:
    """What a branch, tag or commit holds.

    Raises:
        SourceInvalid: no such revision or sub-path, or no YAML file in it.
    """
    from reconciler.cli.repository import RevisionSource  # noqa: PLC0415 - Git is slow to import

    commit = repository.resolve(revision)
    source = RevisionSource(repository, commit, sub_path)
    loaded = Loader().load(source.fetch(), source)
    same = commit.startswith(revision)
    label = commit[:10] if same else f"{revision}@{commit[:10]}"
    return Reading(label, commit, loaded, lambda path: repository.blob(commit, path))


@contextlib.contextmanager
def open_reading(where: str, ref: str | None, sub_path: str) -> Iterator[Reading]:
    """`[PATH|REPO] --ref --path` as every command takes them: a folder, or a revision where one is named.

    A URL without `ref` means its branch main.

    Raises:
        SourceInvalid: what is named is not there.
        SourceUnreachable: the remote does not answer.
    """
    if ref is None and not is_url(where):
        yield read_directory(Path(where, sub_path))
        return
    from reconciler.cli.repository import Repository  # noqa: PLC0415 - Git is slow to import

    ref = ref or "main"
    with Repository.open(where, [ref]) as repository:
        yield read_revision(repository, ref, repository.inside(where, sub_path))
