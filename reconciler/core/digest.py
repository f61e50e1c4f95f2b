"""Identity by content: canonical JSON, hashed. Not for secrets, and not for passwords."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from pydantic import BaseModel


def canonical_digest(value: Any) -> str:
    """32 hex characters over the sorted JSON of plain data and pydantic models inside it."""

    def plain(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        raise TypeError(f"cannot digest {type(item).__name__}")

    data = msgspec.json.encode(value, enc_hook=plain, order="sorted")
    # enc_hook output of nested models is a plain dict and is sorted by the same encoder.
    return hashlib.blake2b(data, digest_size=16).hexdigest()
