"""A bare mirror of one branch: fetched into, made anew where it is damaged, and read by plumbing.

No work tree, so nothing of the repo can act here. What git says becomes an error by its consequence:
the remote did not answer, the remote cannot be used, or the mirror is damaged.
Not here: what the commits hold and mean (git_source, git_tree).
"""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from reconciler.core.suggest import suggestion
from reconciler.errors import SourceInvalid, SourceUnreachable
from reconciler.git_command import GitFailed, GitTimeout, protocol_of, redact, run_git_blocking

log = logging.getLogger("detoserve.sources")

HEAD: Final = "refs/detoserve/fetched"
"""The branch as it was fetched last."""
_ACCEPTED: Final = "refs/detoserve/accepted"
_LOST: Final = "detoserve.lost"
"""Setting of a mirror made anew: the accepted revision that it no longer finds."""
_FETCHES_PER_PACK: Final = 100
_PACK_SETTINGS: Final = ("gc.auto=1000", "gc.autoPackLimit=50", "gc.autoDetach=false")
_NO_BRANCH: Final = re.compile(r"couldn't find remote ref", re.IGNORECASE)
_CANNOT_BE_USED: Final = re.compile(
    r"fsck error|transport '[^']*' not allowed|does not appear to be a git repository"
    r"|repository '[^']*' (?:not found|does not exist)|repository not found|invalid refspec"
    r"|detected dubious ownership",
    re.IGNORECASE,
)
_THIS_MACHINE: Final = re.compile(
    r"no space left|read-only file system|permission denied|quota exceeded|cannot allocate memory",
    re.IGNORECASE,
)


class Damaged(Exception):
    """The mirror cannot be read; making it anew helps."""


class GitMirror:
    """One branch of `remote` at `path`. Every git process ends within `timeout_s`.

    Raises:
        ValueError: the remote's transport is none that is allowed.
    """

    def __init__(self, path: Path, remote: str, branch: str, *, timeout_s: float) -> None:
        self.path = path
        self.remote = remote
        self.branch = branch
        self._timeout_s = timeout_s
        self._protocol = protocol_of(remote)
        self._fetches = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process fetches into this mirror meanwhile, so what is half done there is old.

        Raises:
            SourceUnreachable: one does.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_name(f"{self.path.name}.lock").open("w")
        except OSError as error:
            raise SourceUnreachable(f"no mirror can be made at {self.path}: {error}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SourceUnreachable(
                    f"another process is fetching into {self.path}; "
                    "give each reconciler a state directory of its own"
                ) from None
            yield

    def fetch(self) -> str:
        """The branch's newest revision, with all its objects.

        Raises:
            Damaged: the mirror must be made anew.
            SourceInvalid, SourceUnreachable: it is not the mirror's fault.
        """
        if (self.path / "HEAD").is_file():
            self._download(self.path)
        else:
            self.make_anew()
        self._pack()
        return self.read("rev-parse", "--verify", f"{HEAD}^{{commit}}").decode().strip()

    def make_anew(self) -> None:
        """Downloads into a new mirror and only then drops the old; what was accepted stays accepted.

        Raises:
            SourceInvalid, SourceUnreachable: the old one, such as it is, stays.
        """
        accepted = self.accepted() if self.path.exists() else None
        fresh = self.path.with_name(f"{self.path.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            self._run(fresh, "init", "--quiet", "--bare", "--template=", str(fresh))
            self._download(fresh)
            if accepted is not None:
                try:
                    self._run(fresh, "update-ref", _ACCEPTED, accepted)
                except GitFailed:
                    self._run(fresh, "config", "--local", _LOST, accepted)
            if self.path.is_dir():
                shutil.rmtree(self.path)
            else:
                self.path.unlink(missing_ok=True)
            fresh.rename(self.path)
        except (GitFailed, OSError) as error:
            raise SourceUnreachable(f"no mirror can be made: {error}") from None

    def accepted(self) -> str | None:
        """The newest revision whose history was accepted; None before the first."""
        for question in (
            ("rev-parse", "--verify", "--quiet", _ACCEPTED),
            ("config", "--local", "--get", _LOST),
        ):
            try:
                return self.run(*question).decode().strip()
            except GitFailed:
                continue
        return None

    def accept(self, revision: str) -> None:
        """What follows on this revision is ordinary from now on, also after a restart."""
        self.read("update-ref", _ACCEPTED, revision)

    def has(self, revision: str) -> bool:
        """Whether there is such a commit."""
        try:
            self.run("cat-file", "-e", f"{revision}^{{commit}}")
        except GitFailed:
            return False
        return True

    def read(self, *args: str, stdin: bytes = b"") -> bytes:
        """What git prints for a command that a whole mirror can always answer.

        Raises:
            Damaged: it could not.
            SourceUnreachable: this machine could not (time, space).
        """
        try:
            return self.run(*args, stdin=stdin)
        except GitFailed as error:
            if isinstance(error, GitTimeout) or _THIS_MACHINE.search(error.stderr):
                raise SourceUnreachable(f"the mirror cannot be used: {error}") from None
            raise Damaged(str(error)) from None

    def run(self, *args: str, stdin: bytes = b"") -> bytes:
        """What git prints; no transport is allowed to it.

        Raises:
            GitFailed: it ended with another exit code than 0.
        """
        return self._run(self.path, *args, stdin=stdin)

    def _run(
        self, git_dir: Path, *args: str, stdin: bytes = b"", protocol: str | None = None
    ) -> bytes:
        return run_git_blocking(
            git_dir, *args, stdin=stdin, timeout_s=self._timeout_s, protocol=protocol
        )

    def _download(self, git_dir: Path) -> None:
        refspec = f"+refs/heads/{self.branch}:{HEAD}"
        options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--update-shallow")
        try:
            self._run(
                git_dir, "fetch", *options, "--", self.remote, refspec, protocol=self._protocol
            )
        except GitFailed as error:
            if git_dir == self.path and self._broke(error):
                raise Damaged(str(error)) from None
            raise self._translated(error, git_dir) from None

    def _broke(self, error: GitFailed) -> bool:
        """Whether it is the mirror, not the remote, for which a fetch failed."""
        if isinstance(error, GitTimeout) or _THIS_MACHINE.search(error.stderr):
            return False
        if ".lock': File exists" in error.stderr:
            return True  # left by a git that was killed: no other process is in here
        try:
            self.run("rev-parse", "--git-dir")
            self.run("rev-list", "--objects", "--max-count=1", "--quiet", "--all")
        except GitFailed:
            return True
        return False

    def _translated(self, error: GitFailed, git_dir: Path) -> SourceInvalid | SourceUnreachable:
        where = redact(self.remote)
        if isinstance(error, GitTimeout):
            return SourceUnreachable(f"{where} did not answer within {self._timeout_s:g} s")
        if _NO_BRANCH.search(error.stderr):
            return self._no_branch(git_dir)
        if error.credentials_refused:
            return SourceInvalid(
                f"{where} refuses access; check the credentials (git's credential helper, "
                f"or the SSH agent): {error.stderr}"
            )
        if _CANNOT_BE_USED.search(error.stderr):
            return SourceInvalid(f"{where} cannot be used: {error.stderr}")
        return SourceUnreachable(f"{where} cannot be read: {error.stderr or error}")

    def _no_branch(self, git_dir: Path) -> SourceInvalid | SourceUnreachable:
        where = redact(self.remote)
        try:
            listed = self._run(
                git_dir, "ls-remote", "--heads", "--", self.remote, protocol=self._protocol
            )
        except GitFailed as error:
            return SourceUnreachable(f"{where} cannot be read: {error.stderr or error}")
        names = re.findall(r"\trefs/heads/(\S+)", listed.decode(errors="replace"))
        if not names:
            return SourceInvalid(
                f"{where} has no commit yet; an empty repo never deletes what runs"
            )
        return SourceInvalid(
            f"{where} has no branch {self.branch!r}, {suggestion(self.branch, names)}; "
            "a missing branch never deletes what runs"
        )

    def _pack(self) -> None:
        """Now and then packs what many fetches left; its failure costs only space."""
        self._fetches += 1
        if self._fetches % _FETCHES_PER_PACK:
            return
        try:
            run_git_blocking(
                self.path,
                *("gc", "--auto", "--quiet"),
                timeout_s=self._timeout_s,
                settings=_PACK_SETTINGS,
            )
        except GitFailed as error:
            log.warning("the mirror of the config repo is not packed: %s", error)
