"""A compressed body made plain, piece by piece, so that whoever asks can stop at any size.

Pure. Not here: how much is too much (proxy).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

PIECE_BYTES: Final = 2**18
_GZIP: Final = 31
_ZLIB: Final = 15
_RAW: Final = -15


class EncodingInvalid(ValueError):
    """The body is not what its Content-Encoding says."""


def inflate(encoding: bytes, body: bytes) -> Iterator[bytes]:
    """The plain bytes of a body in `gzip` or `deflate`, at most PIECE_BYTES at a time.

    Raises:
        EncodingInvalid: while iterating; it is damaged, incomplete, or followed by something.
    """
    # Some clients send bare deflate data where the standard asks for the zlib format.
    deflate = _RAW if body and body[0] & 0x0F != 8 else _ZLIB
    inflater = zlib.decompressobj(_GZIP if encoding == b"gzip" else deflate)
    left = body
    try:
        while True:
            piece = inflater.decompress(left, PIECE_BYTES)
            left = inflater.unconsumed_tail
            yield piece
            if inflater.eof:
                break
            if not piece and not left:
                raise EncodingInvalid("it ends too early")
    except zlib.error:
        raise EncodingInvalid("it is damaged") from None
    if inflater.unused_data:
        raise EncodingInvalid("something follows its end")
