"""The routing table from Redis, kept in memory and on disk.

Told of by a channel, asked for besides; believed only when signed, and only when newer. Redis that
is away, empty, wrong or silent changes nothing: absent never means empty. No request waits here.
Not here: the meaning of the table (core.snapshot).
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from router.state import RouterState
from schemas.wire import redis_keys
from schemas.wire.envelope import EnvelopeInvalid, unseal
from schemas.wire.routing import Freshness, RoutingTable

_log: Final = logging.getLogger(__name__)

TABLE_FILE: Final = "routes.table"
FRESH_FILE: Final = "routes.fresh"
_FRESH_TO_DISK_S: Final = 30.0
_MAX_WAIT_S: Final = 5.0


def write_atomically(path: Path, data: bytes) -> None:
    """Whole or not at all, also when the machine stops in between.

    Raises:
        OSError: as the disk says.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class RedisTable:
    """Keeps a router's state at the newest signed table.

    `refused` counts, by reason, tables and words of freshness that were not believed.
    """

    def __init__(
        self,
        state: RouterState,
        redis: Redis,
        public_key: Ed25519PublicKey,
        *,
        state_dir: Path | None,
        poll_interval_s: float,
        refused: dict[str, int],
    ) -> None:
        self._state = state
        self._redis = redis
        self._public_key = public_key
        self._state_dir = state_dir
        self._poll_interval_s = poll_interval_s
        self._refused = refused
        self._fresh_written = 0.0
        self._said: dict[str, str] = {}
        self.connected = False

    def load_from_disk(self) -> bool:
        """Starts from the last good table, if there is one; verified like any other.

        The word of freshness beside it tells how old it is.
        """
        if self._state_dir is None:
            return False
        try:
            sealed = (self._state_dir / TABLE_FILE).read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            self._say("disk", f"the kept table cannot be read: {error}")
            return False
        try:
            table = unseal(sealed, RoutingTable, self._public_key)
        except EnvelopeInvalid as error:
            self._refuse("disk", f"the kept table is not believed: {error}")
            return False
        self._state.install(table, table.published_at)
        with suppress(OSError):  # without it the table is as old as it says itself
            self._freshen((self._state_dir / FRESH_FILE).read_bytes())
        return True

    def accept(self, sealed: bytes) -> bool:
        """Serves from a sealed table, if it is believed and newer, and keeps it on disk."""
        try:
            table = unseal(sealed, RoutingTable, self._public_key)
        except EnvelopeInvalid as error:
            self._refuse("invalid", f"a table in Redis is not believed: {error}")
            return False
        current = self._state.snapshot
        if current is not None and table.generation < current.generation:
            self._refuse(
                "older",
                f"generation {table.generation} in Redis is older than {current.generation}, "
                "which is served",
            )
            return False
        if not self._state.install(table, min(table.published_at, time.time())):
            return False
        self._keep(TABLE_FILE, sealed)
        return True

    def _freshen(self, sealed: bytes) -> bool:
        try:
            fresh = unseal(sealed, Freshness, self._public_key)
        except EnvelopeInvalid as error:
            self._refuse("freshness", f"a word of freshness is not believed: {error}")
            return False
        current = self._state.snapshot
        if current is None or fresh.generation != current.generation:
            return False
        # A clock ahead of ours must not keep a table fresh for longer than it is.
        self._state.freshen(min(fresh.at, time.time()))
        return True

    async def run(self) -> None:
        """Follows Redis until cancelled, through everything that can happen to it."""
        wait_s = 0.1
        while True:
            try:
                async with self._redis.pubsub() as channel:
                    await channel.subscribe(redis_keys.ROUTES_CHANNEL)
                    while True:
                        await self._fetch()
                        wait_s = 0.1
                        self.connected = True
                        if self._said.pop("redis", None):
                            _log.info("Redis answers again")
                        # A message says only that it is worth asking; a lost one costs a poll.
                        await channel.get_message(
                            ignore_subscribe_messages=False, timeout=self._poll_interval_s
                        )
            except (RedisError, OSError, TimeoutError) as error:
                self.connected = False
                self._say(
                    "redis", f"Redis: {type(error).__name__}; serving from the table in memory"
                )
            await asyncio.sleep(wait_s * (0.5 + self._state.chance.random()))
            wait_s = min(wait_s * 2, _MAX_WAIT_S)

    async def _fetch(self) -> None:
        generation, fresh = await self._redis.mget(
            redis_keys.ROUTES_GENERATION, redis_keys.ROUTES_FRESH
        )
        current = self._state.snapshot
        if (
            current is None
            or generation is None
            or not generation.isdigit()
            or int(generation) > current.generation
        ):
            try:
                sealed = await self._redis.get(redis_keys.ROUTES_CURRENT)
            except ResponseError as error:
                self._refuse("wrong-type", f"{redis_keys.ROUTES_CURRENT}: {error}")
                sealed = None
            if isinstance(sealed, bytes):
                self.accept(sealed)
        elif int(generation) < current.generation:
            self._refuse(
                "older",
                f"Redis says generation {int(generation)}; {current.generation} is served",
            )
        if isinstance(fresh, bytes) and self._freshen(fresh):
            now = time.monotonic()
            if now - self._fresh_written >= _FRESH_TO_DISK_S:
                self._fresh_written = now
                self._keep(FRESH_FILE, fresh)

    def _keep(self, name: str, data: bytes) -> None:
        if self._state_dir is None:
            return
        try:
            self._state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(self._state_dir / name, data)
        except OSError as error:
            # Served from memory all the same; only a cold start would miss it.
            self._say("disk", f"the table cannot be kept on disk: {error}")

    def _refuse(self, reason: str, text: str) -> None:
        self._refused[reason] = self._refused.get(reason, 0) + 1
        self._say(reason, text)

    def _say(self, about: str, text: str) -> None:
        """Once, until something else is to be said about it."""
        if text != self._said.get(about):
            self._said[about] = text
            _log.warning("%s", text)
