"""The config repo that `detoserve up` makes where none is given: a copy of the example, in Git.

Not here: reading a config repo (sources), or the form of API keys (schemas.api_keys).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from git import Actor, InvalidGitRepositoryError, Repo
from git.exc import NoSuchPathError

from reconciler.errors import SourceInvalid

AUTHOR: Final = Actor("DetoServe", "detoserve@localhost")
BRANCH: Final = "main"
FIRST_COMMIT: Final = "Start from the DetoServe example"


@dataclass(frozen=True, slots=True)
class ConfigRepo:
    """`ours`: it was made from the example, now or by an earlier `up`; `created`: just now."""

    path: Path
    branch: str
    created: bool
    ours: bool


def example_source() -> Path:
    """The example config repo as shipped: inside the wheel, or beside the packages in a checkout.

    Raises:
        SourceInvalid: neither is there; the installation is broken.
    """
    packaged = files("reconciler") / "example_config_repo"
    with as_file(packaged) as path:
        if path.is_dir():
            return path
    beside = Path(__file__).resolve().parents[2] / "example-config-repo"
    if beside.is_dir():
        return beside
    raise SourceInvalid(
        "the example config repo is missing from this installation; reinstall detoserve"
    )


def open_or_create(path: Path) -> ConfigRepo:
    """The repo at `path`; made from the example where there is nothing yet.

    Raises:
        SourceInvalid: something other than a Git repo is there; it is not touched.
    """
    try:
        repo = Repo(path)
    except (InvalidGitRepositoryError, NoSuchPathError):
        if path.exists() and any(path.iterdir()):
            raise SourceInvalid(
                f"{path} is there but is no Git repository; run 'git init' in it and commit, "
                "or name another place"
            ) from None
        return _create(path)
    with repo:
        branch = BRANCH if repo.head.is_detached else repo.active_branch.name
        ours = repo.head.is_valid() and _first_subject(repo) == FIRST_COMMIT
    return ConfigRepo(path, branch, created=False, ours=ours)


def _create(path: Path) -> ConfigRepo:
    shutil.copytree(example_source(), path, dirs_exist_ok=True)
    repo = Repo.init(path, initial_branch=BRANCH)
    with repo:
        commit_all(repo, FIRST_COMMIT)
    return ConfigRepo(path, BRANCH, created=True, ours=True)


def _first_subject(repo: Repo) -> str:
    return str(repo.git.log("--max-parents=0", "--format=%s", "--max-count=1"))


def commit_all(repo: Repo, message: str) -> str:
    """Commits the whole work tree, as the repo's own user where one is set; the commit's id."""
    repo.git.add(all=True)
    with repo.config_reader() as config:
        known = config.has_option("user", "email")
    author = None if known else AUTHOR
    return repo.index.commit(message, author=author, committer=author).hexsha
