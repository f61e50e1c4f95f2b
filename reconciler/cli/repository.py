"""A Git repository as commands read it: any revision of a local clone in place, or of a remote URL.

Nothing is checked out and nothing is kept: a URL is fetched into a temporary folder. Not here: the
reconciler's own mirror (sources.git_source), or what the files mean (sources.loader).
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Self

from git import (
    BadName,
    BadObject,
    GitCommandError,
    InvalidGitRepositoryError,
    NoSuchPathError,
    Repo,
)

from reconciler.cli.reading import is_url
from reconciler.core.suggest import suggestion
from reconciler.errors import SourceInvalid, SourceUnreachable
from reconciler.git_command import GitFailed, protocol_of, redact, run_git
from reconciler.sources.base import FileEntry, Snapshot
from reconciler.sources.git_tree import parse_tree

FETCH_TIMEOUT_S: Final = 120.0


class Repository:
    """Reads revisions by plumbing. `label` names it for people, without credentials."""

    def __init__(self, repo: Repo, label: str, remote: str | None = None) -> None:
        self._repo = repo
        self.label = label
        self._remote = remote

    @classmethod
    @contextlib.contextmanager
    def open(cls, where: str, branches: Sequence[str] = ()) -> Iterator[Self]:
        """A folder in a clone or a bare repository, or a URL of which `branches` are fetched.

        Raises:
            SourceInvalid: there is no repository, or not that branch.
            SourceUnreachable: the remote does not answer.
        """
        if not is_url(where):
            try:
                repo = Repo(where, search_parent_directories=True)
            except (InvalidGitRepositoryError, NoSuchPathError):
                raise SourceInvalid(
                    f"{where} is no Git repository; give a clone, a bare repository or a URL"
                ) from None
            with repo:
                yield cls(repo, where)
            return
        with (
            tempfile.TemporaryDirectory(prefix="detoserve-") as folder,
            Repo.init(folder, bare=True) as repo,
        ):
            opened = cls(repo, redact(where), where)
            opened.fetch(branches)
            yield opened

    @property
    def work_tree(self) -> Path | None:
        """Where it is checked out; None for a bare one."""
        return Path(self._repo.working_tree_dir) if self._repo.working_tree_dir else None

    @property
    def git_dir(self) -> Path:
        return Path(self._repo.common_dir)

    @property
    def is_remote(self) -> bool:
        return self._remote is not None

    def fetch(self, branches: Sequence[str] = ()) -> None:
        """Newest commits of a URL's branches (all where none is named); nothing for a local repository.

        Raises:
            SourceInvalid: no such branch, or no access.
            SourceUnreachable: the remote does not answer.
        """
        if self._remote is None:
            return
        specs = [f"+refs/heads/{b}:refs/heads/{b}" for b in branches or ["*"]]
        try:
            protocol = protocol_of(self._remote)
            args = ("fetch", "--quiet", "--no-tags", "--depth=1", self._remote, *specs)
            asyncio.run(run_git(self.git_dir, *args, timeout_s=FETCH_TIMEOUT_S, protocol=protocol))
        except ValueError as error:
            raise SourceInvalid(str(error)) from None
        except GitFailed as error:
            if error.credentials_refused:
                raise SourceInvalid(f"{self.label} does not let you in: {error.stderr}") from None
            if "find remote ref" in error.stderr:
                raise SourceInvalid(f"{self.label} has no branch {', '.join(branches)}") from None
            raise SourceUnreachable(f"{self.label} cannot be read: {error.stderr}") from None

    def resolve(self, revision: str) -> str:
        """The commit that a branch, tag or expression names.

        Raises:
            SourceInvalid: there is none.
        """
        for name in (revision, f"origin/{revision}"):
            with contextlib.suppress(BadName, BadObject, ValueError, IndexError, GitCommandError):
                return self._repo.commit(name).hexsha
        branches = [head.name for head in self._repo.heads]
        shallow = (
            "; the clone is shallow, fetch its history (actions/checkout: fetch-depth: 0)"
            if (self.git_dir / "shallow").exists() and not self.is_remote
            else ""
        )
        raise SourceInvalid(
            f"{self.label} has no revision {revision!r}; {suggestion(revision, branches)}{shallow}"
        )

    def find(self, revision: str) -> str | None:
        """The commit, or None where there is none."""
        try:
            return self.resolve(revision)
        except SourceInvalid:
            return None

    def merge_base(self, one: str, other: str) -> str | None:
        """The newest commit that both descend from; None where they share none."""
        found = self._repo.merge_base(one, other)
        return found[0].hexsha if found else None

    def head(self) -> str | None:
        """The checked-out commit; None in a repository without commits."""
        return self.find("HEAD") if self._repo.head.is_valid() else None

    def branch(self) -> str:
        """The branch checked out; main for a URL and where HEAD is on none."""
        if self.is_remote or self._repo.head.is_detached:
            return "main"
        return self._repo.active_branch.name

    def message(self, revision: str) -> str:
        message = self._repo.commit(revision).message
        return message if isinstance(message, str) else message.decode(errors="replace")

    def parents(self, revision: str) -> tuple[str, ...]:
        return tuple(parent.hexsha for parent in self._repo.commit(revision).parents)

    def blob(self, revision: str, path: str) -> bytes | None:
        """One file's bytes at a revision; None where it is not there."""
        try:
            return bytes(
                self._repo.git.cat_file(
                    "blob",
                    f"{revision}:{path}",
                    stdout_as_string=False,
                    strip_newline_in_stdout=False,
                )
            )
        except GitCommandError:
            return None

    def files(self, revision: str, sub_path: str = "") -> Iterator[tuple[str, bytes]]:
        """Every regular file's path from the root, and its bytes."""
        for entry, raw in self.read_blobs(self.tree(revision, sub_path).entries):
            yield entry.path, raw

    def inside(self, where: str, sub_path: str) -> str:
        """A sub-path of the folder that was opened, from the repository's root.

        Raises:
            SourceInvalid: it leads out of the repository.
        """
        if self.is_remote or self.work_tree is None:
            return sub_path
        root = self.work_tree.resolve()
        folder = Path(where, sub_path).resolve()
        if not folder.is_relative_to(root):
            raise SourceInvalid(f"{folder} is outside the repository {root}")
        relative = folder.relative_to(root).as_posix()
        return "" if relative == "." else relative

    def tree(self, revision: str, sub_path: str) -> Snapshot:
        """The files under a sub-path of a commit.

        Raises:
            SourceInvalid: there is no such folder in it.
        """
        sub_path = sub_path.strip("/")
        try:
            kind = self._repo.git.cat_file("-t", f"{revision}:{sub_path}")
        except GitCommandError:
            kind = "nothing"
        if kind != "tree":
            raise SourceInvalid(
                f"{sub_path!r} is no folder at {revision[:12]}; --path names one inside the repo"
            )
        wanted = ["--", f"{sub_path}/"] if sub_path else []
        listed = self._repo.git.ls_tree(
            "-r", "-z", "-l", "--full-tree", revision, *wanted, stdout_as_string=False
        )
        entries, problems = parse_tree(bytes(listed))
        return Snapshot(revision, sub_path, entries, problems)

    def read_blobs(self, entries: Iterable[FileEntry]) -> Iterator[tuple[FileEntry, bytes]]:
        for entry in entries:
            yield entry, self._repo.odb.stream(bytes.fromhex(entry.blob)).read()


class RevisionSource:
    """One commit of a repository as a Source for the loader; it never moves."""

    def __init__(self, repository: Repository, revision: str, sub_path: str) -> None:
        self._repository = repository
        self._revision = revision
        self._sub_path = sub_path

    def fetch(self) -> Snapshot:
        return self._repository.tree(self._revision, self._sub_path)

    def read(self, entries: Iterable[FileEntry]) -> Iterator[tuple[FileEntry, bytes]]:
        return self._repository.read_blobs(entries)

    def earlier_versions(self, path: str, *, limit: int = 50) -> Iterator[FileEntry]:
        """None: a command judges one revision as it stands."""
        del path, limit
        return iter(())
