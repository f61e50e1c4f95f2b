"""Proposes to take back a template that failed its canary: a branch with one commit, for a pull request.

The commit is on top of the config branch as it stands, and gives a few files the content they had at
an earlier commit. It is pushed under a name of its own and never merged here: whether Git or the
cluster is right is for people to say. Not here: what is taken back, and why (core.canary).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from reconciler.errors import Stalled, Transient
from reconciler.git_command import GitFailed, protocol_of, redact, run_git
from reconciler.publish.status_branch import AUTHOR
from reconciler.publish.status_commit import Delta, fast_import

PREFIX: Final = "detoserve/revert/"
_HEAD: Final = "refs/detoserve/revert/head"
_SCRATCH: Final = "refs/detoserve/revert/scratch"


@dataclass(frozen=True, slots=True)
class Revert:
    """`paths` are to be as they were at `to_revision`. `why` is for the commit's message."""

    deployment: str
    digest: str
    to_revision: str
    paths: tuple[str, ...]
    why: str

    @property
    def branch(self) -> str:
        """The same for the same template, so that a restart proposes nothing twice."""
        return f"{PREFIX}{self.deployment}-{self.digest[:8]}"


class RevertBranches:
    """Pushes reverts through a bare mirror of its own.

    Raises:
        Stalled: the remote cannot be used.
    """

    def __init__(
        self, mirror: Path, remote: str, source_branch: str, *, timeout_s: float = 60.0
    ) -> None:
        try:
            self._protocol = protocol_of(remote)
        except ValueError as error:
            raise Stalled(str(error)) from None
        self._mirror = mirror
        self._remote = remote
        self._source = f"refs/heads/{source_branch}"
        self._timeout_s = timeout_s

    async def propose(self, revert: Revert) -> str:
        """The branch, pushed now or found there.

        Raises:
            Stalled: there is nothing to take back, or the remote refuses.
            Transient: the remote did not answer, or the config branch moved meanwhile.
        """
        try:
            return await self._propose(revert)
        except GitFailed as error:
            text = f"the revert of {revert.deployment} on {redact(self._remote)}: {error.stderr[-400:]}"
            raise (Stalled(text) if error.credentials_refused else Transient(text)) from None

    async def _propose(self, revert: Revert) -> str:
        if not (self._mirror / "HEAD").exists():
            self._mirror.parent.mkdir(parents=True, exist_ok=True)
            await self._locally("init", "--quiet", "--bare", str(self._mirror))
        ref = f"refs/heads/{revert.branch}"
        if (await self._remotely("ls-remote", self._remote, ref)).strip():
            return revert.branch
        await self._remotely(
            "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--refmap=",
            self._remote, f"+{self._source}:{_HEAD}",
        )  # fmt: skip
        head = (await self._locally("rev-parse", "--verify", _HEAD)).decode().strip()
        written, deleted = [], []
        for path in revert.paths:
            old = await self._content(revert.to_revision, path)
            if old == await self._content(head, path):
                continue
            if old is None:
                deleted.append(path)
            else:
                written.append((path, old))
        change = Delta(tuple(written), tuple(deleted))
        if change.empty:
            raise Stalled(
                f"{', '.join(revert.paths)} say the same at {revert.to_revision[:12]}; take the "
                "change back by hand"
            )
        out = await self._locally(
            *("fast-import", "--quiet", "--force", "--date-format=raw"),
            stdin=fast_import(change, parent=head, ref=_SCRATCH),
        )
        tree = out.split()[2].decode()
        commit = await self._commit(tree, head, _message(revert))
        await self._remotely(
            "push", "--porcelain", "--no-verify", "--no-follow-tags",
            f"--force-with-lease={ref}:", self._remote, f"{commit}:{ref}",
        )  # fmt: skip
        return revert.branch

    async def _content(self, revision: str, path: str) -> bytes | None:
        try:
            return await self._locally("cat-file", "blob", f"{revision}:{path}")
        except GitFailed:
            # Either it was not there, or the commit is not known: what is known decides.
            await self._locally("cat-file", "-e", f"{revision}^{{commit}}")
            return None

    async def _commit(self, tree: str, parent: str, text: str) -> str:
        identity = re.fullmatch(r"([^<>\n]+) <([^<>\s]*)>", AUTHOR)
        assert identity is not None
        out = await run_git(
            self._mirror,
            *("commit-tree", tree, "-p", parent),
            stdin=text.encode(),
            timeout_s=self._timeout_s,
            env={
                f"GIT_{role}_{part}": value
                for role in ("AUTHOR", "COMMITTER")
                for part, value in zip(("NAME", "EMAIL"), identity.groups(), strict=True)
            },
        )
        return out.decode().strip()

    async def _remotely(self, *args: str) -> bytes:
        return await run_git(
            self._mirror, *args, timeout_s=self._timeout_s, protocol=self._protocol
        )

    async def _locally(self, *args: str, stdin: bytes = b"") -> bytes:
        return await run_git(self._mirror, *args, stdin=stdin, timeout_s=self._timeout_s)


def _message(revert: Revert) -> str:
    return (
        f"Revert {revert.deployment} to {revert.to_revision[:12]}\n\n"
        f"{revert.why}\n\n"
        "The old spec serves until this is merged, or the deployment is changed otherwise.\n\n"
        f"Detoserve-Reverts-To: {revert.to_revision}\n"
    )
