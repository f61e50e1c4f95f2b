"""What requests to the engine may say: the fields that are acted on, with their types.

Other fields are accepted and ignored, as vLLM does. Checked here: types and ranges of single
fields. Not here: the model, lengths, and what fields mean together (openai_api).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Choices = Annotated[int, msgspec.Meta(ge=1, le=128)]
NonEmpty = Annotated[str, msgspec.Meta(min_length=1)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: NonEmpty
    content: str | list[ContentPart] | None = None
    tool_calls: list[Any] | None = None


class _Sampling(msgspec.Struct):
    """What chat and text completions share."""

    model: str | None = None
    n: Choices | None = None
    max_tokens: Positive | None = None
    min_tokens: NonNegative | None = None
    stop: NonEmpty | list[NonEmpty] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: NonEmpty | None = None


class ChatRequest(_Sampling, kw_only=True):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    tools: list[Any] | None = None


class CompletionRequest(_Sampling, kw_only=True):
    prompt: str | list[Any]
    echo: bool = False


class EmbeddingRequest(msgspec.Struct):
    input: str | list[Any]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Positive | None = None


class TokenizeRequest(msgspec.Struct):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Any] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct):
    tokens: list[Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]]
    model: str | None = None
