from __future__ import annotations

import msgspec

from agent.simulated.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, encode_batch

STORED = BlockStored(
    block_hashes=(2**64 - 1, 2),
    parent_block_hash=None,
    token_ids=[1, 2, 3, 4],
    block_size=2,
    lora_id=None,
    medium="GPU",
    lora_name=None,
    extra_keys=[("tenant-a",), None],
)
EVENTS = [AllBlocksCleared(), BlockRemoved((9,), "GPU"), STORED]


def test_maps_are_what_vllm_0_32_sends() -> None:
    payload = msgspec.msgpack.decode(encode_batch(EVENTS, timestamp_s=1.5, form="map"))
    assert payload == [
        1.5,
        [
            {"type": "AllBlocksCleared"},
            {"type": "BlockRemoved", "block_hashes": [9], "medium": "GPU", "group_idx": 0},
            {
                "type": "BlockStored",
                "block_hashes": [2**64 - 1, 2],
                "parent_block_hash": None,
                "token_ids": [1, 2, 3, 4],
                "block_size": 2,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [["tenant-a"], None],
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
            },
        ],
        0,
    ]


def test_arrays_are_what_vllm_0_16_sends() -> None:
    payload = msgspec.msgpack.decode(encode_batch(EVENTS, timestamp_s=1.5, form="array"))
    assert payload == [
        1.5,
        [
            ["AllBlocksCleared"],
            ["BlockRemoved", [9], "GPU"],
            ["BlockStored", [2**64 - 1, 2], None, [1, 2, 3, 4], 2, None, "GPU", None],
        ],
        0,
    ]
