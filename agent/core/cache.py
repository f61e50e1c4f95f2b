"""What one engine's prefix cache holds, followed event by event, under names that tell no prompt.

Keeps the engine's name of each block beside the keyed one (schemas.wire.token_blocks), because
removals come with the engine's alone. Tokens and salts are hashed and forgotten here. Without a key no
names are made, and only counted. Not here: whether an event was missed (sequence).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from agent.core.kv_events import BlockHash, Cleared, Event, PayloadInvalid, Removed, Stored
from schemas.wire.token_blocks import chain_root, next_block

MAX_BLOCKS: Final = 4_000_000
"""Of one engine; an engine that says it holds more is not believed."""
_GPU: Final = (None, "GPU")
"""Blocks offloaded to slower memory cost a transfer, and are not counted as held."""
_FIRST_GROUP: Final = (None, 0)
"""Models with several kinds of attention store each block once a kind; one kind stands for all."""
_encode: Final = msgspec.json.Encoder(order="sorted").encode


@dataclass(slots=True)
class Change:
    """What a batch of events did, in keyed names; empty names where there is no key."""

    cleared: bool = False
    removed: list[int] = field(default_factory=list)
    stored: dict[int, None] = field(default_factory=dict)
    """In order."""
    removed_tokens: int = 0
    stored_tokens: int = 0

    def __bool__(self) -> bool:
        return self.cleared or bool(self.removed_tokens or self.stored_tokens)


class Cache:
    """One publisher's cache."""

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key
        self._blocks: dict[BlockHash, tuple[int, int]] = {}
        """The engine's name -> (keyed name, tokens); 0 where no name could be made."""
        self.orphans = 0
        """Blocks whose parent was not known: they count as tokens, without a name."""

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def names(self) -> list[int]:
        """Keyed names of all that is held, a block after those before it in its chain."""
        return [name for name, _ in self._blocks.values() if name]

    def forget(self) -> None:
        """Nothing is known to be held."""
        self._blocks.clear()

    def apply(self, events: Iterable[Event]) -> Change:
        """Follows a batch.

        Raises:
            PayloadInvalid: what it says cannot be; nothing more of the batch is believed.
        """
        change = Change()
        for event in events:
            match event:
                case Stored():
                    self._store(event, change)
                case Removed():
                    self._remove(event, change)
                case Cleared():
                    self.forget()
                    change.cleared = True
                    change.removed.clear()
                    change.stored.clear()
        return change

    def _store(self, event: Stored, change: Change) -> None:
        if event.medium not in _GPU or event.group_idx not in _FIRST_GROUP:
            return
        if len(self._blocks) + len(event.block_hashes) > MAX_BLOCKS:
            raise PayloadInvalid(f"an engine says that it holds more than {MAX_BLOCKS} blocks")
        size, parent = event.block_size, self._parent(event)
        for i, block in enumerate(event.block_hashes):
            known = self._blocks.get(block)
            if known is not None:  # said again, as when it is used again
                parent = known[0]
                continue
            if parent is None or (not parent and self._key is not None):
                self.orphans += 1
                parent = 0
            else:
                tokens = event.token_ids[i * size : (i + 1) * size]
                parent = self._named(parent, tokens, self._extra(event, i))
            self._blocks[block] = parent, size
            change.stored_tokens += size
            if parent:
                change.stored[parent] = None

    def _remove(self, event: Removed, change: Change) -> None:
        if event.medium not in _GPU or event.group_idx not in _FIRST_GROUP:
            return
        for block in event.block_hashes:
            name, tokens = self._blocks.pop(block, (0, 0))
            change.removed_tokens += tokens
            if name in change.stored:
                del change.stored[name]
            elif name:
                change.removed.append(name)

    def _parent(self, event: Stored) -> int | None:
        """The keyed name that the first block follows; None when it is not known."""
        if self._key is None:
            return 0
        if event.parent_block_hash is not None:
            known = self._blocks.get(event.parent_block_hash)
            return known[0] if known is not None else None
        salt = _salt(self._keys(event, 0))
        lora = event.lora_name or (str(event.lora_id) if event.lora_id is not None else "")
        return chain_root(self._key, lora=lora, salt=salt or "")

    def _named(self, parent: int, tokens: Sequence[int], extra: str) -> int:
        if self._key is None:
            return 0
        try:
            return next_block(self._key, parent, tokens, extra)
        except struct.error:
            raise PayloadInvalid("a BlockStored has token ids that are none") from None

    @staticmethod
    def _keys(event: Stored, block: int) -> list[Any]:
        """What else went into a block's hash, without the adapter, which stands first in each."""
        keys = list((event.extra_keys[block] if event.extra_keys else None) or ())
        return keys[1:] if keys and event.lora_name and keys[0] == event.lora_name else keys

    def _extra(self, event: Stored, block: int) -> str:
        keys = self._keys(event, block)
        if not keys or (block == 0 and event.parent_block_hash is None and _salt(keys) is not None):
            return ""
        return _encode(keys).decode()


def _salt(keys: Sequence[Any]) -> str | None:
    """The cache salt, where a first block has nothing besides."""
    return keys[0] if len(keys) == 1 and isinstance(keys[0], str) else None
