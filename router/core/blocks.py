"""A prompt as a chain of block hashes: what two requests share shows as a common prefix.

Every message is rendered, not only the first, and nothing is dumped as JSON that can be written
plainly: a conversation's next turn begins with exactly the bytes of the turn before. Hashes are not
reversible in practice but not secret either; they are never logged beside a tenant. Not here: who
holds which block (index), or tokens: engines cut their own blocks, and bytes stand in for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from struct import Struct
from typing import Any, Final

import msgspec
from xxhash import xxh3_128_hexdigest, xxh64_intdigest

BLOCK_BYTES: Final = 256
MAX_BLOCKS: Final = 8192
"""A prompt beyond 2 MiB is told apart no further."""
BYTES_PER_TOKEN: Final = 4.0
"""Of common text; what it is wrong by is learned with the speeds."""

_HASH_BITS: Final = (1 << 60) - 1
"""CPython keeps integers below 2^60 in 32 bytes, wider ones in 48; an index holds millions."""
_MEDIA: Final = frozenset(
    {
        "image_url", "image", "input_image", "image_embeds",
        "input_audio", "audio_url", "audio",
        "video_url", "video", "file", "input_file", "document",
    }
)  # fmt: skip
_IN_TEMPLATE: Final = ("chat_template", "chat_template_kwargs", "reasoning_effort", "documents")
"""Fields besides messages and tools that chat templates put before or into them."""

_cut: Final = Struct(f"{BLOCK_BYTES}s").iter_unpack
_encode: Final = msgspec.json.Encoder(order="sorted").encode


class Prompt:
    """What routing knows of a prompt.

    Args:
        blocks: chained hashes of its whole blocks, 60 bits each; the rest of a block counts for nothing.
        tokens: an estimate of its length.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        tokens: float,
        block_tokens: float = BLOCK_BYTES / BYTES_PER_TOKEN,
    ) -> None:
        self.blocks = blocks
        self.tokens = tokens
        self.block_tokens = block_tokens


@lru_cache(maxsize=4096)
def chain_seed(model: str, salt: str = "", lora: str = "", key: bytes = b"") -> int:
    """Where a chain starts: prompts that differ in any of these share no block.

    `salt` separates tenants, `key` fleets. Each part is hashed by itself into the next, so that no
    value can run into its neighbour.
    """
    seed = xxh64_intdigest(key)
    for part in (model, salt, lora):
        seed = xxh64_intdigest(part.encode("utf-8", "surrogatepass"), seed)
    return seed


def hash_blocks(data: bytes, seed: int) -> list[int]:
    """The chained hash after each whole block of the bytes."""
    blocks = []
    chained = seed
    whole = min(len(data) // BLOCK_BYTES, MAX_BLOCKS) * BLOCK_BYTES
    for (block,) in _cut(memoryview(data)[:whole]):
        chained = xxh64_intdigest(block, chained) & _HASH_BITS
        blocks.append(chained)
    return blocks


def _json(value: Any) -> str:
    return _encode(value).decode()


def _add_part(out: list[str], part: Any) -> None:
    """One part of a message's content: text as it is, media by digest, calls by name and input."""
    if not isinstance(part, dict):
        out.append(part if isinstance(part, str) else _json(part))
        return
    text = part.get("text")
    if isinstance(text, str):
        out.append(text)
        return
    kind = part.get("type")
    # Clients move cache marks along from turn to turn; identifiers are in no prompt.
    rest = {k: v for k, v in part.items() if k not in ("cache_control", "id", "tool_use_id")}
    if isinstance(kind, str) and kind in _MEDIA:
        out += ("\x03", xxh3_128_hexdigest(_encode(rest)))
    elif kind == "tool_result":
        out.append("\x03")
        _add_content(out, part.get("content"))
    else:
        out += ("\x03", _json(rest))


def _add_content(out: list[str], content: Any) -> None:
    if isinstance(content, str):
        out.append(content)
    elif isinstance(content, list):
        for part in content:
            _add_part(out, part)
    elif content is not None:
        _add_part(out, content)


def _add_call(out: list[str], call: Any) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        out += ("\x03", _json(call))
        return
    arguments = function.get("arguments")
    out += ("\x03", str(function.get("name")), "\x04")
    out.append(arguments if isinstance(arguments, str) else _json(arguments))


def _add_message(out: list[str], message: Any) -> None:
    if not isinstance(message, dict):
        _add_part(out, message)
        return
    role, content = message.get("role"), message.get("content")
    if role is None:  # an item of the Responses API: a call, or what it gave
        out.append("\x01")
        _add_part(out, message)
        return
    out += ("\x01", str(role), "\x02")
    name = message.get("name")
    if name is not None:
        out += (str(name), "\x02")
    for field in ("reasoning_content", "reasoning"):
        if isinstance(message.get(field), str):
            out += (message[field], "\x02")
    _add_content(out, content)
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        for call in calls:
            _add_call(out, call)
    elif message.get("function_call") is not None:
        _add_call(out, {"function": message["function_call"]})


def render(request: Mapping[str, Any]) -> bytes:
    """The prompt of a chat, completion, Messages or Responses request as canonical bytes.

    Never fails: what has not the expected shape is written as JSON. Several prompts of one
    completion request stand one after another. Empty for requests without a prompt.
    """
    out: list[str] = []
    if request.get("tools"):
        out.append(_json(request["tools"]))
    for field in _IN_TEMPLATE:
        if request.get(field):
            out += ("\x05", field, "\x02", _json(request[field]))
    for field in ("system", "instructions"):
        if request.get(field):
            out.append("\x01system\x02")
            _add_content(out, request[field])
    messages = request.get("messages")
    if messages is None:
        messages = request.get("input") if "prompt" not in request else None
    if isinstance(messages, list):
        for message in messages:
            if type(message) is dict and len(message) == 2:
                role, content = message.get("role"), message.get("content")
                if type(role) is str and type(content) is str:  # nearly all of them
                    out += ("\x01", role, "\x02", content)
                    continue
            _add_message(out, message)
    elif messages is not None:
        out.append("\x01user\x02")
        _add_content(out, messages)
    prompt = request.get("prompt")
    if prompt is not None:
        _add_prompts(out, prompt)
    return "".join(out).encode("utf-8", "surrogatepass")


def _add_prompts(out: list[str], prompt: Any) -> None:
    if isinstance(prompt, str):
        out.append(prompt)
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        out.append(_json(prompt)[1:-1])  # token ids; a longer list begins as a shorter one does
    elif isinstance(prompt, list):
        for one in prompt:
            out.append("\x01")
            _add_prompts(out, one)
    else:
        out.append(_json(prompt))


def read_prompt(request: Mapping[str, Any], seed: int) -> Prompt:
    """The prompt of a parsed request; `seed` is from `chain_seed`."""
    data = render(request)
    return Prompt(hash_blocks(data, seed), len(data) / BYTES_PER_TOKEN)


def uncached_prompt(size_bytes: int) -> Prompt:
    """Work that no prefix cache saves: embeddings, audio, scores."""
    return Prompt((), size_bytes / BYTES_PER_TOKEN)
