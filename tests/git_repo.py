"""A Git repo made by hand in tests, with nobody's settings; and what people and forges do to it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path


def git(where: Path, *args: str, stdin: bytes = b"") -> str:
    """Runs git in a folder and returns what it prints, stripped."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(where),
        "GIT_CONFIG_NOSYSTEM": "1",
        **{f"GIT_{role}_NAME": "Ada" for role in ("AUTHOR", "COMMITTER")},
        **{f"GIT_{role}_EMAIL": "ada@example.org" for role in ("AUTHOR", "COMMITTER")},
    }
    done = subprocess.run(
        ["git", *args], cwd=where, env=env, input=stdin, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode("utf-8", "surrogateescape").strip()


class GitRepo:
    """A repo with a work tree; branch main."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *args: str, stdin: bytes = b"") -> str:
        return git(self.path, *args, stdin=stdin)

    @property
    def head(self) -> str:
        return self.git("rev-parse", "HEAD")

    def commit(
        self, files: Mapping[str, str | bytes | None] | None = None, message: str = "Edit"
    ) -> str:
        """Writes files (None: removes one), commits, and returns the revision."""
        for name, content in (files or {}).items():
            file = self.path / name
            if content is None:
                file.unlink()
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", message)
        return self.head

    def commit_tree(self, *lines: str, message: str = "Plumb") -> str:
        """Commits exactly these `<mode> <type> <id>\\t<name>` entries, whatever they are."""
        raw = b"".join(
            f"{mode.lstrip('0')} {name}".encode("utf-8", "surrogateescape")
            + b"\0"
            + bytes.fromhex(object_id)
            for mode, _, object_id, name in (
                (*line.partition("\t")[0].split(), line.partition("\t")[2]) for line in lines
            )
        )
        tree = self.git("hash-object", "-t", "tree", "-w", "--literally", "--stdin", stdin=raw)
        commit = self.git("commit-tree", tree, "-p", "HEAD", "-m", message)
        self.git("update-ref", "refs/heads/main", commit)
        return commit

    def blob(self, content: str) -> str:
        return self.git("hash-object", "-w", "--stdin", stdin=content.encode())

    def bare_clone(self, path: Path) -> Path:
        self.git("clone", "--quiet", "--bare", str(self.path), str(path))
        return path
