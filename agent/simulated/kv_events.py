"""vLLM's KV events and their encoding: what the cache stores and forgets.

A payload is msgpack of `[timestamp, [events], data_parallel_rank]`. An event is a map with a "type"
(vLLM 0.32), or an array that begins with it (vLLM 0.16).

Not here: which events happen (scheduler), and sending them (kv_publisher).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from agent.simulated.settings import EventFormat


class BlockStored(msgspec.Struct, tag=True, frozen=True):
    """Consecutive blocks, now in the cache; `token_ids` are those of all of them together.

    `extra_keys`: for each block what besides its tokens went into its hash, or None.
    """

    block_hashes: Sequence[int]
    parent_block_hash: int | None
    token_ids: Sequence[int]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None
    extra_keys: Sequence[Sequence[str] | None]
    group_idx: int = 0
    kv_cache_spec_kind: str = "full_attention"


class BlockRemoved(msgspec.Struct, tag=True, frozen=True):
    """Blocks evicted from the cache."""

    block_hashes: Sequence[int]
    medium: str
    group_idx: int = 0


class AllBlocksCleared(msgspec.Struct, tag=True, frozen=True):
    """The whole cache forgotten."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


def encode_batch(events: Sequence[Event], *, timestamp_s: float, form: EventFormat) -> bytes:
    """The payload of one message."""
    listed = events if form == "map" else [_as_array(event) for event in events]
    return msgspec.msgpack.encode([timestamp_s, listed, 0])


def _as_array(event: Event) -> list[Any]:
    # What 0.16 did not know yet (extra keys, groups) is left out.
    match event:
        case BlockStored():
            return [
                "BlockStored",
                event.block_hashes,
                event.parent_block_hash,
                event.token_ids,
                event.block_size,
                event.lora_id,
                event.medium,
                event.lora_name,
            ]
        case BlockRemoved():
            return ["BlockRemoved", event.block_hashes, event.medium]
        case AllBlocksCleared():
            return ["AllBlocksCleared"]
