"""Which deployment of a function a conversation belongs to.

Weights divide sessions, not requests: a conversation stays on its arm, and when weights change only the
share moves that has to (weighted rendezvous hashing). Nothing is remembered, so nothing can drag everybody to
one arm. Deployments that all keep the default weight are not divided: a request may go to any of
them, wherever it is served soonest. Not here: the replica within an arm (pick, route).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import log
from typing import Final

from xxhash import xxh64_intdigest

from router.core.snapshot import Candidate

_SHADOW: Final = 0x5AD0_5AD0_5AD0_5AD0
_SPAN: Final = float(1 << 52)


@lru_cache(maxsize=4096)
def _seed(deployment: str) -> int:
    return xxh64_intdigest(deployment.encode())


def _share(session: int, deployment: str) -> float:
    """Between 0 and 1, both excluded: where the session stands in this deployment's order."""
    hashed = xxh64_intdigest(session.to_bytes(8, "big"), _seed(deployment))
    return ((hashed >> 12) + 0.5) / _SPAN


def _standing(session: int, deployment: str, weight: float) -> float:
    return -weight / log(_share(session, deployment))


def by_session(candidates: Sequence[Candidate], session: int) -> str | None:
    """The deployment of the session's arm; None where every weight is 0.

    `session` is 64 bits: `session_number`, or any hash that is the same for a whole conversation.
    Give the candidates that are available: while a whole arm is not, its sessions go elsewhere, and
    come back with it.
    """
    weights = {c.deployment: c.weight for c in candidates if c.weight}
    if not weights:
        return None
    return max(weights, key=lambda name: _standing(session, name, weights[name]))


def is_shadowed(session: int, deployment: str, percent: float) -> bool:
    """Whether copies of this session's requests go to a shadow deployment that takes so many percent.

    Whole conversations: else its cache would see only holes. A higher share adds sessions, and takes
    none away.
    """
    return _share(session ^ _SHADOW, deployment) * 100 < percent
