"""Compressed bodies, piece by piece."""

from __future__ import annotations

import contextlib
import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.inflate import PIECE_BYTES, EncodingInvalid, inflate


def bare(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


@given(st.binary(max_size=200), st.sampled_from([1, 1000, 10_000]))
def test_what_was_packed_comes_out_in_pieces(body, times):
    body = b"{" + body * times
    for encoding, packed in (
        (b"gzip", gzip.compress(body, mtime=0)),
        (b"deflate", zlib.compress(body)),
        (b"deflate", bare(body)),
    ):
        pieces = list(inflate(encoding, packed))
        assert b"".join(pieces) == body
        assert all(len(piece) <= PIECE_BYTES for piece in pieces)


@given(st.sampled_from([b"gzip", b"deflate"]), st.binary(max_size=100))
def test_anything_else_is_said_to_be_invalid(encoding, body):
    with contextlib.suppress(EncodingInvalid):
        list(inflate(encoding, body))


@pytest.mark.parametrize(
    ("packed", "says"),
    [
        (b"", "early"),
        (gzip.compress(b"a" * 1000, mtime=0)[:-1], "early"),
        (gzip.compress(b"a", mtime=0) + b"x", "follows"),
        (b"a" + gzip.compress(b"a", mtime=0), "damaged"),
    ],
)
def test_what_is_wrong_is_said(packed, says):
    with pytest.raises(EncodingInvalid, match=says):
        list(inflate(b"gzip", packed))
