"""One of our programs as a process, for as long as a test needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ready_process(module: str, *flags: object) -> Iterator[str]:
    """`python -m module flags`; yields the URL of its ready line."""
    with ready_line(module, *flags) as line:
        yield line["url"]


@contextmanager
def ready_line(module: str, *flags: object) -> Iterator[dict[str, str]]:
    """The same; yields all that its ready line says."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, flags)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
