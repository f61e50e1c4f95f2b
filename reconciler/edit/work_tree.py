"""The work tree of a config repo as commands that write need it: find an object's file, write, commit.

Not here: what the edit is (tenant_file), or reading a repo that is not checked out (sources).
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from git import Actor, GitCommandError, InvalidGitRepositoryError, NoSuchPathError, Repo

from reconciler.core.config import ObjectKey
from reconciler.core.suggest import suggestion
from reconciler.errors import SourceInvalid
from reconciler.sources.loader import load_directory

_NOBODY: Final = Actor("DetoServe", "detoserve@localhost")


@dataclass(frozen=True, slots=True)
class WorkTree:
    """A checked-out config repo, and the sub-path in it that is desired state ("" for all)."""

    root: Path
    sub_path: str

    @classmethod
    def open(cls, directory: Path, sub_path: str) -> WorkTree:
        """Finds the repository around a directory.

        Raises:
            SourceInvalid: no work tree of a Git repo, or no such sub-path in it.
        """
        try:
            with Repo(directory, search_parent_directories=True) as repo:
                root = repo.working_tree_dir
        except (InvalidGitRepositoryError, NoSuchPathError):
            raise SourceInvalid(
                f"{directory} is no Git repository; give --repo a clone of the config repo"
            ) from None
        if root is None:
            raise SourceInvalid(f"{directory} is a bare repository; give --repo a clone of it")
        inside = (directory / sub_path).resolve()
        if not inside.is_dir():
            raise SourceInvalid(f"{inside} is no directory; --path names one inside the repo")
        relative = inside.relative_to(Path(root).resolve()).as_posix()
        return cls(Path(root).resolve(), "" if relative == "." else relative)

    def file_of(self, key: ObjectKey) -> Path:
        """The file that holds an object.

        Raises:
            SourceInvalid: the object is not there, or its file does not load.
        """
        base = self.root / self.sub_path
        loaded = load_directory(base)
        found = loaded.objects.get(key)
        if found is None:
            for problem in loaded.problems:
                if problem.key == key:
                    raise SourceInvalid(f"{key} does not load: {problem}")
            names = [other.name for other in loaded.objects if other.kind == key.kind]
            raise SourceInvalid(f"{key} is not in {base}; {suggestion(key.name, names)}")
        return base / found.location.path

    def commit(self, path: Path, message: str) -> str:
        """Commits that one file, whatever else is staged, as the repo's own user; the commit's id.

        Raises:
            SourceInvalid: git refused (a hook, a lock, a conflict).
        """
        with Repo(self.root) as repo:
            try:
                repo.git.var("GIT_COMMITTER_IDENT")
                who = {}
            except GitCommandError:
                who = _identity(_NOBODY)
            try:
                repo.git.execute(
                    ["git", "commit", "--quiet", "--only", "-m", message, "--", str(path)],
                    env={**os.environ, **who},
                )
            except GitCommandError as error:
                said = str(error.stderr).strip().removeprefix("stderr:").strip(" '\n")
                raise SourceInvalid(f"git did not commit {path}: {said}") from None
            return repo.head.commit.hexsha


def _identity(actor: Actor) -> dict[str, str]:
    return {
        f"GIT_{role}_{part}": value or ""
        for role in ("AUTHOR", "COMMITTER")
        for part, value in (("NAME", actor.name), ("EMAIL", actor.email))
    }


def write_atomically(path: Path, text: str) -> None:
    """The whole new text or the whole old one, whatever happens; mode and owner's rights are kept."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        written = Path(name)
        written.chmod(path.stat().st_mode & 0o7777)
        written.replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
