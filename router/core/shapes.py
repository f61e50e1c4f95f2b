"""What msgspec makes of JSON that comes from elsewhere: of requests' bodies, and of what engines say of usage.

It reads these annotations while the program runs, so that this module stays as it is where others are
compiled. Not here: what any of it means (request, usage_json).
"""

from __future__ import annotations

from typing import Annotated

import msgspec


class Shared(msgspec.Struct, frozen=True):
    """What the bodies of all endpoints share."""

    model: str | None = None
    n: int | None = None
    best_of: int | None = None


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one request. `cached_tokens` are among `input_tokens`."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    estimated: bool = False
    """The engine did not say: counted by the router, by events and bytes."""


NOTHING = Usage()


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


class Choice(msgspec.Struct):
    index: int = 0


class _Message(msgspec.Struct):
    content: str | None = None


class _Text(msgspec.Struct):
    message: _Message | None = None
    text: str | None = None


class Texts(msgspec.Struct):
    choices: list[_Text]


class _Inner(msgspec.Struct):
    usage: Said | None = None


class Answer(msgspec.Struct):
    """A body, or the data of an event."""

    usage: Said | None = None
    choices: list[Choice] | None = None
    response: _Inner | None = None
    message: _Inner | None = None
