"""A Git repo as a source: a bare mirror, read by plumbing.

There is no work tree, so no symlink, hook, filter or submodule of the repo can act here. The newest
accepted revision is kept as a ref of the mirror: a branch that no longer descends from it was
rewritten, and says so until a commit accepts it (`Detoserve-Accept-History: <old revision>`).
Not here: what files mean (loader), or when to look (watch, webhook).
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from reconciler.core.config import Location, Problem
from reconciler.errors import SourceInvalid, SourceUnreachable, Stalled, Transient
from reconciler.git_command import GitFailed, GitTimeout, protocol_of, redact, run_git_blocking
from reconciler.sources.base import FileEntry, Snapshot
from reconciler.sources.entry_names import name_problem, printable

log = logging.getLogger("detoserve.sources")

_FETCHED: Final = "refs/detoserve/fetched"
_ACCEPTED: Final = "refs/detoserve/accepted"
_READ_AT_ONCE_BYTES: Final = 8 * 1024 * 1024
_REGULAR: Final = (b"100644", b"100755")
_ACCEPT: Final = re.compile(
    r"^Detoserve-Accept-History:\s*([0-9a-f]{7,64})\s*$", re.MULTILINE | re.IGNORECASE
)
_NO_BRANCH: Final = re.compile(r"couldn't find remote ref|no such ref", re.IGNORECASE)


class GitSource:
    """One branch and folder of a repo.

    Args:
        remote: path or URL of the repo.
        mirror: where the bare mirror is; made where missing, made anew where it is corrupt.
        branch: holds the desired state.
        path: folder of it, with `/`; "" for all.
        timeout_s: bound on each git process that talks to the remote.
    """

    def __init__(
        self,
        remote: str,
        mirror: Path,
        *,
        branch: str = "main",
        path: str = "",
        timeout_s: float = 60.0,
    ) -> None:
        self.remote = remote
        self.branch = branch
        self.root = path.strip("/")
        self._mirror = mirror
        self._timeout_s = timeout_s
        try:
            self._protocol = protocol_of(remote)
        except ValueError as error:
            raise Stalled(str(error)) from None
        if name_problem(self.root or "x"):
            raise Stalled(f"--path {path!r} is no folder of a repo")
        self._last: Snapshot | None = None
        self._lock = threading.Lock()

    def fetch(self) -> Snapshot:
        """See `Source.fetch`."""
        with self._lock:
            try:
                return self._fetch()
            except GitFailed as error:
                if not self._is_corrupt():
                    raise self._translated(error) from None
                log.warning("the mirror of the config repo is damaged and made anew: %s", error)
            shutil.rmtree(self._mirror, ignore_errors=True)
            self._last = None
            try:
                return self._fetch()
            except GitFailed as error:
                raise self._translated(error) from None

    def _fetch(self) -> Snapshot:
        if not (self._mirror / "HEAD").is_file():
            self._mirror.parent.mkdir(parents=True, exist_ok=True)
            self._git("init", "--quiet", "--bare", str(self._mirror))
        refspec = f"+refs/heads/{self.branch}:{_FETCHED}"
        self._git(
            *("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", self.remote, refspec),
            remote=True,
        )
        revision = self._git("rev-parse", "--verify", f"{_FETCHED}^{{commit}}").decode().strip()
        last = self._last
        if last is not None and last.revision == revision and not last.rewritten:
            return last
        rewritten_from = self._rewritten_from(revision)
        if rewritten_from is None:
            self._git("update-ref", _ACCEPTED, revision)
        entries, problems = self._list(revision)
        self._last = Snapshot(
            revision, self.root, entries, problems, self.branch, rewritten_from=rewritten_from
        )
        return self._last

    def _rewritten_from(self, revision: str) -> str | None:
        """The last accepted revision, where the new one does not descend from it."""
        accepted = self._resolve(_ACCEPTED)
        if accepted is None or accepted == revision or self.is_ancestor(accepted, revision):
            return None
        word = _ACCEPT.search(self.commit_message(revision))
        return None if word and accepted.startswith(word.group(1).lower()) else accepted

    def _list(self, revision: str) -> tuple[tuple[FileEntry, ...], tuple[Problem, ...]]:
        paths = ["--", f":(literal){self.root}/"] if self.root else []
        try:
            raw = self._git("ls-tree", "-r", "-z", "-l", "--full-tree", revision, *paths)
        except GitFailed:
            raw = b""
        entries: list[FileEntry] = []
        problems: list[Problem] = []
        for line in raw.split(b"\0")[:-1]:
            meta, _, name = line.partition(b"\t")
            mode, _, blob, size = meta.split()
            path = name.decode("utf-8", "surrogateescape")
            message = name_problem(path) or _mode_problem(mode)
            if message:
                shown = path if path.isprintable() and path.isascii() else printable(path)
                problems.append(Problem(Location(shown), message))
            else:
                entries.append(FileEntry(path, blob.decode(), int(size)))
        if self.root and not entries and not problems:
            raise SourceInvalid(
                f"there is no folder {self.root!r} at {self.branch}@{revision[:12]}; "
                "an absent folder never deletes what runs"
            )
        return tuple(sorted(entries)), tuple(sorted(problems))

    def read(self, entries: Iterable[FileEntry]) -> Iterator[tuple[FileEntry, bytes]]:
        """See `Source.read`."""
        batch: list[FileEntry] = []
        size_bytes = 0
        for entry in entries:
            batch.append(entry)
            size_bytes += entry.size_bytes
            if size_bytes >= _READ_AT_ONCE_BYTES:
                yield from self._read(batch)
                batch, size_bytes = [], 0
        if batch:
            yield from self._read(batch)

    def _read(self, batch: list[FileEntry]) -> Iterator[tuple[FileEntry, bytes]]:
        asked = "".join(f"{entry.blob}\n" for entry in batch).encode()
        try:
            raw = self._git("cat-file", "--batch", stdin=asked)
        except GitFailed as error:
            raise Transient(f"config repo: {error}") from None
        at = 0
        for entry in batch:
            end = raw.index(b"\n", at)
            words = raw[at:end].split()
            if len(words) != 3 or words[1] != b"blob":
                self._last = None
                raise Transient(
                    f"{entry.path}: its content is missing in the mirror; fetching again"
                )
            size = int(words[2])
            yield entry, raw[end + 1 : end + 1 + size]
            at = end + 2 + size

    def earlier_versions(self, path: str, *, limit: int = 50) -> Iterator[FileEntry]:
        """See `Source.earlier_versions`; renames are followed."""
        try:
            raw = self._git(
                *("log", "--follow", f"--max-count={limit + 1}", "--raw", "--no-abbrev", "-z"),
                *("--format=", _FETCHED, "--", path),
            )
            blobs = re.findall(rb":\d{6} \d{6} [0-9a-f]+ ([0-9a-f]+) [A-Z]\d*\0", raw)
            fresh = [b.decode() for b in dict.fromkeys(blobs) if b.strip(b"0")][1:]
            if not fresh:
                return
            asked = "".join(f"{blob}\n" for blob in fresh).encode()
            sizes = self._git("cat-file", "--batch-check=%(objectsize)", stdin=asked).split()
        except GitFailed as error:
            raise self._translated(error) from None
        for blob, size in zip(fresh, sizes, strict=True):
            yield FileEntry(path, blob, int(size))

    def is_ancestor(self, older: str, newer: str) -> bool:
        """False also where either is not known any more."""
        try:
            self._git("merge-base", "--is-ancestor", older, newer)
        except GitFailed:
            return False
        return True

    def commit_message(self, revision: str) -> str:
        """Subject and body.

        Raises:
            SourceUnreachable: there is no such commit in the mirror.
        """
        return self._show(revision, "%B")

    def parents(self, revision: str) -> tuple[str, ...]:
        """The parents of a commit, whole ids.

        Raises:
            SourceUnreachable: there is no such commit in the mirror.
        """
        return tuple(self._show(revision, "%P").split())

    def _show(self, revision: str, format_: str) -> str:
        try:
            raw = self._git("log", "-1", f"--format={format_}", revision, "--")
        except GitFailed as error:
            raise self._translated(error) from None
        return raw.decode("utf-8", "replace").strip()

    def _resolve(self, ref: str) -> str | None:
        try:
            return self._git("rev-parse", "--verify", "--quiet", ref).decode().strip() or None
        except GitFailed:
            return None

    def _is_corrupt(self) -> bool:
        """Whether the mirror itself cannot be used; a remote that fails leaves it whole."""
        if not self._mirror.exists():
            return False
        try:
            self._git("rev-parse", "--git-dir")
            if self._resolve(_FETCHED):
                self._git("rev-list", "--objects", "--max-count=1", "--quiet", _FETCHED)
        except GitFailed:
            return True
        return False

    def _git(self, *args: str, stdin: bytes = b"", remote: bool = False) -> bytes:
        return run_git_blocking(
            self._mirror,
            *args,
            stdin=stdin,
            timeout_s=self._timeout_s,
            protocol=self._protocol if remote else None,
        )

    def _translated(self, error: GitFailed) -> SourceInvalid | SourceUnreachable:
        where = redact(self.remote)
        if isinstance(error, GitTimeout):
            return SourceUnreachable(f"{where} did not answer within {self._timeout_s:g} s")
        if _NO_BRANCH.search(error.stderr):
            return SourceInvalid(
                f"{where} has no branch {self.branch!r} (or no commit yet); nothing is changed by that"
            )
        return SourceUnreachable(f"{where} cannot be read: {error.stderr or error}")


def _mode_problem(mode: bytes) -> str | None:
    if mode in _REGULAR:
        return None
    if mode == b"120000":
        return "symlinks are not followed; put the file itself here"
    if mode == b"160000":
        return "submodules are not read; put the files themselves here"
    return f"mode {mode.decode(errors='replace')} is no regular file; delete it"
