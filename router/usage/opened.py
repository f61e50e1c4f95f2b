"""What a journal keeps of a request that is under way, for whoever has to finish it.

msgspec reads its annotations while the program runs, so that this module stays as it is where others
are compiled. Not here: the journal (journal).
"""

from __future__ import annotations

from typing import Final

import msgspec

from schemas.wire.routing import Price


class Opened(msgspec.Struct, array_like=True):
    """What is known of a request when it is sent."""

    id: str
    tenant: str
    key: str
    function: str
    revision: str
    started_at: float
    """Unix seconds."""
    price: Price


read_opened: Final = msgspec.msgpack.Decoder(Opened).decode
"""One as it was encoded; raises msgspec.DecodeError."""
