"""Becomes another program that the kernel kills when its parent dies, however that happens.

    python -I -S die_with_parent.py PARENT_PID PROGRAM [ARGUMENT...]

Run by path and on the standard library alone, so that starting costs milliseconds. A setting made
between fork and exec in the parent would not be safe there once it has threads.
Linux only. Not here: who starts what, or restarting it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    # It may have died before the kernel was asked.
    if os.getppid() != parent:
        sys.exit(f"parent {parent} is gone")
    try:
        os.execv(program, sys.argv[2:])  # noqa: S606 - no shell is the point
    except OSError as error:
        sys.exit(f"{program}: {error.strerror}")


if __name__ == "__main__":
    main()
