"""From request bodies to prompts: parsing, flattening messages, lengths, limits.

Pure. Everything wrong with a request is raised as an ApiError in vLLM's words.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from agent.simulated.answers import ApiError
from agent.simulated.generation import Limits
from agent.simulated.protocol import ChatRequest, CompletionRequest, Message
from agent.simulated.settings import EngineSettings
from agent.simulated.tokens import Tokens, Turn, encode, render_chat

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions

T = TypeVar("T")


def parse(body: bytes, kind: type[T]) -> T:
    """The request in `body`.

    Raises:
        ApiError: 400, saying which field is wrong and what was expected.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        param = path.rstrip("`") or None
        where = f"'{param}': " if param else ""
        raise ApiError(
            400, f"1 validation error: {where}{message}", kind="Bad Request", param=param
        ) from error
    except msgspec.DecodeError as error:
        raise ApiError(400, f"JSON decode error: {error}", kind="Bad Request") from error
    except RecursionError as error:
        raise ApiError(400, "JSON decode error: nested too deeply", kind="Bad Request") from error


def chat_prompt(
    messages: Sequence[Message], tools: list[Any] | None, *, add_generation_prompt: bool = True
) -> Tokens[int]:
    """Renders messages and tools.

    Raises:
        ApiError: 400, for content that is not text.
    """
    tools_json = msgspec.json.encode(tools).decode() if tools else ""
    return render_chat(
        [Turn(message.role, _text_of(message)) for message in messages],
        tools_json=tools_json,
        add_generation_prompt=add_generation_prompt,
    )


def prompts(value: str | list[Any], *, param: str) -> list[Tokens[int]]:
    """One or several prompts, as text or as token ids.

    Raises:
        ApiError: 400, when it is none of these, or a prompt is empty.
    """
    listed: list[Any] = [value] if isinstance(value, str) else value
    if listed and not isinstance(listed[0], (str, list)):
        listed = [listed]  # one prompt of token ids
    result = [_prompt(item, param) for item in listed]
    if not result or not all(result):
        raise ApiError(400, "The decoder prompt cannot be empty", param=param)
    return result


def limits_of(
    request: ChatRequest | CompletionRequest, longest_prompt: int, settings: EngineSettings
) -> Limits:
    """How long the answer may get.

    Raises:
        ApiError: 400, when prompt and answer together exceed the model's context, or the fields
            contradict each other.
    """
    if isinstance(request, ChatRequest):
        asked = request.max_completion_tokens or request.max_tokens
        default = settings.max_model_len
    else:
        asked = request.max_tokens
        default = _COMPLETION_MAX_TOKENS
    room = settings.max_model_len - longest_prompt
    if room < (asked or 1):
        total = longest_prompt + (asked or 0)
        raise ApiError(
            400,
            f"This model's maximum context length is {settings.max_model_len} tokens. However, you"
            f" requested {asked or 0} output tokens and your prompt contains {longest_prompt} input"
            f" tokens, for a total of {total} tokens. Please reduce the length of the input prompt"
            " or the number of requested output tokens.",
            param="input_tokens",
        )
    max_tokens = asked or min(default, room)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise ApiError(
            400,
            f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.",
            param="min_tokens",
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            400,
            "Stream options can only be defined when `stream=True`.",
            param="stream_options",
        )
    stop = request.stop
    return Limits(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=request.ignore_eos or settings.ignore_eos,
        stop=() if stop is None else [stop] if isinstance(stop, str) else stop,
        include_stop=request.include_stop_str_in_output,
    )


def check_model(name: str | None, settings: EngineSettings) -> tuple[str, str]:
    """(name the answer carries, adapter or ""); no name means the first served model.

    Raises:
        ApiError: 404, for a model that is not served.
    """
    if name is None or name in settings.served_model_names:
        return settings.served_model_names[0], ""
    if name in settings.lora_modules:
        return name, name
    raise ApiError(404, f"The model `{name}` does not exist.", kind="NotFoundError", param="model")


def _text_of(message: Message) -> str:
    if isinstance(message.content, list):
        for part in message.content:
            if part.type != "text":
                raise ApiError(
                    400,
                    f"content of type {part.type!r}: this is not a multimodal model; send text",
                    param="messages",
                )
        text = "".join(part.text or "" for part in message.content)
    else:
        text = message.content or ""
    if message.tool_calls:
        text += msgspec.json.encode(message.tool_calls).decode()
    return text


def _prompt(item: Any, param: str) -> Tokens[int]:
    if isinstance(item, str):
        return encode(item)
    if isinstance(item, list) and not any(isinstance(token, bool) for token in item):
        try:
            return array("I", item)
        except (TypeError, OverflowError):
            pass  # answered below, as any other shape that is none of the four
    raise ApiError(
        400,
        f"'{param}' must be a string, a list of strings, a list of token ids (0 to 2^32 - 1), or a"
        " list of such lists",
        param=param,
    )
