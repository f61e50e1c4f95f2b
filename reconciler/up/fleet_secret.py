"""The secret that `detoserve up` hands its routers, for hashes and salts nobody else can make.

Kept in the state directory, readable by its owner alone. Not here: what routers make of it.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def secret_file(state_dir: Path) -> Path:
    """The file; made where there is none, and kept from then on.

    Raises:
        OSError: as the disk says.
    """
    path = state_dir / "fleet-secret"
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{secrets.token_hex(32)}\n")
    return path
