"""A tokenizer without a vocabulary: four UTF-8 bytes are one token, and its id is those bytes.

The id is the little-endian u32 of the bytes. The last group of a piece of text is padded with 0xFF,
a byte that UTF-8 never contains, so that decoding gives back exactly what was encoded. Ids that end
in 0xFE, another byte that UTF-8 never contains, are special tokens. Four bytes a token is about what
trained tokenizers reach on English text, and equal prefixes (on four bytes) give equal tokens.

Not here: any model's real tokenizer, and multimodal input.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import NamedTuple

Tokens = array  # of typecode "I": u32, four bytes each

BYTES_PER_TOKEN = 4
MAX_TOKEN_ID = 2**32 - 1

_PAD = b"\xff"
_START = b"\x01\x00\x00\xfe"
_END = b"\x02\x00\x00\xfe"
_SPECIAL_TEXT = {_START: b"<|im_start|>", _END: b"<|im_end|>"}

if array("I").itemsize != BYTES_PER_TOKEN:  # pragma: no cover - no platform we know of
    raise ImportError("the simulated engine needs a platform whose C unsigned int has 32 bits")


class Turn(NamedTuple):
    """One message of a conversation, its content already flattened to text."""

    role: str
    text: str


def encode(text: str) -> Tokens[int]:
    """The tokens of a text; lone surrogates become "?"."""
    return _from_bytes(_pad(text))


def decode(tokens: Iterable[int]) -> str:
    """The text of tokens; special tokens show as text, bytes that are no UTF-8 as U+FFFD.

    Raises:
        OverflowError: when an id is negative or above `MAX_TOKEN_ID`.
    """
    data = _to_bytes(tokens if isinstance(tokens, array) else array("I", tokens))
    for special, shown in _SPECIAL_TEXT.items():
        data = data.replace(special, shown)
    return data.replace(_PAD, b"").decode("utf-8", "replace")


def render_chat(
    turns: Iterable[Turn], *, tools_json: str = "", add_generation_prompt: bool = True
) -> Tokens[int]:
    """The prompt of a conversation, in the manner of ChatML.

    Each message is start, role, content, end. Role and content are encoded apart, so that an answer
    sent back as a message has the tokens it was generated as, and its blocks are found again.
    Tools come first, as most chat templates put them.
    """
    parts: list[bytes] = []
    if tools_json:
        parts += (_START, _pad("tools\n"), _pad(tools_json), _END)
    for turn in turns:
        parts += (_START, _pad(turn.role + "\n"), _pad(turn.text), _END)
    if add_generation_prompt:
        parts += (_START, _pad("assistant\n"))
    return _from_bytes(b"".join(parts))


def token_bytes(tokens: Tokens[int]) -> bytes:
    """Four bytes a token, little-endian on every platform: what hashes are computed over."""
    return _to_bytes(tokens)


def _pad(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return data + _PAD * (-len(data) % BYTES_PER_TOKEN)


def _from_bytes(data: bytes) -> Tokens[int]:
    tokens = array("I")
    tokens.frombytes(data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def _to_bytes(tokens: Tokens[int]) -> bytes:
    if sys.byteorder == "big":
        tokens = array("I", tokens)
        tokens.byteswap()
    return tokens.tobytes()
