"""Which engines there are: a list, the routing table, or Kubernetes pods. Each is a Finder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agent.kv_source import Publisher


class FindingFailed(Exception):
    """Nobody can say just now: what was found before stays. The message is for people."""


@dataclass(frozen=True, slots=True)
class Address:
    """An engine as it was found."""

    url: str
    """Base of its HTTP API, without a slash at the end."""
    replica: str = ""
    """As the routing table names it; empty: it is known there by its URL."""
    publishers: tuple[Publisher, ...] = ()
    """Where it publishes KV events; empty: it is asked."""


class Finder(Protocol):
    """Something that knows engines."""

    async def engines(self) -> Sequence[Address]:
        """All engines there are now.

        Raises:
            FindingFailed: it cannot be asked.
        """


def joined(found: Sequence[Address], table: dict[str, str]) -> dict[str, Address]:
    """Replica id -> address. `table`: id -> URL of the replicas that are routed to.

    What the table does not name is left out: reports about it would move nothing.
    """
    by_url = {url.rstrip("/"): replica for replica, url in table.items()}
    out = {}
    for address in found:
        replica = address.replica or by_url.get(address.url.rstrip("/"), "")
        if replica in table:
            out[replica] = address
    return out
