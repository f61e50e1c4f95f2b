"""What keeps one tenant's prompt cache from telling another anything. Pure.

An engine answers sooner where it holds a prompt's beginning, and so tells whoever may ask whether
somebody sent that prompt before. With a salt of the tenant's own in every request nobody hits what
another has left. Not here: putting it into the body (splice).
"""

from __future__ import annotations

import hmac
from functools import lru_cache
from typing import Final

SALTED_ENGINES: Final = frozenset({"vllm", "llm-d", "sglang", "simulated"})
"""Engines that know `cache_salt`. Others either ignore it or refuse what they do not know."""
SALTED_OPERATIONS: Final = frozenset({"chat", "text_completion", "responses", "messages"})
"""Whatever fills caches. vLLM takes a salt with Messages since July 2026 (its pull request 49498); older
ones, and SGLang, pass over it there."""


@lru_cache(maxsize=4096)
def cache_salt(key: bytes, tenant: str, wish: str = "") -> str:
    """A tenant's salt: nobody without the key can tell whose it is, or make another's.

    `wish`: what the client itself asked for, which keeps its own users apart as well.
    """
    text = f"{len(tenant)}:{tenant}{wish}".encode("utf-8", "surrogatepass")
    return hmac.digest(key, text, "sha256").hex()[:32]
