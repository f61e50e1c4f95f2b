"""Status documents, and the usage ledger beside them, on an orphan branch of the config repo.

Each commit is a child of the branch's tip as last seen, and pushed only if that still is the tip: a
compare-and-swap, never a merge and never forced history. Whoever else commits there loses nothing.

Not here: what the documents say (core.status, core.ledger), or the config itself (sources).
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final, Literal

from reconciler.errors import Fenced, Stalled, Transient
from reconciler.git_command import GitFailed, protocol_of, redact, run_git
from reconciler.publish.lease import Held
from reconciler.publish.status_commit import (
    Blob,
    Delta,
    additions,
    blob_sha,
    delta,
    fast_import,
    is_managed,
    lease_message,
    message,
    parse_tree,
)

log = logging.getLogger("detoserve.reconciler")

AUTHOR: Final = "DetoServe reconciler <reconciler@detoserve.invalid>"

_TIP_REF: Final = "refs/detoserve/status/tip"
_SCRATCH_REF: Final = "refs/detoserve/status/scratch"
_POLICY: Final = re.compile(
    r"declined|protected|prohibited|not allowed|denied|unpacker error|; cannot create"
)
_REFUSAL_CAP: Final = 400
_MAINTAIN_EVERY_COMMITS: Final = 500
_LOOSE_OBJECTS_MAX: Final = 2000


class StatusBranch:
    """Reads and writes the branch through a bare mirror of the config repo.

    One instance at a time writes through one mirror. Nothing is fetched before a write while the
    branch is as this process left it: a write then costs one connection.

    Args:
        mirror: bare repository; made where missing.
        remote: path or URL of the config repo.
        branch: of status; made as an orphan where missing.
        source_branch: named in commit subjects.
        author: `Name <address>`, of author and committer.
        signing_key: path of an SSH key that signs the commits; None: unsigned.
        timeout_s: bound on each git process.
        attempts: pushes before a write gives up because others keep moving the branch.

    Raises:
        Stalled: remote, branch or author cannot be used.
    """

    def __init__(
        self,
        mirror: Path,
        remote: str,
        branch: str = "detoserve/status",
        *,
        source_branch: str = "main",
        author: str = AUTHOR,
        signing_key: Path | None = None,
        timeout_s: float = 30.0,
        attempts: int = 10,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        try:
            self._protocol = protocol_of(remote)
        except ValueError as error:
            raise Stalled(str(error)) from None
        identity = re.fullmatch(r"([^<>\n]+) <([^<>\s]*)>", author)
        if identity is None:
            raise Stalled(f"author {author!r} is not of the form 'Name <address>'")
        if branch == source_branch:
            raise Stalled(
                f"status cannot go to the branch {branch!r}: that is where the config is; "
                "name another, such as detoserve/status"
            )
        self._mirror = mirror
        self._remote = remote
        self._ref = f"refs/heads/{branch}"
        self._branch = branch
        self._source_branch = source_branch
        self._identity = {
            f"GIT_{role}_{part}": value
            for role in ("AUTHOR", "COMMITTER")
            for part, value in zip(("NAME", "EMAIL"), identity.groups(), strict=True)
        }
        self._signing_key = signing_key
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._jitter = jitter
        self._lock = asyncio.Lock()
        self._algorithm: Literal["sha1", "sha256"] = "sha1"
        self._tip: str | None = None
        self._tip_known = False
        self._tree: dict[str, Blob] = {}
        self._shas: dict[str, tuple[bytes, str]] = {}
        self._commits = 0
        self.newest_lease = 0
        """The greatest lease generation seen on the branch: a floor for the next one."""

    async def read(self) -> dict[str, bytes]:
        """The status documents at the branch's tip, fetched now; empty where there is no branch.

        Raises:
            Transient: the remote did not answer.
            Stalled: it refuses us, or the mirror cannot be used.
        """
        async with self._lock:
            try:
                await self._fetch()
                managed = {p: b.sha for p, b in self._tree.items() if is_managed(p)}
                blobs = await self._blobs(sorted(set(managed.values())))
            except GitFailed as error:
                raise self._translated(error, "reading status") from None
        return {path: blobs[sha] for path, sha in managed.items()}

    async def write(
        self, documents: Mapping[str, bytes], *, revision: str, plan_digest: str, lease: Held
    ) -> str | None:
        """Makes the branch hold exactly `documents` besides what others keep there.

        Args:
            documents: path under `status/` to content; documents not named any more are deleted.
            revision: commit of the config they tell of.
            plan_digest: of the plan they followed from.
            lease: asked before each push.

        Returns:
            The commit made; None where the branch says all that already.

        Raises:
            Fenced: the lease ran out, or a newer one has written; nothing was pushed.
            Transient: the remote did not answer, or the branch kept moving.
            Stalled: the remote refuses, for its own reasons (rights, hooks, protection).
        """
        async with self._lock:
            try:
                return await self._write(documents, revision, plan_digest, lease)
            except GitFailed as error:
                # It may have landed all the same.
                self._tip_known = False
                raise self._translated(error, "writing status") from None

    async def paths(self, prefix: str) -> list[str]:
        """Every file on the branch whose path begins so, fetched now.

        Raises:
            Transient, Stalled: as `read`.
        """
        async with self._lock:
            try:
                await self._fetch()
            except GitFailed as error:
                raise self._translated(error, "reading the branch") from None
            return sorted(path for path in self._tree if path.startswith(prefix))

    async def read_paths(self, paths: Collection[str]) -> dict[str, bytes]:
        """These files of the branch as it was last fetched or written; missing ones are left out.

        Raises:
            Transient, Stalled: as `read`.
        """
        async with self._lock:
            there = {path: self._tree[path].sha for path in paths if path in self._tree}
            try:
                blobs = await self._blobs(sorted(set(there.values())))
            except GitFailed as error:
                raise self._translated(error, "reading the branch") from None
        return {path: blobs[sha] for path, sha in there.items()}

    async def put(self, documents: Mapping[str, bytes], *, subject: str, lease: Held) -> str | None:
        """Writes these files and leaves all others as they are. Not for status documents.

        Returns:
            The commit made; None where the branch says all that already.

        Raises:
            Fenced, Transient, Stalled: as `write`.
        """
        async with self._lock:
            try:
                if not self._tip_known:
                    await self._fetch()
                shas = {path: blob_sha(data, self._algorithm) for path, data in documents.items()}
                return await self._commit(
                    lambda tree: additions(tree, documents, shas),
                    lambda _, generation: lease_message(subject, generation),
                    shas,
                    lease,
                )
            except GitFailed as error:
                self._tip_known = False
                raise self._translated(error, "writing the ledger") from None

    async def _write(
        self, documents: Mapping[str, bytes], revision: str, plan_digest: str, lease: Held
    ) -> str | None:
        if not self._tip_known:
            lease.require()
            await self._fetch()
        shas = self._named(documents)

        def text(change: Delta, lease_generation: int) -> str:
            return message(
                change,
                source_branch=self._source_branch,
                revision=revision,
                plan_digest=plan_digest,
                lease_generation=lease_generation,
            )

        return await self._commit(lambda tree: delta(tree, documents, shas), text, shas, lease)

    async def _commit(
        self,
        change_of: Callable[[Mapping[str, Blob]], Delta],
        text_of: Callable[[Delta, int], str],
        shas: Mapping[str, str],
        lease: Held,
    ) -> str | None:
        """The change to the branch's tree as it is, made again where others were faster."""
        lease.require()
        refusal: str | None = None
        for attempt in range(self._attempts):
            holding = lease.require()
            if self.newest_lease > holding.generation:
                raise Fenced(
                    f"branch {self._branch}: a reconciler with lease generation "
                    f"{self.newest_lease} came after ours, {holding.generation}; nothing was written"
                )
            change = change_of(self._tree)
            if change.empty:
                return None
            text = text_of(change, holding.generation)
            tree = await self._make_tree(fast_import(change, parent=self._tip, ref=_SCRATCH_REF))
            commit = await self._make_commit(tree, text)
            lease.require()
            refusal = await self._push(commit)
            if refusal is None:
                self._took(commit, change, shas)
                self.newest_lease = max(self.newest_lease, holding.generation)
                await self._maintain()
                return commit
            before = self._tip
            await self._fetch()
            if self._tip == before and _POLICY.search(refusal):
                raise Stalled(f"the config repo does not take status on {self._branch}: {refusal}")
            await asyncio.sleep(self._jitter() * min(1.0, 0.01 * 2**attempt))
        raise Transient(
            f"status found no quiet moment on branch {self._branch} in {self._attempts} attempts; "
            f"last: {refusal}"
        )

    def _took(self, commit: str, change: Delta, shas: Mapping[str, str]) -> None:
        for path in change.deleted:
            del self._tree[path]
        self._tree |= {path: Blob("100644", shas[path]) for path, _ in change.written}
        self._tip = commit

    def _named(self, documents: Mapping[str, bytes]) -> dict[str, str]:
        """Blob ids; those of documents that are the very same bytes object are not hashed again."""
        known = self._shas
        self._shas = {
            path: entry
            if (entry := known.get(path)) is not None and entry[0] is data
            else (data, blob_sha(data, self._algorithm))
            for path, data in documents.items()
        }
        return {path: sha for path, (_, sha) in self._shas.items()}

    async def _fetch(self) -> None:
        """Takes over the remote's tip, and what it says of leases."""
        self._tip_known = False
        await self._prepare()
        try:
            await self._remotely(
                "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--refmap=",
                self._remote, f"+{self._ref}:{_TIP_REF}",
            )  # fmt: skip
            tip = (await self._locally("rev-parse", "--verify", _TIP_REF)).decode().strip()
        except GitFailed as error:
            if "couldn't find remote ref" not in error.stderr:
                raise
            tip = None
        if tip is None:
            self._tree = {}
        elif tip != self._tip:
            self._tree = parse_tree(await self._locally("ls-tree", "-r", "-z", "--full-tree", tip))
            trailer = await self._locally(
                "log", "-1", "--format=%(trailers:key=Detoserve-Lease,valueonly)",
                r"--grep=^Detoserve-Lease: [0-9]\+$", tip,
            )  # fmt: skip
            generations = [int(word) for word in trailer.split() if word.isdigit()]
            self.newest_lease = max(self.newest_lease, *generations, 0)
        self._tip = tip
        self._tip_known = True

    async def _prepare(self) -> None:
        if not (self._mirror / "HEAD").exists():
            self._mirror.parent.mkdir(parents=True, exist_ok=True)
            await self._locally("init", "--quiet", "--bare", str(self._mirror))
        try:
            await self._locally("check-ref-format", self._ref)
        except GitFailed:
            raise Stalled(f"{self._branch!r} is no name that Git allows for a branch") from None
        form = (await self._locally("rev-parse", "--show-object-format")).decode().strip()
        self._algorithm = "sha256" if form == "sha256" else "sha1"

    async def _blobs(self, shas: list[str]) -> dict[str, bytes]:
        out = await self._locally("cat-file", "--batch", stdin="\n".join([*shas, ""]).encode())
        blobs, at = {}, 0
        for sha in shas:
            head_end = out.index(b"\n", at)
            size = int(out[at:head_end].rsplit(b" ", 1)[1])
            blobs[sha] = out[head_end + 1 : head_end + 1 + size]
            at = head_end + 1 + size + 1
        return blobs

    async def _make_tree(self, stream: bytes) -> str:
        out = await self._locally(
            "fast-import", "--quiet", "--force", "--date-format=raw", stdin=stream
        )
        return out.split()[2].decode()

    async def _make_commit(self, tree: str, text: str) -> str:
        parents = () if self._tip is None else ("-p", self._tip)
        settings: tuple[str, ...] = ()
        if self._signing_key is not None:
            settings = ("gpg.format=ssh", f"user.signingKey={self._signing_key}")
        sign = () if self._signing_key is None else ("-S",)
        out = await run_git(
            self._mirror,
            *("commit-tree", tree, *parents, *sign),
            stdin=text.encode(),
            timeout_s=self._timeout_s,
            settings=settings,
            env=self._identity,
        )
        return out.decode().strip()

    async def _push(self, commit: str) -> str | None:
        """None where it landed; else why the remote did not take this ref."""
        try:
            await self._remotely(
                "push", "--porcelain", "--no-verify", "--no-follow-tags",
                f"--force-with-lease={self._ref}:{self._tip or ''}",
                self._remote, f"{commit}:{self._ref}",
            )  # fmt: skip
        except GitFailed as error:
            for line in error.stdout.splitlines():
                if line.startswith("!\t"):
                    said = [w for w in error.stderr.splitlines() if w.startswith("remote: ")]
                    return " ".join([line.split("\t")[-1], *said])[:_REFUSAL_CAP]
            raise
        return None

    async def _maintain(self) -> None:
        """Packs what many small commits leave in the mirror.

        Unreachable things younger than two weeks stay, so nothing that another is about to use goes.
        """
        self._commits += 1
        if self._commits % _MAINTAIN_EVERY_COMMITS:
            return
        try:
            await self._locally("update-ref", _TIP_REF, self._tip or "")
            await run_git(
                self._mirror,
                *("gc", "--auto", "--quiet"),
                timeout_s=self._timeout_s * 10,
                settings=(f"gc.auto={_LOOSE_OBJECTS_MAX}", "gc.autoDetach=false"),
            )
        except GitFailed as error:
            # The commit stands; only the mirror stays larger than it should be.
            log.warning("upkeep of the mirror: %s", error)

    async def _remotely(self, *args: str) -> bytes:
        return await run_git(
            self._mirror, *args, timeout_s=self._timeout_s, protocol=self._protocol
        )

    async def _locally(self, *args: str, stdin: bytes = b"") -> bytes:
        return await run_git(self._mirror, *args, stdin=stdin, timeout_s=self._timeout_s)

    def _translated(self, error: GitFailed, what: str) -> Stalled | Transient:
        text = f"{what} on {self._branch} of {redact(self._remote)}: {error.stderr[-400:]}"
        return Stalled(text) if error.credentials_refused else Transient(text)
