"""How an agent without Redis proves that a POST is its own: HMAC-SHA256 under its cluster's key.

The key itself is a secret of the agent and of the routers; Git holds its SHA-256 alone, which says
which key counts but makes no signature. What is signed names cluster, time and a nonce, so that an
intercepted POST is good for nothing: not elsewhere, not later, not twice. Not here: remembering nonces.
"""

from __future__ import annotations

import hmac
from typing import Final

PATH: Final = "/agent/v1/report"
CLUSTER_HEADER: Final = "x-detoserve-cluster"
TIMESTAMP_HEADER: Final = "x-detoserve-timestamp"
"""Unix seconds, decimal."""
NONCE_HEADER: Final = "x-detoserve-nonce"
"""16 random bytes, 32 hex characters; never used again."""
SIGNATURE_HEADER: Final = "x-detoserve-signature"

WINDOW_S: Final = 60.0
"""How far the clocks of agent and router may be apart, the way between them included."""
MAX_BODY_BYTES: Final = 8 * 2**20

_VERSION: Final = "v1"


def sign(key: bytes, *, cluster: str, timestamp: str, nonce: str, body: bytes) -> str:
    """The value of the signature header."""
    # No part can run into its neighbour: names, digits and hex hold no newline, and the body is last.
    head = f"{_VERSION}\n{PATH}\n{cluster}\n{timestamp}\n{nonce}\n"
    return f"{_VERSION}={hmac.digest(key, head.encode() + body, 'sha256').hex()}"


def verify(
    key: bytes, signature: str, *, cluster: str, timestamp: str, nonce: str, body: bytes
) -> bool:
    """Whether `sign` with the same key gave this signature; in constant time."""
    expected = sign(key, cluster=cluster, timestamp=timestamp, nonce=nonce, body=body)
    return hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace"))
