"""The shapes of answers: vLLM's bodies, stream chunks, usage and errors, as encoded JSON.

Pure. Not here: what is answered, and HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import msgspec

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


class ApiError(Exception):
    """An answer that is an error: HTTP status, message for people, vLLM's type and parameter."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "BadRequestError",
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.body = _encode(
            {"error": {"message": message, "type": kind, "param": param, "code": status}}
        )


class Usage(NamedTuple):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class RunningUsage(NamedTuple):
    """Token counts of one choice of a stream that is not over."""

    prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
        }


class Piece(NamedTuple):
    """Text of one choice, the whole or a part; the reasons are given with the last part."""

    choice: int
    text: str
    finish_reason: str | None = None
    stop_reason: str | None = None


class Format(Protocol):
    """How one endpoint writes its answers."""

    def opening(self, choices: int, usage: RunningUsage | None) -> list[bytes]:
        """The events that open the choices; none where the endpoint has none."""

    def chunk(self, piece: Piece, usage: RunningUsage | None) -> bytes:
        """One event of a stream."""

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event with the final usage, without choices."""

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""


@dataclass(frozen=True, slots=True)
class _Format:
    id: str
    created: int  # Unix time, seconds
    model: str

    def _event(
        self, kind: str, choices: list[dict[str, Any]], usage: Usage | RunningUsage | None
    ) -> bytes:
        body: dict[str, Any] = self._head(kind) | {"choices": choices}
        if usage is not None:
            body["usage"] = usage.as_json()
        return b"data: " + _encode(body) + b"\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChatFormat(_Format):
    """/v1/chat/completions."""

    def opening(self, choices: int, usage: RunningUsage | None) -> list[bytes]:
        delta = {"role": "assistant", "content": ""}
        return [self._delta(index, delta, usage) for index in range(choices)]

    def chunk(self, piece: Piece, usage: RunningUsage | None) -> bytes:
        return self._delta(
            piece.choice, {"content": piece.text}, usage, piece.finish_reason, piece.stop_reason
        )

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._event("chat.completion.chunk", [], usage)

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> bytes:
        choices: list[dict[str, Any]] = [
            {
                "index": piece.choice,
                "message": {
                    "role": "assistant",
                    "content": piece.text,
                    "refusal": None,
                    "tool_calls": [],
                },
                "logprobs": None,
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
            }
            for piece in pieces
        ]
        head = self._head("chat.completion")
        return _encode(head | {"choices": choices, "usage": usage.as_json()})

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        usage: RunningUsage | None,
        finish_reason: str | None = None,
        stop_reason: str | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        if finish_reason is not None:
            choice["stop_reason"] = stop_reason
        return self._event("chat.completion.chunk", [choice], usage)


class TextFormat(_Format):
    """/v1/completions."""

    def opening(self, choices: int, usage: RunningUsage | None) -> list[bytes]:  # noqa: ARG002 - none
        return []

    def chunk(self, piece: Piece, usage: RunningUsage | None) -> bytes:
        return self._event("text_completion", [self._choice(piece)], usage)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._event("text_completion", [], usage)

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> bytes:
        choices = [self._choice(piece) for piece in pieces]
        head = self._head("text_completion")
        return _encode(head | {"choices": choices, "usage": usage.as_json()})

    @staticmethod
    def _choice(piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }


def error_event(error: ApiError) -> bytes:
    """An error after the stream has begun."""
    return b"data: " + error.body + b"\n\n"


def model_list(
    names: Sequence[str], loras: Sequence[str], *, created: int, max_model_len: int
) -> bytes:
    """/v1/models: the served names, then the adapters with the model they belong to."""
    cards = [(name, None) for name in names] + [(name, names[0]) for name in loras]
    data = [
        {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "detoserve",
            "root": name,
            "parent": parent,
            "max_model_len": max_model_len if parent is None else None,
        }
        for name, parent in cards
    ]
    return _encode({"object": "list", "data": data})


def embedding_list(
    vectors: Sequence[list[float] | str], *, answer_id: str, created: int, model: str, tokens: int
) -> bytes:
    """/v1/embeddings: vectors as floats or as base64."""
    data = [
        {"index": index, "object": "embedding", "embedding": vector}
        for index, vector in enumerate(vectors)
    ]
    return _encode(
        {
            "id": answer_id,
            "object": "list",
            "created": created,
            "model": model,
            "data": data,
            "usage": {
                "prompt_tokens": tokens,
                "total_tokens": tokens,
                "completion_tokens": 0,
                "prompt_tokens_details": None,
            },
        }
    )
