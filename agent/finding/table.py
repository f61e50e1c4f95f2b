"""The replicas of the signed routing table in Redis: their names, and where they are.

A table that is not signed by the reconciler's key is not believed, and an older one than the last
neither. Not here: joining them with engines found otherwise (finding.joined).
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from redis.asyncio import Redis
from redis.exceptions import RedisError

from agent.finding import Address, FindingFailed
from schemas.wire import redis_keys
from schemas.wire.envelope import EnvelopeInvalid, unseal
from schemas.wire.routing import RoutingTable


class RoutedReplicas:
    """Replicas of one cluster, or of all where `cluster` is empty."""

    def __init__(self, redis: Redis, public_key: Ed25519PublicKey, cluster: str = "") -> None:
        self._redis = redis
        self._public_key = public_key
        self._cluster = cluster
        self._generation = -1
        self._replicas: dict[str, str] = {}

    async def replicas(self) -> dict[str, str]:
        """Id -> base URL.

        Raises:
            FindingFailed: there is no table, or none that can be believed.
        """
        try:
            generation = await self._redis.get(redis_keys.ROUTES_GENERATION)
            if generation is not None and generation == b"%d" % self._generation:
                return self._replicas
            sealed = await self._redis.get(redis_keys.ROUTES_CURRENT)
        except (RedisError, OSError, TimeoutError) as error:
            raise FindingFailed(f"Redis: {type(error).__name__}") from None
        if not isinstance(sealed, bytes):
            raise FindingFailed("Redis has no routing table")
        try:
            table = unseal(sealed, RoutingTable, self._public_key)
        except EnvelopeInvalid as error:
            raise FindingFailed(f"the routing table is not believed: {error}") from None
        if table.generation >= self._generation:
            self._generation = table.generation
            self._replicas = replicas_of(table, self._cluster)
        return self._replicas

    async def engines(self) -> Sequence[Address]:
        """Raises: FindingFailed: see `replicas`."""
        replicas = await self.replicas()
        return [Address(url.rstrip("/"), replica) for replica, url in replicas.items()]


def replicas_of(table: RoutingTable, cluster: str = "") -> dict[str, str]:
    """Id -> base URL of a cluster's replicas, or of all."""
    return {
        replica.id: replica.url
        for function in table.functions
        for arm in function.arms
        if not cluster or arm.cluster == cluster
        for replica in arm.replicas
    }
