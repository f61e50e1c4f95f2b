"""What a request used, read from its answer on the way through, and what that costs. Pure.

Engines say it themselves: in the body, in the stream's last event, or, where asked, in every event,
so that a stream that breaks off is counted to its last token too. What the router asked for and the
client did not is taken out of the stream again. An engine that says nothing is counted by events.
Not here: who pays (usage.stream), or when bytes come and go (relay).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from router.core.shapes import Said, Usage
from router.core.usage_json import (
    VALUE,
    as_json,
    by_text,
    read_answer,
    running_usage,
    said_in,
    used,
    value_at,
)
from schemas.wire.routing import Price

_RUNNING_USAGE: Final = frozenset({"vllm", "llm-d", "sglang", "dynamo", "simulated"})
"""Engines that know `continuous_usage_stats`."""
_STREAM_OPTIONS: Final = frozenset({"chat", "completions"})
"""Tasks whose streams tell their usage only when asked; the others always do."""

_NAME: Final = b'"usage":'
_AFTER_OTHERS: Final = re.compile(rb',\s*"usage":' + VALUE)
_BEFORE_OTHERS: Final = re.compile(rb'"usage":' + VALUE + rb"\s*,\s*")
_NO_CHOICES: Final = re.compile(rb'"choices":\s*\[\s*\]')
_EVENT: Final = re.compile(rb"(?:\n\n|\r\n\r\n|\r\r)")
_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")
_EVENT_END: Final = b"}\n\n"
_CHOICES: Final = b'"choices":['
_TEXT_EVENTS: Final = {
    "chat": b'"delta":{"',
    "completions": b'"text":"',
    "responses": b'.delta"',
    "messages": b'"content_block_delta"',
}
"""Task -> what stands once in every event that brings text, which is a token or more."""
_NO_MARK: Final = b"\0"
_TAIL_BYTES: Final = 64 * 1024
_WHOLE_BYTES: Final = 1024 * 1024
"""A body up to this size is read as a whole for its usage, a larger one by its tail."""


def cost_nano_usd(price: Price, usage: Usage) -> int:
    """In billionths of a USD, rounded once: whole numbers add up the same in any order."""
    cached = price.input if price.cached_input is None else price.cached_input
    fresh = usage.input_tokens - usage.cached_tokens
    # USD a million tokens are thousands of nano-USD a token.
    return round(
        1000 * (fresh * price.input + usage.cached_tokens * cached)
        + 1000 * usage.output_tokens * price.output
    )


def _data(event: bytes) -> bytes:
    """The data of one event of a stream."""
    if event.startswith(b"data:") and b"\n" not in event and b"\r" not in event:
        return event[5:]
    lines = event.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return b"\n".join(line[5:].lstrip(b" ") for line in lines if line.startswith(b"data:"))


class Reader(Protocol):
    """Sees an answer's body go by. One for each answer."""

    def feed(self, data: bytes, last: bool = False) -> bytes:
        """What the client gets of these bytes; `last`: nothing follows them."""
        ...

    def used(self) -> Usage | None:
        """As far as the engine has said or shown; None where nothing was seen."""
        ...


class BodyReader:
    """An answer that is one JSON document: passed on as it is, and read at its end."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._over = False

    def feed(self, data: bytes, last: bool = False) -> bytes:  # noqa: ARG002 - as Reader
        self._parts.append(data)
        self._size += len(data)
        if self._size > _WHOLE_BYTES:
            self._over = True
            while self._size - len(self._parts[0]) >= _TAIL_BYTES:
                self._size -= len(self._parts.pop(0))
        return data

    def used(self) -> Usage | None:
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        if not self._over:
            answer = read_answer(body)
            said = said_in(answer) if answer is not None else None
            return by_text(body) if said is None else used(said)
        # No string of JSON holds this name with its quotes, so the last one is a key.
        at = body.rfind(_NAME)
        value = value_at(body, at + len(_NAME)) if at >= 0 else None
        return None if value is None else running_usage(value.group())


class StreamReader:
    """A stream of events.

    Args:
        task: of the endpoint: what an event that brings text looks like.
        drop_final: takes the event out that says the usage and nothing else.
        drop_running: takes the usage out of the other events.
        choices: `n` of the request.
        several: there are several answers in it: engines tell the running usage of each by itself.
        note: hears the JSON of the newest `usage`, each time there is one.
    """

    __slots__ = (
        "_by_choice",
        "_choices",
        "_drop_final",
        "_drop_running",
        "_first",
        "_held",
        "_last",
        "_mark",
        "_several",
        "_shown",
        "note",
    )

    def __init__(
        self,
        task: str = "chat",
        *,
        drop_final: bool = False,
        drop_running: bool = False,
        choices: int = 1,
        several: bool = False,
        note: Callable[[bytes], object] = lambda _: None,
    ) -> None:
        self.note = note
        self._mark = _TEXT_EVENTS.get(task, _NO_MARK)
        self._drop_final = drop_final
        self._drop_running = drop_running
        self._choices = choices
        self._several = several
        self._held = b""
        """The beginning of an event whose end has not come."""
        self._first = b""
        self._last = b""
        """The first and last bytes that told of usage."""
        self._by_choice: dict[int, Usage] = {}
        # Every chat begins with an event for each choice that says its role.
        self._shown = -choices if task == "chat" else 0

    def feed(self, data: bytes, last: bool = False) -> bytes:
        if self._held or not data.endswith(b"\n\n"):
            return self._piecewise(data, last)
        at = data.rfind(_NAME)
        if at < 0:
            if not self._last:
                self._shown += data.count(self._mark)
            return data
        value_end = len(data) - 3
        if self._several or data.find(b"\n\n", 0, -2) >= 0 or value_end < at + 8:
            return self._noted(data)
        if not self._first:
            if data[at + 8 : at + 9] != b"{":
                return self._noted(data)
            self._first = data
        # Nearly every call: one event, with its running usage at the end.
        self._last = data
        self.note(data[at + 8 : value_end])
        if not self._drop_running:
            return self._rewritten(data) if self._drop_final else data
        if (
            not data.startswith(b"}}", value_end - 1)
            or data.find(b"},", at, value_end) >= 0
            or not data.startswith(b",", at - 1)
            or data.startswith(b"]", data.find(_CHOICES) + 11)
        ):
            return self._rewritten(data)
        return data[: at - 1] + _EVENT_END

    def _piecewise(self, data: bytes, last: bool) -> bytes:
        """Reads that do not end where an event does. Events are changed as a whole or not at all."""
        whole = self._held + data
        changes = self._drop_final or self._drop_running
        if whole.endswith(_ENDS) or last:
            self._held = b""
        else:
            possible = _ENDS if b"\r" in whole else _ENDS[:1]
            end = max((whole.rfind(e) + len(e) for e in possible if e in whole), default=0)
            self._held, whole = whole[end:], whole[:end]
            if len(self._held) > _WHOLE_BYTES:  # not events at all
                self._drop_final = self._drop_running = False
                whole, self._held = whole + self._held, b""
        out = self._noted(whole) if whole else b""
        return out if changes else data

    def _noted(self, data: bytes) -> bytes:
        """Whole events, read, and without what the client did not ask for."""
        if _NAME not in data:
            if not self._last:
                self._shown += data.count(self._mark)
            return data
        for event in _EVENT.split(data) if b"\r" in data else data.split(b"\n\n"):
            if _NAME not in event:
                if not self._last:
                    self._shown += event.count(self._mark)
            elif self._several:
                self._note_choice(event)
            elif _tells(event):
                self._last = event
                self._first = self._first or event
                self.note(event[event.rfind(_NAME) + len(_NAME) :])
            elif not self._last:
                self._shown += event.count(self._mark)
        if self._drop_final or self._drop_running:
            return self._rewritten(data)
        return data

    def _rewritten(self, data: bytes) -> bytes:
        if _NAME not in data:
            return data
        out = []
        at = 0
        for end in [*(match.end() for match in _EVENT.finditer(data)), len(data)]:
            event, at = data[at:end], end
            if _NAME not in event:
                out.append(event)
            elif _NO_CHOICES.search(event):
                if not self._drop_final:
                    out.append(event)
            elif self._drop_running:
                changed, times = _AFTER_OTHERS.subn(b"", event)
                out.append(changed if times else _BEFORE_OTHERS.sub(b"", event))
            else:
                out.append(event)
        return b"".join(out)

    def _note_choice(self, event: bytes) -> None:
        answer = read_answer(_data(event))
        if answer is None or answer.usage is None:
            return
        self._last = event
        if not answer.choices:  # the final word, of all of them
            self._by_choice = {-1: used(answer.usage)}
        elif -1 not in self._by_choice:
            self._by_choice[answer.choices[0].index] = used(answer.usage)
        self.note(as_json(self._sum()))

    def used(self) -> Usage | None:
        if self._by_choice:
            return self._sum()
        said = _last_word(self._last)
        if said is None:
            return Usage(0, 0, self._shown, estimated=True) if self._shown > 0 else None
        found = used(said)
        if not found.input_tokens and self._first is not self._last:
            # Messages may tell the prompt's tokens at the beginning alone.
            begun = _last_word(self._first)
            if begun is not None:
                first = used(begun)
                found = Usage(first.input_tokens, first.cached_tokens, found.output_tokens)
        return found

    def _sum(self) -> Usage:
        if -1 in self._by_choice:
            return self._by_choice[-1]
        prompts = {index // self._choices: used for index, used in self._by_choice.items()}
        return Usage(
            sum(used.input_tokens for used in prompts.values()),
            sum(used.cached_tokens for used in prompts.values()),
            sum(used.output_tokens for used in self._by_choice.values()),
        )


def _tells(event: bytes) -> bool:
    """Whether its usage is more than null."""
    return event[event.rfind(_NAME) + len(_NAME) :].lstrip().startswith(b"{")


def _last_word(event: bytes) -> Said | None:
    answer = read_answer(_data(event.strip())) if event else None
    return None if answer is None else said_in(answer)


class Metering(NamedTuple):
    """How one request is to be metered."""

    stream_options: bytes | None
    """The value to send in place of the client's; None: the client's own stands."""
    drop_final: bool
    drop_running: bool
    choices: int = 1
    """`n` of the request."""
    several: bool = False
    """More than one answer in one stream: of several choices, or to several prompts."""


UNCHANGED: Final = Metering(None, drop_final=False, drop_running=False)


_ASKED: Final = Metering(b'{"include_usage":true}', drop_final=True, drop_running=True)
_ASKED_RUNNING: Final = _ASKED._replace(
    stream_options=b'{"include_usage":true,"continuous_usage_stats":true}'
)


def metering(task: str, engine: str, request: Mapping[str, Any]) -> Metering:
    """What to ask of the engine so that a stream tells its usage, and what to take out again.

    `request`: the body as parsed.
    """
    if request.get("stream") is not True or task not in _STREAM_OPTIONS:
        return UNCHANGED
    choices = request.get("n") or 1
    prompts = request.get("prompt")
    many = isinstance(prompts, list) and len(prompts) > 1 and not isinstance(prompts[0], int)
    several = many or choices > 1
    if not several and request.get("stream_options") is None:
        return _ASKED_RUNNING if engine in _RUNNING_USAGE else _ASKED
    unchanged = Metering(None, False, False, choices, several) if several else UNCHANGED
    wanted = request.get("stream_options") or {}
    if not isinstance(wanted, dict):
        return unchanged  # the engine will say what is wrong with it
    final, running = bool(wanted.get("include_usage")), bool(wanted.get("continuous_usage_stats"))
    asks = {"include_usage": True}
    if engine in _RUNNING_USAGE:
        asks["continuous_usage_stats"] = True
    if all(wanted.get(name) is True for name in asks):
        return unchanged
    return Metering(
        msgspec.json.encode({**wanted, **asks}),
        drop_final=not final,
        # Engines give the running usage only to those who ask for the final one too.
        drop_running=not (final and running),
        choices=choices,
        several=several,
    )
