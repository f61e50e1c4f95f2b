"""Who is asking: an API key against the table, checked anew at each request.

Not here: reading the header (server), or limits (admission).
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from router.core.errors import (
    INSUFFICIENT_SCOPE,
    INVALID_API_KEY,
    NOT_FOR_USAGE,
    TABLE_STALE,
    TENANT_SUSPENDED,
    Refusal,
)
from router.core.snapshot import Principal, Snapshot
from schemas.api_keys import PREFIX

_PREFIX: Final = PREFIX.encode()
_ID_AT: Final = len(_PREFIX)
_ID_END: Final = _ID_AT + 10
_NO_KEY: Final = bytes(32)


def identify(snapshot: Snapshot, token: bytes) -> Principal | None:
    """Whose key this is, whether it may be used or not; as much work is done when it is nobody's."""
    digest = hashlib.sha256(token).digest()
    found = None
    if token.startswith(_PREFIX):
        for entry in snapshot.keys_by_id.get(token[_ID_AT:_ID_END].decode("latin-1"), ()):
            if hmac.compare_digest(entry.key.sha256, digest):
                found = entry
    if found is None:
        # A key of another gateway has no id inside it. A look-up by the hash of 256 random bits
        # tells a guesser nothing about the key.
        found = snapshot.keys_by_sha256.get(digest)
        if not hmac.compare_digest(found.key.sha256 if found else _NO_KEY, digest):
            return None
    return found


def authenticate(
    snapshot: Snapshot,
    principal: Principal | None,
    now: float,
    fresh_at: float,
    scope: str = "inference",
) -> Principal | Refusal:
    """Whoever `identify` found, if the key may do what `scope` says now.

    `now` and `fresh_at` are Unix seconds; `fresh_at` is when the table was last known to be
    current. Whatever is wrong with a key, the answer is the same 401.
    """
    if now - fresh_at > snapshot.table.max_table_age_s:
        return TABLE_STALE
    if principal is None:
        return INVALID_API_KEY
    tenant, key = principal
    if (key.not_before is not None and now < key.not_before) or (
        key.expires is not None and now >= key.expires
    ):
        return INVALID_API_KEY
    if tenant.suspended:
        return TENANT_SUSPENDED
    if scope not in key.scopes:
        return INSUFFICIENT_SCOPE if scope == "inference" else NOT_FOR_USAGE
    return principal
