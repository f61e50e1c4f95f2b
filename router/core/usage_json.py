"""What engines write of what a request used, as JSON, and what it comes to. Pure.

Not here: finding it in an answer that goes by (usage), or its shapes (shapes).
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from router.core.shapes import Answer, Said, Texts, Usage

VALUE: Final = rb"\s*(?:null|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})"
"""A `usage` as engines write it."""
value_at: Final = re.compile(VALUE).match
BYTES_A_TOKEN: Final = 4.0
"""Of common text: where no engine counted."""


_decode: Final = msgspec.json.Decoder(Answer).decode
_decode_usage: Final = msgspec.json.Decoder(Said | None).decode


def used(said: Said) -> Usage:
    """What it comes to."""
    details = said.prompt_tokens_details or said.input_tokens_details
    if said.prompt_tokens is not None or said.completion_tokens is not None:
        total = said.prompt_tokens or 0
        cached = (details.cached_tokens if details else None) or 0
    else:
        cached = (details.cached_tokens if details else None) or 0
        beside = said.cache_read_input_tokens or 0
        total = (said.input_tokens or 0) + beside + (said.cache_creation_input_tokens or 0)
        cached += beside
    output = said.completion_tokens or said.output_tokens or 0
    return Usage(total, min(cached, total), output)


def as_json(usage: Usage) -> bytes:
    """As engines write it."""
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}' % (
        usage.input_tokens, usage.output_tokens, usage.cached_tokens,
    )  # fmt: skip


def running_usage(value: bytes) -> Usage | None:
    """What the JSON of one `usage` says, whatever follows it; None where it says nothing."""
    found = value_at(value)
    try:
        said = _decode_usage(found.group() if found else value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return None if said is None else used(said)


def read_answer(data: bytes) -> Answer | None:
    """A body or the data of an event; None where it is nothing of the kind."""
    try:
        return _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def said_in(answer: Answer) -> Said | None:
    """Its word on usage, wherever the kind of answer has it."""
    if answer.usage is not None:
        return answer.usage
    inner = answer.response or answer.message
    return None if inner is None else inner.usage


def by_text(body: bytes) -> Usage | None:
    """Of an answer whose engine tells no usage: by its text, with the prompt not counted."""
    try:
        choices = msgspec.json.decode(body, type=Texts).choices
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    said = [c.text or (c.message.content if c.message else None) or "" for c in choices]
    size_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in said)
    return Usage(0, 0, int(size_bytes / BYTES_A_TOKEN), estimated=True)
