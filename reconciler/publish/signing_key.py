"""The Ed25519 key that signs routing tables: one PEM file that only its owner can read.

Not here: signing itself (schemas.wire.envelope), or how routers get the public half.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from reconciler.errors import Stalled


def load_or_create(path: Path) -> Ed25519PrivateKey:
    """The key in the file; a new one is made where there is none.

    Two processes that start together end with the same key.

    Raises:
        Stalled: the file is no Ed25519 key, others may read it, or it cannot be read or written.
    """
    try:
        if not path.exists():
            _create(path)
        return _load(path)
    except OSError as error:
        raise Stalled(f"signing key {path}: {error.strerror}") from None


def _create(path: Path) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, never replaces the key that another process just made.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)  # noqa: PTH108 - the pair of mkstemp


def _load(path: Path) -> Ed25519PrivateKey:
    mode = path.stat().st_mode & 0o777
    if mode & 0o027:
        raise Stalled(
            f"signing key {path} has mode {mode:o}, open to others; run: chmod 600 {path}"
        )
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise Stalled(
            f"signing key {path} is not an unencrypted PEM private key; restore it, "
            "or remove it to get a new one (routers then need its new public half)"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise Stalled(f"signing key {path} is not an Ed25519 key")
    return key
