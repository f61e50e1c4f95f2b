"""vLLM's KV events as they come over the wire, in the forms of 0.16 (arrays) and 0.32 (maps).

A payload is msgpack of `[timestamp, [events], data_parallel_rank]`. What later versions add is
ignored, what earlier ones lack has a default. Not here: what the events say of the cache (cache).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

BlockHash = int | bytes
"""The engine's own name of a block."""
ExtraKeys = Sequence[Any]

_ARRAY_FIELDS: Final = {
    "BlockStored": (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}


class PayloadInvalid(ValueError):
    """A payload is not what vLLM sends; never quotes it, for it holds prompts."""


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive blocks that the cache took in; `token_ids` are those of all of them together."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None = None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    lora_id: int | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that it gave up."""

    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class Cleared(msgspec.Struct, frozen=True, kw_only=True):
    """All of it forgotten."""


Event = Stored | Removed | Cleared

_TYPES: Final[dict[str, type[Event]]] = {
    "BlockStored": Stored,
    "BlockRemoved": Removed,
    "AllBlocksCleared": Cleared,
}
# strict=False would turn floats into hashes; a hash is what it is.
_decode: Final = msgspec.msgpack.Decoder().decode


def decode(payload: bytes) -> list[Event]:
    """The events of one payload that this program knows, in order.

    Raises:
        PayloadInvalid: for anything that vLLM would not send.
    """
    try:
        raw = _decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise PayloadInvalid("an event payload is not msgpack") from None
    if not isinstance(raw, list) or len(raw) < 2 or not isinstance(raw[1], list):
        raise PayloadInvalid("an event payload is not [timestamp, [events], ...]")
    return [event for one in raw[1] if (event := _event(one)) is not None]


def _event(raw: Any) -> Event | None:
    if isinstance(raw, dict):
        kind, fields = raw.get("type"), raw
    elif isinstance(raw, list) and raw:
        kind = raw[0]
        names = _ARRAY_FIELDS.get(kind, ()) if isinstance(kind, str) else ()
        fields = dict(zip(names, raw[1:], strict=False))
    else:
        raise PayloadInvalid("an event is neither a map nor an array")
    if not isinstance(kind, str):
        raise PayloadInvalid("an event does not say its type")
    form = _TYPES.get(kind)
    if form is None:
        return None  # of a later version
    try:
        event = msgspec.convert(fields, form)
    except (msgspec.ValidationError, TypeError):
        raise PayloadInvalid(f"a {kind} has not the fields that vLLM gives it") from None
    if isinstance(event, Stored) and not _fits(event):
        raise PayloadInvalid("a BlockStored has not as many tokens as its blocks hold")
    return event


def _fits(event: Stored) -> bool:
    blocks, keys = len(event.block_hashes), event.extra_keys
    return (
        event.block_size > 0
        and len(event.token_ids) == blocks * event.block_size
        and (keys is None or len(keys) == blocks)
    )
