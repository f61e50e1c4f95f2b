"""Names for blocks of tokens that tell nobody which tokens they are: keyed 64-bit hashes, chained.

Agent and router hash the same tokens under the same secret key and get the same names; without the
key a name cannot be tested against a guessed prompt. BLAKE2b rather than xxh64, whose seed could be
worked out from a known prompt and its names. Blocks are the engine's: the last, partial one of a
prompt has no name. Not here: where tokens come from, or text blocks (router.core.blocks).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final

KEY_BYTES: Final = 32
_MASK: Final = (1 << 60) - 1
"""CPython keeps integers below 2^60 in 32 bytes, wider ones in 48; an index holds millions."""
_ROOT: Final = b"root"
_BLOCK: Final = b"block"


def chain_root(key: bytes, *, lora: str = "", salt: str = "") -> int:
    """Where the chain of a prompt starts: prompts of other adapters and salts share no block."""
    parts = [part.encode("utf-8", "surrogatepass") for part in (lora, salt)]
    framed = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return _named(framed, key, _ROOT)


def next_block(key: bytes, parent: int, tokens: Sequence[int], extra: str = "") -> int:
    """The name of the block that follows `parent` in its chain.

    `extra`: what besides its tokens the engine hashed into this block, such as an image's digest.

    Raises:
        struct.error: for what is no token id: 0 to 2^64 - 1.
    """
    packed = struct.pack(f"<{len(tokens) + 1}Q", parent, *tokens)
    return _named(packed + extra.encode("utf-8", "surrogatepass"), key, _BLOCK)


def chain(key: bytes, root: int, tokens: Sequence[int], block_tokens: int) -> list[int]:
    """The name of each whole block of a prompt's tokens."""
    names = []
    parent = root
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = next_block(key, parent, tokens[start : start + block_tokens])
        names.append(parent)
    return names


def _named(data: bytes, key: bytes, use: bytes) -> int:
    digest = blake2b(data, digest_size=8, key=key, person=use).digest()
    return int.from_bytes(digest, "big") & _MASK


def pack(names: Iterable[int]) -> bytes:
    """As they stand in a KvBatch: 8 bytes each, big-endian."""
    return b"".join(name.to_bytes(8, "big") for name in names)


def unpack(packed: bytes) -> list[int]:
    """The names again.

    Raises:
        ValueError: when the length is no multiple of 8.
    """
    if len(packed) % 8:
        raise ValueError(f"{len(packed)} bytes are no packed block names: 8 bytes each")
    return [int.from_bytes(packed[at : at + 8], "big") for at in range(0, len(packed), 8)]
