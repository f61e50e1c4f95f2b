from __future__ import annotations

import base64
import math
import struct

from hypothesis import given
from hypothesis import strategies as st

from agent.simulated.embedding import embed, to_base64


@given(st.text(), st.integers(1, 100))
def test_any_text_has_a_unit_vector_always_the_same(text: str, dimensions: int) -> None:
    vector = embed(text, dimensions=dimensions)
    assert len(vector) == dimensions
    assert math.isclose(sum(value * value for value in vector), 1.0)
    assert vector == embed(text, dimensions=dimensions)


def test_texts_that_share_words_are_closer() -> None:
    def similarity(a: str, b: str) -> float:
        pairs = zip(embed(a, dimensions=256), embed(b, dimensions=256), strict=True)
        return sum(x * y for x, y in pairs)

    near = similarity("the cat sat on the mat", "the cat lay on the mat")
    far = similarity("the cat sat on the mat", "quarterly revenue grew strongly")
    assert near > 0.7
    assert far < 0.3


def test_base64_is_little_endian_float32() -> None:
    assert struct.unpack("<2f", base64.b64decode(to_base64([0.5, -1.0]))) == (0.5, -1.0)
