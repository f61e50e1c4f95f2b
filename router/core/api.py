"""The API's surface: which method and path is allowed, and which task a model must have for it.

An exact allowlist: engines answer more than this (pausing, profiling, raw scoring), and none of it
is to be reached through the router. Not here: what happens to a request (proxy).
"""

from __future__ import annotations

import re
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
    model_optional: bool = False
    """Without a `model`, the only function is meant that answers the tenant here."""
    stored: bool = False
    """About something an engine keeps, and without a model's name: see `stored`."""


_ENDPOINTS: Final = (
    Endpoint("/v1/chat/completions", "chat", "chat"),
    Endpoint("/v1/completions", "completions", "text_completion"),
    Endpoint("/v1/embeddings", "embeddings", "embeddings"),
    # A stored prompt may name the model instead.
    Endpoint("/v1/responses", "responses", "responses", model_optional=True),
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

_ID: Final = r"\w[\w.:-]{0,199}"
_STORED: Final = tuple(
    (
        frozenset(methods.split()),
        re.compile(re.sub(r"\\{\w+\\}", lambda _: _ID, re.escape(path)), re.ASCII),
        Endpoint(path, task, operation, stored=True),
    )
    for methods, path, task, operation in (
        ("GET", "/v1/chat/completions", "chat", "stored_chats"),
        ("GET POST DELETE", "/v1/chat/completions/{completion_id}", "chat", "stored_chat"),
        ("GET", "/v1/chat/completions/{completion_id}/messages", "chat", "stored_chat"),
        ("GET DELETE", "/v1/responses/{response_id}", "responses", "stored_response"),
        ("POST", "/v1/responses/{response_id}/cancel", "responses", "stored_response"),
        ("GET", "/v1/responses/{response_id}/input_items", "responses", "stored_response"),
        ("POST", "/v1/responses/input_tokens", "responses", "input_tokens"),
        ("POST", "/v1/responses/compact", "responses", "compact"),
        ("DELETE", "/v1/models/{model}", "chat", "delete_model"),
    )
)
STORED: Final = tuple((methods, endpoint) for methods, _, endpoint in _STORED)
"""Methods and endpoints of what `stored` finds."""


def stored(method: str, path: str) -> Endpoint | None:
    """The endpoint of a request about something that an engine keeps, such as a stored response.

    Such requests name no model, and an engine shows what it keeps to whoever asks. They are passed
    on only where it is clear to whom: to a replica that serves this one tenant.
    """
    for methods, pattern, endpoint in _STORED:
        if method in methods and pattern.fullmatch(path):
            return endpoint
    return None


PASSED: Final[dict[str, Endpoint]] = {endpoint.path: endpoint for endpoint in _ENDPOINTS}
"""Path -> endpoint; all of them take POST."""

OWN: Final[frozenset[str]] = frozenset(
    {"/v1/models", "/v1/usage", "/health", "/ready", "/openapi.json"}
)
"""Paths that the router answers itself; all of them take GET. So does /v1/models/<name>."""

MODEL_PREFIX: Final = "/v1/models/"
SESSION_PREFIX: Final = "/v1/sessions/"
"""DELETE of a session's name after it: what is remembered of the session is forgotten."""


def methods_of(path: str) -> frozenset[str]:
    """What a path answers at all; nothing, if there is no such path."""
    found = {"POST"} if path in PASSED else set()
    if path in OWN:
        found.add("GET")
    if path.startswith(MODEL_PREFIX):
        found |= {"GET", "DELETE"}
    if path.startswith(SESSION_PREFIX) and len(path) > len(SESSION_PREFIX):
        found.add("DELETE")
    return frozenset(found.union(*(m for m, pattern, _ in _STORED if pattern.fullmatch(path))))
