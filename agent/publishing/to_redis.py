"""An agent's words in Redis: reports that expire, streams of bounded length, snapshots.

Not here: what is published when (app).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from agent.outbox import Parcel
from agent.publishing import SendFailed
from schemas.wire import redis_keys
from schemas.wire.events import AgentHeartbeat, KvBatch

STREAM_ENTRIES: Final = 4096
"""About so many batches are kept; a reader that is further behind starts from the snapshot."""
STREAM_EXPIRES_S: Final = 3600
_encode: Final = msgspec.msgpack.encode


class ToRedis:
    def __init__(self, redis: Redis, *, report_ttl_s: float, heartbeat_ttl_s: float) -> None:
        self._redis = redis
        self._report_ttl_ms = int(report_ttl_s * 1000)
        self._heartbeat_ttl_ms = int(heartbeat_ttl_s * 1000)

    async def send(
        self,
        heartbeat: AgentHeartbeat,
        parcel: Parcel,
        snapshots: Sequence[tuple[str, KvBatch]] = (),
    ) -> None:
        """Raises: SendFailed: Redis does not take it."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(redis_keys.agent(heartbeat.id), _encode(heartbeat), px=self._heartbeat_ttl_ms)
        for replica, batch in parcel.batches:
            key = redis_keys.kv(replica)
            pipe.xadd(key, {redis_keys.KV_FIELD: _encode(batch)}, maxlen=STREAM_ENTRIES)
        for replica in {replica for replica, _ in parcel.batches}:
            pipe.expire(redis_keys.kv(replica), STREAM_EXPIRES_S)
        for replica, batch in snapshots:
            pipe.set(redis_keys.kv_snapshot(replica), _encode(batch), ex=STREAM_EXPIRES_S)
        for report in parcel.reports:
            data = _encode(report)
            pipe.set(redis_keys.engine(report.replica), data, px=self._report_ttl_ms)
            pipe.publish(redis_keys.ENGINES_CHANNEL, data)
        try:
            await pipe.execute()
        except (RedisError, OSError, TimeoutError) as error:
            raise SendFailed(f"Redis: {type(error).__name__}") from None
