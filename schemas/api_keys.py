"""The form of an API key: `ds_<id>_<secret><checksum>`; making, hashing and recognising one.

    ds_            fixed, so that scanners and people recognise it
    <id>           10 characters of base62, public: it names the key in logs and the ledger
    <secret>       43 characters of base62, 256 bits of the system's randomness
    <checksum>     6 characters of base62, CRC-32 of all before it: a typo is told from a wrong key

Git, Redis and the routers hold only the id and the SHA-256 of the whole key. With 256 bits of
entropy a slow hash would protect nothing. Not here: deciding whether a key may do a thing (router).
"""

from __future__ import annotations

import hashlib
import re
import secrets
import zlib
from typing import Final, NamedTuple

PREFIX: Final = "ds_"
_BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SHAPE: Final = re.compile(r"ds_[0-9A-Za-z]{10}_[0-9A-Za-z]{49}")
# Keys of the gateways and vendors that people come from: they must not end up in Git either.
# A bare sk- is only taken for a key where what follows mixes cases and digits, as names do not.
_FOREIGN: Final = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"sk-(?:proj|ant|svcacct|or-v1)-[A-Za-z0-9_-]{20,}"
    r"|sk-(?=[a-z0-9_-]*[A-Z])(?=[A-Z0-9_-]*[a-z])(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}"
    r"|sk-[0-9a-f]{32}(?![A-Za-z0-9_-])"
    r"|hf_[A-Za-z0-9]{30,}|sky_eyJ[A-Za-z0-9._-]{20,}|nvapi-[A-Za-z0-9_-]{40,}"
    r"|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}|glpat-[A-Za-z0-9_-]{20,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])|AIza[0-9A-Za-z_-]{35}"
    r")|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"
)


class ApiKey(NamedTuple):
    """A key at the one moment it exists in the clear."""

    id: str
    text: str

    @property
    def sha256(self) -> str:
        return digest(self.text).hex()


def _encode(number: int, width: int) -> str:
    out = []
    for _ in range(width):
        number, rest = divmod(number, 62)
        out.append(_BASE62[rest])
    return "".join(reversed(out))


def _checksum(text: str) -> str:
    return _encode(zlib.crc32(text.encode()), 6)


def create() -> ApiKey:
    """A new key from the system's randomness."""
    key_id = _encode(secrets.randbits(59), 10)
    body = f"{PREFIX}{key_id}_{_encode(secrets.randbits(256), 43)}"
    return ApiKey(key_id, body + _checksum(body))


def digest(text: str) -> bytes:
    """SHA-256 of the whole key, as the routing table holds it (32 bytes)."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def key_id(text: str) -> str | None:
    """The public id inside a well-formed key; None for any other text (a foreign key, a typo)."""
    if not _SHAPE.fullmatch(text) or _checksum(text[:-6]) != text[-6:]:
        return None
    return text[len(PREFIX) : len(PREFIX) + 10]


def find_keys(text: str) -> list[tuple[int, str]]:
    """Offsets of key-shaped strings, each with what kind it looks like; never the key itself."""
    found = [(m.start(), "a DetoServe API key") for m in _SHAPE.finditer(text)]
    found += [(m.start(), "a secret of another service") for m in _FOREIGN.finditer(text)]
    return sorted(found)
