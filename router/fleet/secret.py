"""What routers of one fleet know and nobody else needs to: the key of hashes they share.

By it a session's or a prompt's hash in Redis cannot be compared with guesses. Every router must come to the
same one without asking: from a file that an operator hands out, else from the key that tables are
checked with, which all of them are given. Not here: what is hashed (core.sessions).
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

from router.settings import Settings, SettingsInvalid

_MIN_BYTES: Final = 16


def fleet_secret(settings: Settings, public_key: str) -> bytes:
    """32 bytes, the same in every router that is given the same. `public_key`: hex, may be empty.

    Raises:
        SettingsInvalid: the file cannot be read, or holds too little to be a secret.
    """
    if settings.secret_file is None:
        return blake2b(public_key.encode(), person=b"fleet-default", digest_size=32).digest()
    try:
        text = settings.secret_file.read_bytes().strip()
    except OSError as error:
        raise SettingsInvalid(f"secret_file: {error}") from None
    if len(text) < _MIN_BYTES:
        raise SettingsInvalid(
            f"secret_file: {settings.secret_file} holds {len(text)} bytes; give it at least "
            f"{_MIN_BYTES}, as `openssl rand -hex 32` prints"
        )
    return blake2b(text, person=b"fleet-file", digest_size=32).digest()


def derived(secret: bytes, purpose: str) -> bytes:
    """A key for one use: what is learned of one tells nothing of another. 32 bytes."""
    return blake2b(purpose.encode(), key=secret, digest_size=32).digest()
