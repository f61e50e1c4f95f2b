"""What a request is answered with: a pure function of the seed, the prompt and the choice's index.

The same request gets the same text on any replica, today and tomorrow. The text is words of three
letters and a space, each of which is exactly one token.

Not here: sampling parameters. Temperature, penalties, logprobs, tools and response formats change
nothing about the text; `cache_salt` and the LoRA adapter do not either.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import shake_128
from typing import Literal

import xxhash

from agent.simulated.tokens import BYTES_PER_TOKEN, Tokens, encode, token_bytes

_WORDS = (
    b"ace act add age aid aim air all and ant any ape apt arc are ark "
    b"arm art ash ask ate awe axe bag bay bed bee big bit boa bow box "
    b"boy bus but buy cab can cap car cat cow cry cub cup cut dad day "
    b"den dew did dig dim dog dot dry due ear eat egg elm end era eve "
    b"eye fan far few fig fin fit fix fly fog for fox fun fur gap gas "
    b"get gem gum has hat hay hen her him his hop hot how hub hue ice "
    b"ink its jam jar jet job joy keg key kit lab lap law lay leg let "
    b"lid lie lip log lot low map mat men met mix mud mug nap net new "
)
_VOCABULARY = tuple(_WORDS[i % 128 * 4 :][:4] for i in range(256))  # indexed by one byte
_LAST_WORD = b"end."
_U64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """When generation ends, besides the text's own end.

    `max_tokens` at least 1. `stop`: strings that end the text, none of them empty. `ignore_eos`:
    go on past the text's own end, to `max_tokens`. `min_tokens`: not to end by itself before.
    """

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    include_stop: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """A complete answer. `text` may be shorter than `tokens`: a stop string is cut off it.

    `stop_reason` is the stop string that ended it, if one did.
    """

    tokens: Tokens[int]
    text: str
    finish_reason: Literal["stop", "length"]
    stop_reason: str | None = None

    def text_between(self, start: int, end: int) -> str:
        """The text that tokens `start` to `end` (exclusive) add."""
        return self.text[start * BYTES_PER_TOKEN : end * BYTES_PER_TOKEN]


NOTHING = Output(array("I"), "", "stop")
"""The answer of a request that generates nothing, as an embedding."""


def generate(
    prompt: Tokens[int], limits: Limits, *, seed: int, choice: int = 0, mean_tokens: int
) -> Output:
    """The answer to `prompt`.

    The text ends by itself after `mean_tokens` / 2 to 3 / 2 tokens, evenly spread over prompts.
    """
    key = xxhash.xxh3_128_digest(token_bytes(prompt), seed=seed & _U64) + choice.to_bytes(4, "big")
    own_end = 1 + mean_tokens // 2 + int.from_bytes(shake_128(key).digest(8), "big") % mean_tokens
    own_end = max(own_end, limits.min_tokens)
    ends_itself = not limits.ignore_eos and own_end <= limits.max_tokens
    length = own_end if ends_itself else limits.max_tokens
    # One digest byte a word: a longer answer begins as the shorter one does.
    words = [_VOCABULARY[byte] for byte in shake_128(key + b"text").digest(length)]
    if ends_itself:
        words[-1] = _LAST_WORD
    text = b"".join(words).decode("ascii")

    stopped = _first_stop(text, limits.stop)
    if stopped is not None:
        start, stop = stopped
        end = start + len(stop)
        tokens = encode(text[: end + -end % BYTES_PER_TOKEN])
        kept = text[: end if limits.include_stop else start]
        return Output(tokens, kept, "stop", stop)
    return Output(encode(text), text, "stop" if ends_itself else "length")


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(start, stop string) of the one completed first; the longest of those completed together."""
    found = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return None
    _, start, stop = min(found)
    return start, stop
