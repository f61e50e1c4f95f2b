"""Processes of this machine as the kernel tells them apart: starting, marking, finding, ending.

A process is known by pid *and* start time *and* boot, never by its pid alone: pids are used again.
The start time is the kernel's count of ticks since boot, which no change of the clock can move.
Linux only; the standard library and, for sockets alone, psutil: the reaper shares this module and
must start in milliseconds. Not here: deciding what runs (rollout), or when to end it (replica).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

OWNER_MARK: Final = "DETOSERVE_OWNER"
PLACE_MARK: Final = "DETOSERVE_OWNER_DIR"
REPLICA_MARK: Final = "DETOSERVE_REPLICA"

# What Python ignores or a shell may have ignored for us; an engine starts with the defaults.
_DEFAULT_SIGNALS: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGPIPE,
    signal.SIGTERM,
    signal.SIGXFSZ,
)


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process, for as long as the machine is up and never again."""

    pid: int
    start_ticks: int
    boot: str


@dataclass(frozen=True, slots=True)
class Mark:
    """Whose a process is. `place` is the state directory: one owner may have several."""

    owner: str
    place: str

    def environ(self, replica: str | None = None) -> dict[str, str]:
        marks = {OWNER_MARK: self.owner, PLACE_MARK: self.place}
        return marks if replica is None else marks | {REPLICA_MARK: replica}


@dataclass(frozen=True, slots=True)
class Running:
    """A live process (no zombie) with its session and, where marked, its replica."""

    id: ProcessId
    session: int
    replica: str | None = None

    @property
    def leads(self) -> bool:
        return self.session == self.id.pid


def mark_of(owner: str, state_dir: Path) -> Mark:
    return Mark(owner, str(state_dir.resolve()))


def spawn(
    program: str, argv: Sequence[str], environ: Mapping[str, str], *, stdin: int, output: int
) -> int:
    """Starts a program as the leader of a session of its own and returns its pid.

    `program` is a path. Standard output and error both go to the descriptor `output`.

    Raises:
        OSError: it cannot be started.
    """
    return os.posix_spawn(
        program,
        list(argv),
        dict(environ),
        file_actions=[
            (os.POSIX_SPAWN_DUP2, stdin, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ],
        setsid=True,
        setsigmask=[],
        setsigdef=_DEFAULT_SIGNALS,
    )


def identify(pid: int) -> ProcessId | None:
    """The process that has this pid now; None where there is none, or only a zombie."""
    seen = _look(pid)
    return seen.id if seen else None


def identify_child(pid: int) -> ProcessId:
    """A child of ours that was not waited for yet: it is there, if only as a zombie."""
    seen = _look(pid, zombies=True)
    assert seen is not None
    return seen.id


def is_alive(process: ProcessId) -> bool:
    return identify(process.pid) == process


def all_running() -> Iterator[Running]:
    """Every live process that can be seen, without marks."""
    for name in os.listdir("/proc"):  # noqa: PTH208 - names alone, thousands of them
        if name.isdigit() and (seen := _look(int(name))) is not None:
            yield seen


def marked(mark: Mark) -> list[Running]:
    """Every live process that carries this mark, children that inherited it included."""
    found = []
    for seen in all_running():
        environ = environ_of(seen.id.pid)
        if environ.get(OWNER_MARK) == mark.owner and environ.get(PLACE_MARK) == mark.place:
            found.append(Running(seen.id, seen.session, environ.get(REPLICA_MARK)))
    return found


def environ_of(pid: int) -> dict[str, str]:
    """The environment a process was started with; {} where it cannot be read."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (os.fsdecode(entry).partition("=") for entry in raw.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def session_members(leader: ProcessId) -> list[ProcessId]:
    """The live processes of a session, its leader included.

    The leader must be alive or just ended: its pid cannot go to another while members live.
    """
    return [
        seen.id
        for seen in all_running()
        if seen.session == leader.pid and seen.id.start_ticks >= leader.start_ticks
    ]


def kill_session(leader: ProcessId) -> None:
    """SIGKILL to every process of the leader's session; nothing where the pid is another's now."""
    current = identify(leader.pid)
    if current is not None and current != leader:
        return
    for member in session_members(leader):
        send(member, signal.SIGKILL)


def send(process: ProcessId, signum: int) -> None:
    """A signal to exactly this process; nothing where it is gone."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        if is_alive(process):
            signal.pidfd_send_signal(descriptor, signum)
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)


def foreign_listener(port: int, engine: ProcessId) -> str | None:
    """Who holds the engine's port instead of it, as `name (pid)`; None where that cannot be told.

    A listener younger than the engine is taken for its doing: a container's proxy, for example.

    Blocks for milliseconds: it reads the machine's socket tables.
    """
    import psutil  # noqa: PLC0415 - the reaper needs none of it

    def listens(connection: Any) -> bool:
        return bool(
            connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr.port == port
        )

    try:
        for member in session_members(engine):
            if any(map(listens, psutil.Process(member.pid).net_connections("tcp"))):
                return None
    except psutil.Error:
        pass
    try:
        holders = {c.pid for c in psutil.net_connections("tcp") if listens(c) and c.pid}
    except psutil.Error:
        return None
    for pid in sorted(holders):
        holder = identify(pid)
        if holder is not None and holder.start_ticks < engine.start_ticks:
            return f"{Path(f'/proc/{pid}/comm').read_text().strip()} (pid {pid})"
    return None


@cache
def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _look(pid: int, *, zombies: bool = False) -> Running | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name stands in brackets and may itself hold spaces and brackets.
    fields = stat[stat.rindex(b")") + 2 :].split()
    state, session, start_ticks = fields[0], int(fields[3]), int(fields[19])
    if state in (b"Z", b"X") and not zombies:
        return None
    return Running(ProcessId(pid, start_ticks, boot_id()), session)
