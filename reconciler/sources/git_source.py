"""A Git repo as a source: one branch and folder of it, by content address.

The newest accepted revision is remembered in the mirror. A branch that does not descend from it was
rewritten, and stays so, over restarts too, until it descends from it again (a merge does) or a commit
accepts the new history by the trailer `Detoserve-Accept-History: <old revision>`.
Not here: running git (git_mirror), what files mean (loader), or when to look (watch, webhook).
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from reconciler.errors import SourceInvalid, SourceUnreachable, Stalled, Transient
from reconciler.git_command import GitFailed
from reconciler.sources.base import FileEntry, Snapshot
from reconciler.sources.entry_names import name_problem
from reconciler.sources.git_mirror import HEAD, Damaged, GitMirror
from reconciler.sources.git_tree import parse_history, parse_tree

log = logging.getLogger("detoserve.sources")

_READ_AT_ONCE_BYTES: Final = 8 * 1024 * 1024
_COMMITS_SEARCHED: Final = 1000
_ACCEPT: Final = re.compile(
    r"^Detoserve-Accept-History:\s*([0-9a-f]{7,64})\s*$", re.MULTILINE | re.IGNORECASE
)


class GitSource:
    """One branch and folder of a repo; a `Source`.

    Args:
        remote: path or URL of the repo.
        mirror: where the bare mirror is; made where missing, made anew where it is damaged.
        branch: holds the desired state.
        path: folder of it, with `/`; "" for all.
        timeout_s: bound on each git process.

    Raises:
        Stalled: the remote's transport or the path cannot be used at all.
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
        self.branch = branch
        self.root = path.strip("/")
        if self.root and (message := name_problem(self.root)):
            raise Stalled(f"--path {path!r} is no folder of a repo: {message}")
        try:
            self._mirror = GitMirror(mirror, remote, branch, timeout_s=timeout_s)
        except ValueError as error:
            raise Stalled(str(error)) from None
        self._last: Snapshot | None = None
        self._damage: str | None = None
        self._lock = threading.Lock()

    def fetch(self) -> Snapshot:
        """See `Source.fetch`."""
        with self._lock, self._mirror.alone():
            try:
                if self._damage is None:
                    return self._fetch()
            except Damaged as damage:
                self._damage = str(damage)
            log.warning("the mirror of the config repo is made anew: %s", self._damage)
            self._mirror.make_anew()
            self._damage = self._last = None
            try:
                return self._fetch()
            except Damaged as damage:
                raise SourceUnreachable(f"the mirror cannot be read: {damage}") from None

    def _fetch(self) -> Snapshot:
        revision = self._mirror.fetch()
        last = self._last
        if last is not None and last.revision == revision and not last.rewritten:
            return last
        rewritten_from = self._rewritten_from(revision)
        folder = ("--", f"{self.root}/") if self.root else ()
        entries, problems = parse_tree(
            self._mirror.read("ls-tree", "-r", "-z", "-l", "--full-tree", revision, *folder)
        )
        if self.root and not entries and not problems:
            raise SourceInvalid(
                f"there is no folder {self.root!r} at {self.branch}@{revision[:12]}; "
                "a missing folder never deletes what runs"
            )
        if last is not None and (last.entries, last.problems) == (entries, problems):
            # One object for one content keeps the loader's comparison of thousands of files cheap.
            entries, problems = last.entries, last.problems
        self._last = Snapshot(
            revision, self.root, entries, problems, self.branch, rewritten_from=rewritten_from
        )
        return self._last

    def _rewritten_from(self, revision: str) -> str | None:
        """The accepted revision where the new one does not follow from it; else the new one is accepted."""
        accepted = self._mirror.accepted()
        if accepted == revision:
            return None
        if accepted is not None and not self.is_ancestor(accepted, revision):
            new = (revision, f"^{accepted}") if self._mirror.has(accepted) else (revision,)
            said = self._mirror.read(
                "log", f"--max-count={_COMMITS_SEARCHED}", "--format=%B", *new, "--"
            )
            words = _ACCEPT.findall(said.decode("utf-8", "replace"))
            if not any(accepted.startswith(word.lower()) for word in words):
                return accepted
        self._mirror.accept(revision)
        return None

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
            raw = self._mirror.read("cat-file", "--batch", "--buffer", stdin=asked)
        except Damaged as damage:
            self._damage = str(damage)
            raise Transient(f"the mirror is damaged, fetching again: {damage}") from None
        at = 0
        for entry in batch:
            end = raw.find(b"\n", at)
            if raw[at:end].split()[1:] != [b"blob", b"%d" % entry.size_bytes]:
                self._damage = f"the content of {entry.path} is missing"
                raise Transient(f"{self._damage} in the mirror; fetching again")
            at = end + 1 + entry.size_bytes
            yield entry, raw[end + 1 : at]
            at += 1

    def earlier_versions(self, path: str, *, limit: int = 50) -> Iterator[FileEntry]:
        """See `Source.earlier_versions`. Of at most `limit` commits that changed the file.

        Only what the branch itself pointed at: a merge is followed down its first parent.
        """
        try:
            raw = self._mirror.read(
                *("--literal-pathspecs", "log", "--follow", "--first-parent"),
                *("--diff-merges=first-parent", f"--max-count={limit + 1}", "--format="),
                *("--raw", "-z", "--no-abbrev", HEAD, "--", path),
            )
            entries = self._last.entries if self._last else ()
            current = next((entry.blob for entry in entries if entry.path == path), "")
            blobs = [blob for blob in parse_history(raw, path) if blob != current]
            asked = "".join(f"{blob}\n" for blob in blobs).encode()
            sizes = self._mirror.read("cat-file", "--batch-check=%(objectsize)", stdin=asked)
        except Damaged as damage:
            self._damage = str(damage)
            raise SourceUnreachable(f"the history of {path} cannot be read: {damage}") from None
        for blob, size in zip(blobs, sizes.splitlines(), strict=True):
            if size.isdigit():  # else git says that it is missing, as in a shallow history
                yield FileEntry(path, blob, int(size))

    def is_ancestor(self, older: str, newer: str) -> bool:
        """Whether `newer` is `older` or descends from it. False also where one is not known here.

        Raises:
            SourceUnreachable: the history between them cannot be read.
        """
        try:
            self._mirror.run("merge-base", "--is-ancestor", older, newer)
        except GitFailed as error:
            if error.returncode != 1 and self._mirror.has(older) and self._mirror.has(newer):
                raise SourceUnreachable(f"the history cannot be read: {error}") from None
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
        question = ("log", "-1", f"--format={format_}", "--end-of-options", revision, "--")
        try:
            raw = self._mirror.run(*question)
        except GitFailed as error:
            raise SourceUnreachable(f"commit {revision[:12]} cannot be read: {error}") from None
        return raw.decode("utf-8", "replace").strip()
