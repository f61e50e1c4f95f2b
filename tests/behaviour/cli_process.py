"""The real command as a process, and a config repo in Git for it."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "example-config-repo" / "local"
COMMAND = [sys.executable, "-m", "reconciler.cli"]
ENVIRON = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "GITHUB_", "CI_"))},
    "PYTHONPATH": str(ROOT),
    "NO_COLOR": "",
    "COLUMNS": "100",
    "TERM": "xterm",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
}


def detoserve(
    *args: str | Path, cwd: Path | None = None, stdin: str = "", timeout_s: float = 30
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        cwd=cwd,
        input=stdin,
        env=ENVIRON,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def on_terminal(*args: str | Path, cwd: Path, no_color: str = "") -> str:
    """What a person sees: stdout and stderr on one pseudo-terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, args)],
        cwd=cwd,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**ENVIRON, "NO_COLOR": no_color},
    )
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 65536):
            seen += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    process.wait(10)
    return seen.decode().replace("\r\n", "\n")


def git(repo: Path, *args: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    return subprocess.run(
        ["git", "-C", str(repo), *identity, *args],
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def example_repo(path: Path) -> Path:
    """The example's local set, committed on main."""
    shutil.copytree(EXAMPLE, path)
    git(path, "init", "--quiet", "--initial-branch=main")
    commit(path, "Start")
    return path


def commit(repo: Path, message: str) -> str:
    git(repo, "add", "--all")
    git(repo, "commit", "--quiet", "--allow-empty", "--message", message)
    return git(repo, "rev-parse", "HEAD")


def edit(repo: Path, name: str, old: str, new: str) -> None:
    path = repo / name
    text = path.read_text()
    assert old in text, f"{name} does not hold {old!r}"
    path.write_text(text.replace(old, new))
