"""The last signed routing table on disk, so that an emptied Redis neither loses nor rewinds it.

Not here: Redis, or whether the table may be published.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from reconciler.errors import Stalled


def read(path: Path) -> bytes | None:
    """The envelope as written; None where there is none.

    Raises:
        Stalled: it is there and cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Stalled(f"routing table file {path}: {error.strerror}") from None


def write(path: Path, envelope: bytes) -> None:
    """Replaces the file in one step; it survives a crash of the machine.

    Raises:
        Stalled: the disk does not take it (full, read-only); the old file stands.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(envelope)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise Stalled(f"routing table file {path}: {error.strerror}") from None
