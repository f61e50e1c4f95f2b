"""Whether a request may enter at all, before a replica is sought.

Today: the ceiling on what this process carries. Limits of tenants and keys hold over all routers
together and need shared counters; they are in the table but are not enforced here yet.
"""

from __future__ import annotations

from router.core.errors import ROUTER_FULL, Refusal


def admit(in_flight: int, max_in_flight: int) -> Refusal | None:
    """None when the request may enter. `max_in_flight` 0 means no ceiling."""
    if max_in_flight and in_flight >= max_in_flight:
        return ROUTER_FULL
    return None
