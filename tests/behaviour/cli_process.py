"""The real command as a process of its own, and a config repo in Git for it.

`detoserve()` runs in a process forked from one that has imported everything already: half a second
less for each of some hundred runs. What depends on a fresh start uses COMMAND with subprocess.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import tempfile
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


# Reads [argv, cwd] and three descriptors, forks, and answers with the exit code.
_FORK_SERVER = """
import io, json, os, socket, sys
import reconciler.cli as cli, reconciler.edit.work_tree, watchfiles, schemas.json_schema
from importlib import import_module
for name in ("explain", "keys", "plan", "render", "replay", "schemas", "status", "validate"):
    import_module(cli.COMMANDS[name].module)
server = socket.socket(fileno=int(sys.argv[1]))
while True:
    request, descriptors, _, _ = socket.recv_fds(server, 65536, 3)
    if not request:
        break
    pid = os.fork()
    if pid:
        for descriptor in descriptors:
            os.close(descriptor)
        server.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        continue
    code = 70
    try:
        server.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        argv, cwd = json.loads(request)
        os.chdir(cwd)
        sys.argv = ["detoserve", *argv]
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
"""


@functools.cache
def _fork_server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Ends by itself when this process does, as its end of the socket closes."""
    ours, theirs = socket.socketpair()
    argv = [sys.executable, "-c", _FORK_SERVER, str(theirs.fileno())]
    process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], env=ENVIRON)
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait(10)))
    return ours, process


def detoserve(
    *args: str | Path, cwd: Path | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    argv = [str(arg) for arg in args]
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        given.write(stdin)
        given.seek(0)
        server, _ = _fork_server()
        server.settimeout(100)
        request = json.dumps([argv, str(cwd or Path.cwd())]).encode()
        socket.send_fds(server, [request], [f.fileno() for f in (given, out, err)])
        try:
            code = int(server.recv(16))
        except TimeoutError:
            _fork_server.cache_clear()  # its late answer must not be taken for the next one's
            raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(argv, code, out.read(), err.read())


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
