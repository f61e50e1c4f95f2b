"""Where an agent's words go: to Redis, or to routers over HTTPS. Each is a Sink."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from agent.outbox import Parcel
from schemas.wire.events import AgentHeartbeat, KvBatch


class SendFailed(Exception):
    """Nobody took it; it may be sent again. The message is for people, and holds no secret."""


class Sink(Protocol):
    async def send(
        self,
        heartbeat: AgentHeartbeat,
        parcel: Parcel,
        snapshots: Sequence[tuple[str, KvBatch]] = (),
    ) -> None:
        """Publishes all of it.

        Raises:
            SendFailed: what it says; part of it may have arrived.
        """
