"""What engines write of what a request used, as JSON, and what it comes to. Pure.

Shapes that msgspec decodes. It reads their annotations while the program runs, so that this module
stays as it is where others are compiled. Not here: finding it in an answer that goes by (usage).
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

VALUE: Final = rb"\s*(?:null|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})"
"""A `usage` as engines write it."""
value_at: Final = re.compile(VALUE).match
BYTES_A_TOKEN: Final = 4.0
"""Of common text: where no engine counted."""


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one request. `cached_tokens` are among `input_tokens`."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    estimated: bool = False
    """The engine did not say: counted by the router, by events and bytes."""


NOTHING: Final = Usage()


_Tokens = Annotated[int, msgspec.Meta(ge=0)]


class _Details(msgspec.Struct):
    cached_tokens: _Tokens | None = None


class Said(msgspec.Struct):
    """A `usage`, of whatever kind of answer."""

    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None
    prompt_tokens_details: _Details | None = None
    # Responses and Messages
    input_tokens: _Tokens | None = None
    output_tokens: _Tokens | None = None
    input_tokens_details: _Details | None = None
    # Messages: besides input_tokens, not among them
    cache_read_input_tokens: _Tokens | None = None
    cache_creation_input_tokens: _Tokens | None = None


class _Choice(msgspec.Struct):
    index: int = 0


class _Message(msgspec.Struct):
    content: str | None = None


class _Text(msgspec.Struct):
    message: _Message | None = None
    text: str | None = None


class _Texts(msgspec.Struct):
    choices: list[_Text]


class _Inner(msgspec.Struct):
    usage: Said | None = None


class Answer(msgspec.Struct):
    """A body, or the data of an event."""

    usage: Said | None = None
    choices: list[_Choice] | None = None
    response: _Inner | None = None
    message: _Inner | None = None


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
        choices = msgspec.json.decode(body, type=_Texts).choices
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    said = [c.text or (c.message.content if c.message else None) or "" for c in choices]
    size_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in said)
    return Usage(0, 0, int(size_bytes / BYTES_A_TOKEN), estimated=True)
