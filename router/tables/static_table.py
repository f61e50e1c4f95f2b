"""A routing table from a file, for tests, benchmarks and people without a reconciler.

JSON or msgpack of `schemas.wire.routing.RoutingTable`, unsigned: whoever can write the file decides.
`generation`, `revision` and `published_at` may be left out, and a key's `sha256` may be hex. It is
read again when it changes; one that does not load changes nothing. Such a table does not age.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from router.state import RouterState
from schemas.wire.routing import VERSION, RoutingTable

_log: Final = logging.getLogger(__name__)


class TableInvalid(ValueError):
    """The file is not a routing table; says what is wrong and where."""


def _hex_hashes(raw: dict[str, Any]) -> None:
    for tenant in raw.get("tenants", ()):
        for key in tenant.get("keys", ()):
            if isinstance(digest := key.get("sha256"), str) and len(digest) == 64:
                key["sha256"] = bytes.fromhex(digest)


def read(data: bytes, *, name: str, written_at: float, generation: int) -> RoutingTable:
    """The table in a file's bytes; what it leaves out is filled in from the rest.

    Raises:
        TableInvalid: naming the file.
    """
    try:
        packed = data[:1] not in (b"{", b" ", b"\n", b"\t", b"\r")
        raw = msgspec.msgpack.decode(data) if packed else msgspec.json.decode(data)
        raw = {
            "generation": generation,
            "revision": "file",
            "published_at": written_at,
            **raw,
        }
        _hex_hashes(raw)
        table = msgspec.convert(raw, RoutingTable, builtin_types=(bytes,))
    except (msgspec.MsgspecError, ValueError, AttributeError, TypeError) as error:
        raise TableInvalid(f"{name}: not a routing table: {error}") from None
    if table.version != VERSION:
        raise TableInvalid(f"{name}: version {table.version}, this program reads {VERSION}")
    for tenant in table.tenants:
        for key in tenant.keys:
            if len(key.sha256) != 32:
                raise TableInvalid(
                    f"{name}: key {key.id} of {tenant.name}: sha256 must be 64 hex characters"
                )
    return table


class StaticTable:
    """Keeps a router's state at what the file says."""

    def __init__(self, state: RouterState, path: Path, *, poll_interval_s: float) -> None:
        self._state = state
        self._path = path
        self._poll_interval_s = poll_interval_s
        self._seen: tuple[int, int, int] | None = None

    def load(self) -> None:
        """Reads the file if it has changed.

        Raises:
            TableInvalid: when it does not hold a table.
            OSError: when it cannot be read.
        """
        stat = self._path.stat()
        seen = stat.st_mtime_ns, stat.st_size, stat.st_ino
        if seen == self._seen:
            return
        self._seen = seen
        current = self._state.snapshot
        table = read(
            self._path.read_bytes(),
            name=str(self._path),
            written_at=stat.st_mtime,
            generation=current.generation + 1 if current else 1,
        )
        if not self._state.install(table, time.time()):
            _log.warning(
                "%s: generation %d is not newer than the one served; nothing changed",
                self._path,
                table.generation,
            )

    async def run(self) -> None:
        """Follows the file until cancelled."""
        while True:
            await asyncio.sleep(self._poll_interval_s)
            try:
                self.load()
            except (OSError, TableInvalid) as error:
                _log.error("the table in force stays: %s", error)
                if isinstance(error, OSError):
                    continue
            self._state.freshen(time.time())
