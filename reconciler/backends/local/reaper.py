"""Ends every process of an owner: once its parent is gone (as a program), or when asked (end_all).

    python -m reconciler.backends.local.reaper --lifeline-fd N --state-dir D --owner O

The program waits for the end of a pipe whose other end only its parent holds: however the parent
ends, the kernel closes it. Then come, by SIGKILL, the processes whose pids stand in `D/up/*.pid` (they
could start more), and then, with a grace, all engines: those recorded and those that only their
mark gives away, again until none is left. It ignores the signals of a terminal.

Linux only, the standard library alone: it waits all day and should weigh little.
Not here: ending one engine in good order (replica).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Final

from reconciler.backends.local.processes import (
    Mark,
    ProcessId,
    all_running,
    boot_id,
    identify,
    is_alive,
    mark_of,
    marked,
    send,
)

GRACE_S: Final = 5.0
_POLL_S: Final = 0.02
# A process that was being started when its parent died carries its mark a moment later.
_QUIET_LOOKS: Final = 5


def end_all(mark: Mark, state_dir: Path, *, grace_s: float = GRACE_S) -> int:
    """SIGTERM to every engine of the owner, SIGKILL after the grace; returns when none is left.

    Their sessions go with them. Blocks. Returns how many processes had to be killed.
    """
    sessions: dict[int, ProcessId] = {
        leader.pid: leader for leader in _recorded(state_dir) if is_alive(leader)
    }
    asked: set[ProcessId] = set()
    killed: set[ProcessId] = set()
    deadline = time.monotonic() + grace_s
    quiet = 0
    while quiet < _QUIET_LOOKS:
        found = {seen.id: seen for seen in marked(mark)}
        found |= {
            seen.id: seen
            for seen in all_running()
            if seen.session in sessions
            and seen.id.start_ticks >= sessions[seen.session].start_ticks
        }
        sessions |= {seen.session: seen.id for seen in found.values() if seen.leads}
        hard = time.monotonic() >= deadline
        for process, seen in found.items():
            if hard:
                send(process, signal.SIGKILL)
                killed.add(process)
            elif seen.leads and process not in asked:
                send(process, signal.SIGTERM)
                asked.add(process)
            elif seen.session in sessions and not is_alive(sessions[seen.session]):
                # What its leader left behind.
                send(process, signal.SIGKILL)
                killed.add(process)
        quiet = 0 if found else quiet + 1
        time.sleep(_POLL_S)
    return len(killed)


def kill_registered(state_dir: Path) -> None:
    """SIGKILL to the processes, and the sessions they lead, whose pids stand in `up/*.pid`."""
    for file in sorted((state_dir / "up").glob("*.pid")):
        try:
            pid, written = int(file.read_text().split()[0]), file.stat().st_mtime
        except (OSError, ValueError, IndexError):
            continue
        process = identify(pid)
        # A process that started after its pid was written down is another one.
        if process is not None and _started_at(process) <= written + 1.0:
            for seen in list(all_running()):
                if seen.id == process or seen.session == pid:
                    send(seen.id, signal.SIGKILL)
        file.unlink(missing_ok=True)


def _started_at(process: ProcessId) -> float:
    """Unix seconds, by the clock as it is set now."""
    since_boot_s = process.start_ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot_s


def _recorded(state_dir: Path) -> list[ProcessId]:
    found = []
    for file in (state_dir / "replicas").glob("*/process.json"):
        try:
            engine = json.loads(file.read_bytes())["engine"]
            process = ProcessId(int(engine["pid"]), int(engine["start_ticks"]), engine["boot"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if process.boot == boot_id():
            found.append(process)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Ends what its parent leaves behind.")
    parser.add_argument("--lifeline-fd", type=int, required=True)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--owner", required=True)
    parser.add_argument("--grace-s", type=float, default=GRACE_S)
    options = parser.parse_args()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    while os.read(options.lifeline_fd, 4096):
        pass
    kill_registered(options.state_dir)
    end_all(mark_of(options.owner, options.state_dir), options.state_dir, grace_s=options.grace_s)
    # A child of the parent may have been registered while this looked the first time.
    kill_registered(options.state_dir)


if __name__ == "__main__":
    main()
