"""Runs one program to its end, and writes down how it ended.

    python -I -S job_runner.py EXIT_FILE TIMEOUT_S PROGRAM [ARGUMENT...]

It leads a session of its own, so that the program goes on when the reconciler ends, and the next one
reads in EXIT_FILE what became of it: `{"code": 0}`, `{"code": -9}` for a signal, or `{"code": null, "why": ...}`.
SIGTERM is passed on. The standard library alone, run by path. Not here: whether to try again (jobs).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

_GRACE_S = 10.0


def main() -> None:
    exit_file, timeout_s, argv = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
    stopped = []
    child: subprocess.Popen[bytes] | None = None

    def stop(signum: int, _: object) -> None:
        stopped.append(signum)
        if child is not None:
            child.send_signal(signum)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = subprocess.Popen(argv)
    except OSError as error:
        _write(exit_file, None, f"it cannot be started: {error.strerror}")
        return
    if stopped:
        child.terminate()
    try:
        code = child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        child.terminate()
        try:
            child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        _write(exit_file, None, f"it was not done within {timeout_s:g} s")
        return
    _write(exit_file, code, "it was stopped" if stopped else "")


def _write(path: str, code: int | None, why: str) -> None:
    """Whole or not at all."""
    fresh = f"{path}.new"
    with open(fresh, "w", encoding="utf-8") as file:  # noqa: PTH123 - pathlib is slow to import
        json.dump({"code": code, "why": why}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)  # noqa: PTH105 - as above


if __name__ == "__main__":
    main()
