"""One `git` process: bounded in time, isolated from its surroundings, and silent about credentials.

What stays of the user's own settings: credential helpers, SSH agent and keys, proxies, certificates
(all of `~/.gitconfig` is read). What is switched off: hooks, prompts, file-system monitors,
automatic gc, commit signing by habit, and every transport but the one the remote's URL names.

Not here: what any command means (sources, publish).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote

_SETTINGS: Final = (
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.attributesFile=/dev/null",
    "core.quotePath=false",
    "commit.gpgSign=false",
    "fetch.fsckObjects=true",
    "fetch.recurseSubmodules=false",
    "fetch.writeCommitGraph=false",
    "gc.auto=0",
    "maintenance.auto=false",
    "push.gpgSign=false",
    "push.recurseSubmodules=no",
)
# Everything else that starts with GIT_ could point git at another repository or make it trace secrets.
_KEPT_VARIABLES: Final = re.compile(
    r"GIT_(SSH|SSH_COMMAND|SSH_VARIANT|ASKPASS|SSL_\w+|PROXY_\w+|HTTP_USER_AGENT|EXEC_PATH"
    r"|CONFIG_(GLOBAL|SYSTEM|NOSYSTEM|COUNT|KEY_\d+|VALUE_\d+))"
)
_REDACTIONS: Final = (
    (re.compile(r"://[^\s'\"<>]*@"), "://***@"),
    (re.compile(r"(?i)([?&][\w-]*(?:token|key|secret|password|auth)[\w-]*=)[^\s&'\"]+"), r"\1***"),
    (re.compile(r"(?i)(authorization:\s*(?:\w+\s+)?|private-token:\s*)[^\s'\"]+"), r"\1***"),
    (re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|glptt-)[A-Za-z0-9_-]{8,}"), "***"),
)
_CREDENTIALS_REFUSED: Final = re.compile(
    r"(?i)authentication failed|could not read (?:username|password)|permission denied|access denied"
    r"|invalid (?:username|credentials)|returned error: 40[13]|host key verification failed"
)
_MESSAGE_CAP: Final = 600
_HELPER: Final = (
    '!f() { test "$1" = get && '
    'printf "username=%s\\npassword=%s\\n" "$DETOSERVE_GIT_USERNAME" "$DETOSERVE_GIT_PASSWORD"; }; f'
)


class GitFailed(Exception):
    """Git said no. The message holds the command and its words, without credentials."""

    def __init__(
        self, command: Sequence[str], returncode: int, stdout: bytes, stderr: bytes
    ) -> None:
        self.returncode = returncode
        self.stdout = redact(stdout.decode(errors="replace"))
        self.stderr = redact(stderr.decode(errors="replace")).strip()
        said = self.stderr[-_MESSAGE_CAP:] or f"exit code {returncode}"
        super().__init__(f"{_shown(command)}: {said}")

    @property
    def credentials_refused(self) -> bool:
        """The remote answered, and does not let this reconciler in."""
        return bool(_CREDENTIALS_REFUSED.search(self.stderr))


class GitTimeout(GitFailed):
    """It did not end in time; the process and its children were killed."""

    def __init__(self, command: Sequence[str], timeout_s: float) -> None:
        super().__init__(command, -signal.SIGKILL, b"", f"no end after {timeout_s:g} s".encode())


def redact(text: str) -> str:
    """The text without URL user information, tokens and authorization headers."""
    for pattern, replacement in _REDACTIONS:
        text = pattern.sub(replacement, text)
    return text


def protocol_of(remote: str) -> str:
    """The one transport that a remote needs: file, https, http, ssh or git.

    Raises:
        ValueError: for any other, such as `ext::`, which would run a command.
    """
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::)", remote):
        scheme = match[1].lower()
        if match[2] == "://" and scheme in {"file", "https", "http", "ssh", "git"}:
            return scheme
        raise ValueError(
            f"Git remote {redact(remote)!r} uses the transport {scheme!r}; "
            "use https://, ssh://, git://, file://, or a path"
        )
    # As git tells them apart: a colon before any slash makes it [user@]host:path.
    return "ssh" if ":" in remote.split("/", 1)[0] else "file"


def hide_credentials(args: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """Arguments without the user and password of an http(s) URL, and settings and environment instead.

    Every user of the machine can read a process's arguments, but only its own user its environment.
    """
    bare, env = list(args), {}
    for index, arg in enumerate(args):
        if match := re.fullmatch(r"(https?://)([^/@:]*):([^/@]*)@(.*)", arg, re.DOTALL):
            bare[index] = match[1] + match[4]
            env = {
                "DETOSERVE_GIT_USERNAME": unquote(match[2]),
                "DETOSERVE_GIT_PASSWORD": unquote(match[3]),
            }
    return bare, ["credential.helper=", f"credential.helper={_HELPER}"] if env else [], env


def environment(
    base: Mapping[str, str], *, protocol: str | None, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a git process that may use one transport, or none."""
    kept = {
        name: value
        for name, value in base.items()
        if not name.startswith("GIT_") or _KEPT_VARIABLES.fullmatch(name)
    }
    return {
        **kept,
        "GIT_ALLOW_PROTOCOL": protocol or "none",
        "GIT_TERMINAL_PROMPT": "0",
        "SSH_ASKPASS_REQUIRE": "never",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "LC_ALL": "C",
        **(extra or {}),
    }


def command(git_dir: Path, args: Sequence[str], settings: Sequence[str] = ()) -> list[str]:
    """The whole argv; `settings` are `name=value` and win over ours."""
    options = [part for setting in (*_SETTINGS, *settings) for part in ("-c", setting)]
    return ["git", f"--git-dir={git_dir}", *options, *args]


async def run_git(
    git_dir: Path,
    *args: str,
    stdin: bytes = b"",
    timeout_s: float = 30.0,
    protocol: str | None = None,
    settings: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> bytes:
    """Runs `git <args>` in a bare repository and returns its standard output.

    Args:
        git_dir: the bare repository (or, for `init`, where it shall be).
        args: subcommand and arguments.
        stdin: what it reads.
        timeout_s: after it, or when cancelled, the process and all its children are killed.
        protocol: the transport it may use (`protocol_of(remote)`); None: no remote at all.
        settings: further `name=value` of git config.
        env: further environment variables.

    Raises:
        GitFailed: for any exit code but 0.
        GitTimeout: when it took too long.
    """
    running: list[subprocess.Popen[bytes]] = []
    # In a thread rather than as an asyncio subprocess: uvloop's pipes raise RuntimeError where git
    # ends before it has read its input.
    work = asyncio.get_running_loop().run_in_executor(
        None,
        lambda: run_git_blocking(
            git_dir,
            *args,
            stdin=stdin,
            timeout_s=timeout_s,
            protocol=protocol,
            settings=settings,
            env=env,
            started=running.append,
        ),
    )
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        for process in running:
            _kill(process)
        with contextlib.suppress(GitFailed):
            await work
        raise


def run_git_blocking(
    git_dir: Path,
    *args: str,
    stdin: bytes = b"",
    timeout_s: float = 30.0,
    protocol: str | None = None,
    settings: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    started: Callable[[subprocess.Popen[bytes]], None] = lambda _: None,
) -> bytes:
    """As `run_git`, for callers in a thread of their own; `started` gets the process.

    Raises:
        GitFailed: for any exit code but 0.
        GitTimeout: when it took too long.
    """
    bare, helper, credentials = hide_credentials(args)
    with subprocess.Popen(
        command(git_dir, bare, (*settings, *helper)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(os.environ, protocol=protocol, extra={**(env or {}), **credentials}),
        # Without a terminal nothing below git (ssh, credential helpers) can ask one either.
        start_new_session=True,
    ) as process:
        started(process)
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout_s)
        except BaseException as error:
            _kill(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise GitTimeout(args, timeout_s) from None
            raise
    if process.returncode:
        raise GitFailed(args, process.returncode, stdout, stderr)
    return stdout


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _shown(args: Sequence[str]) -> str:
    return redact(" ".join(("git", *args)))[:_MESSAGE_CAP]
