"""The API's surface: which method and path is allowed, and which task a model must have for it.

An exact allowlist: engines answer more than this (pausing, profiling, raw scoring), and none of it
is to be reached through the router. Not here: what happens to a request (proxy).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path that is passed to engines."""

    path: str
    task: str
    """Task that the function must name."""
    operation: str
    """`gen_ai.operation.name` in metrics."""
    multipart: bool = False
    """The body is multipart/form-data and its `model` is a form field."""
    model_required: bool = True


_ENDPOINTS: Final = (
    Endpoint("/v1/chat/completions", "chat", "chat"),
    Endpoint("/v1/completions", "completions", "text_completion"),
    Endpoint("/v1/embeddings", "embeddings", "embeddings"),
    Endpoint("/v1/responses", "responses", "responses"),
    Endpoint("/v1/rerank", "rerank", "rerank"),
    Endpoint("/rerank", "rerank", "rerank"),
    Endpoint("/v2/rerank", "rerank", "rerank"),
    Endpoint("/v1/score", "score", "score"),
    Endpoint("/score", "score", "score"),
    Endpoint("/v1/audio/transcriptions", "transcription", "transcription", multipart=True),
    Endpoint("/v1/audio/translations", "translation", "translation", multipart=True),
    Endpoint("/tokenize", "tokenize", "tokenize"),
    Endpoint("/detokenize", "tokenize", "detokenize"),
    Endpoint("/v1/messages", "messages", "messages"),
    Endpoint("/v1/messages/count_tokens", "messages", "count_tokens"),
)

PASSED: Final[dict[str, Endpoint]] = {endpoint.path: endpoint for endpoint in _ENDPOINTS}
"""Path -> endpoint; all of them take POST."""

OWN: Final[frozenset[str]] = frozenset({"/v1/models", "/health", "/ready", "/openapi.json"})
"""Paths that the router answers itself; all of them take GET. So does /v1/models/<name>."""

MODEL_PREFIX: Final = "/v1/models/"
