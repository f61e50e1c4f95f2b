"""Event payloads as vLLM 0.16 and 0.32 send them, and as nobody should."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.kv_events import Cleared, PayloadInvalid, Removed, Stored, decode

STORED_MAP = {
    "type": "BlockStored",
    "block_hashes": [11, 12],
    "parent_block_hash": None,
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
    "extra_keys": [["salt"], None],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
    "session_id": "S1",
}
STORED_ARRAY = ["BlockStored", [11, 12], None, [1, 2, 3, 4], 2, None, "GPU", None]


def packed(*events: Any) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


def test_both_forms_say_the_same() -> None:
    (as_map,) = decode(packed(STORED_MAP))
    (as_array,) = decode(packed(STORED_ARRAY))
    assert isinstance(as_map, Stored)
    assert isinstance(as_array, Stored)
    assert as_map.extra_keys == [["salt"], None]
    assert msgspec.structs.replace(as_map, extra_keys=None, group_idx=None) == as_array


def test_removals_and_clears() -> None:
    assert decode(
        packed(
            {"type": "BlockRemoved", "block_hashes": [b"x" * 32], "medium": "GPU"},
            ["BlockRemoved", [7]],
            {"type": "AllBlocksCleared"},
            ["AllBlocksCleared"],
        )
    ) == [
        Removed(block_hashes=[b"x" * 32], medium="GPU"),
        Removed(block_hashes=[7]),
        Cleared(),
        Cleared(),
    ]


def test_what_later_versions_add_is_ignored() -> None:
    assert decode(packed({"type": "BlockDreamt", "x": 1}, ["BlockDreamt", 1])) == []
    assert decode(msgspec.msgpack.encode([1.5, [], 0, "more"])) == []


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        packed(1),
        packed({"block_hashes": []}),
        packed([["BlockStored"]]),
        packed({**STORED_MAP, "token_ids": [1, 2, 3]}),
        packed({**STORED_MAP, "token_ids": ["secret"]}),
        packed({**STORED_MAP, "extra_keys": [None]}),
        packed({**STORED_MAP, "block_size": 0, "token_ids": []}),
        packed(["BlockStored", [11]]),
        msgspec.msgpack.encode({"a": 1}),
        b"\x91" * 5000,
    ],
)
def test_poison_is_refused_without_a_word_of_it(payload: bytes) -> None:
    with pytest.raises(PayloadInvalid) as caught:
        decode(payload)
    assert "secret" not in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_events_or_refused(payload: bytes) -> None:
    with suppress(PayloadInvalid):
        assert isinstance(decode(payload), list)
