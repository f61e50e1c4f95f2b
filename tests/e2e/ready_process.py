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
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, flags)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield str(json.loads(process.stdout.readline())["url"])
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
