"""Embeddings by feature hashing: each word adds +1 or -1 at one place of the vector, then unit length.

Texts that share words are closer than texts that do not, and the same text has the same vector on
any replica. Not here: meaning.
"""

from __future__ import annotations

import base64
import math
import sys
from array import array

import xxhash


def embed(text: str, *, dimensions: int) -> list[float]:
    """A vector of length 1; the empty text is a vector too."""
    vector = [0.0] * dimensions
    for word in text.lower().split() or [""]:
        digest = xxhash.xxh64_intdigest(word.encode("utf-8", "replace"))
        vector[(digest >> 1) % dimensions] += 1.0 if digest & 1 else -1.0
    norm = math.sqrt(sum(value * value for value in vector))
    if norm == 0.0:  # opposite words met at every place
        vector[0] = norm = 1.0
    return [value / norm for value in vector]


def to_base64(vector: list[float]) -> str:
    """Little-endian float32, as the OpenAI API encodes vectors."""
    packed = array("f", vector)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode("ascii")
