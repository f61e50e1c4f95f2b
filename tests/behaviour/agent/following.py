"""An agent of this process between real engines and a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from redis.asyncio import Redis

from agent.app import Agent
from agent.finding import Address
from agent.outbox import Parcel
from agent.publishing import Sink
from schemas.wire import redis_keys
from schemas.wire.events import AgentHeartbeat, EngineReport, KvBatch
from schemas.wire.token_blocks import unpack

HASH_KEY = bytes(range(32))
BIND = "tcp://127.0.0.1:*"
EVENT_FLAGS = ("--kv-events-endpoint", BIND, "--kv-events-replay-endpoint", BIND)
SMALL = ("--speed", "instant", "--block-size", "16", "--max-model-len", "2048")


@dataclass
class Listed:
    """A directory that says what it is told."""

    table: dict[str, str] = field(default_factory=dict)

    async def replicas(self) -> dict[str, str]:
        return dict(self.table)

    async def engines(self) -> Sequence[Address]:
        return [Address(url, name) for name, url in self.table.items()]


@dataclass
class Kept:
    """A sink that keeps everything, as readers of the streams would see it."""

    reports: dict[str, EngineReport] = field(default_factory=dict)
    batches: dict[str, list[KvBatch]] = field(default_factory=dict)
    snapshots: dict[str, KvBatch] = field(default_factory=dict)
    heartbeat: AgentHeartbeat | None = None

    async def send(
        self,
        heartbeat: AgentHeartbeat,
        parcel: Parcel,
        snapshots: Sequence[tuple[str, KvBatch]] = (),
    ) -> None:
        self.heartbeat = heartbeat
        self.reports |= {report.replica: report for report in parcel.reports}
        for replica, batch in parcel.batches:
            self.batches.setdefault(replica, []).append(batch)
        self.snapshots |= dict(snapshots)

    def held(self, replica: str) -> set[int]:
        """The names that its batches leave held; they must have no gap."""
        return names_of(self.batches.get(replica, []))


def names_of(batches: Sequence[KvBatch]) -> set[int]:
    held: set[int] = set()
    epoch, expected = None, 0
    for batch in batches:
        if batch.epoch != epoch:
            held, epoch, expected = set(), batch.epoch, 0
        assert batch.seq == expected, "a gap in the numbers"
        expected += 1
        if batch.cleared:
            held = set()
        held = (held - set(unpack(batch.removed))) | set(unpack(batch.stored))
    return held


@asynccontextmanager
async def running_agent(directory: Any, sink: Sink, **options: Any) -> AsyncIterator[Agent]:
    chosen = {
        "agent_id": "test",
        "cluster": "",
        "hash_key": HASH_KEY,
        "poll_interval_s": 0.1,
        "find_interval_s": 0.05,
        "heartbeat_interval_s": 0.2,
        "snapshot_interval_s": 0.1,
        **options,
    }
    agent = Agent(directory=directory, sink=sink, **chosen)
    task = asyncio.create_task(agent.run())
    try:
        yield agent
    finally:
        # Again and again, as the program does: redis-py may swallow one.
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=0.2)
        if not task.cancelled():
            task.result()


async def stream_of(redis: Redis, replica: str) -> list[KvBatch]:
    entries = await redis.xrange(redis_keys.kv(replica))
    field_name = redis_keys.KV_FIELD.encode()
    return [msgspec.msgpack.decode(fields[field_name], type=KvBatch) for _, fields in entries]
