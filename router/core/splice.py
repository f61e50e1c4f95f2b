"""Changes top-level values of a JSON body without writing the rest of it anew. Pure.

A client's body goes to an engine byte for byte but for the few values that are the router's to set.
Where a key stands more than once every value of it is replaced: parsers differ in which one counts.
Not here: which values (proxy), or what a body may hold (request).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

import msgspec

_TOKEN: Final = re.compile(
    rb'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+',
    re.DOTALL,
)
_SIMPLE_VALUE: Final = re.compile(
    rb'\s*:\s*("(?:[^"\\]|\\.)*"|\{[^{}"]*(?:"(?:[^"\\]|\\.)*"[^{}"]*)*\}|[^\s{}\[\],:"]+)',
    re.DOTALL,
)
_SMALL_BYTES: Final = 16 * 1024
_BEGINS: Final = re.compile(rb"\s*\{\s*(\})?")


def spans(body: bytes, keys: Collection[str]) -> list[tuple[int, int, str]]:
    """Where the values of these top-level keys stand, in order: (start, end, key).

    The body is valid JSON of an object. Keys are compared as a parser would, escapes undone.
    """
    found: list[tuple[int, int, str]] = []
    depth = 0
    key: str | None = None
    key_next = False
    start = end = 0
    for token in _TOKEN.finditer(body):
        text = token.group()
        if text in (b"{", b"["):
            if depth == 1:
                start = token.start()
            depth += 1
            key_next = depth == 1
        elif text in (b"}", b"]"):
            depth -= 1
            if depth == 1:
                end = token.end()
            elif depth == 0 and key is not None:
                found.append((start, end, key))
        elif depth != 1:
            continue
        elif text == b",":
            if key is not None:
                found.append((start, end, key))
            key, key_next = None, True
        elif text == b":":
            continue
        elif key_next:
            name = msgspec.json.decode(text)
            key, key_next = (name if name in keys else None), False
        else:
            start, end = token.span()
    return found


def _quick_spans(body: bytes, keys: Collection[str]) -> list[tuple[int, int, str]] | None:
    """The same by a search for each key, where that surely finds it; None where it may not."""
    # No letter of a key can be written otherwise, and each key stands in the body just once.
    if b"\\u00" in body:
        return None
    found = []
    for key in keys:
        needle = b'"%b"' % key.encode()
        at = body.find(needle)
        if at < 0 or body.find(needle, at + 1) >= 0:
            return None
        value = _SIMPLE_VALUE.match(body, at + len(needle))
        if value is None:
            return None
        found.append((value.start(1), value.end(1), key))
    found.sort()
    return found


def preceded(body: bytes, members: bytes) -> bytes | None:
    """The same bytes with more members before its own.

    None where the body does not begin as nearly every one does: with its first member, and no space.

    Args:
        body: valid JSON of an object.
        members: `"key":value,` each, none of which the object has.
    """
    if not body.startswith(b'{"'):
        return None
    # A view spares a large body one copy; a small one is copied sooner than a view is made.
    return b"{" + members + (body[1:] if len(body) < _SMALL_BYTES else memoryview(body)[1:])


def spliced(body: bytes, values: Mapping[str, bytes], present: Collection[str]) -> bytes:
    """The same bytes with other values of some top-level keys.

    Args:
        body: valid JSON of an object.
        values: key -> its new value, as JSON.
        present: which of the keys the object has, as a parser sees it. The others are added.
    """
    if not values:
        return body
    there = [key for key in values if key in present]
    if len(there) < len(values):
        begins = _BEGINS.match(body)
        assert begins is not None
        at = body.index(b"{") + 1
        added = b",".join(
            [b'"%b":%b' % (k.encode(), v) for k, v in values.items() if k not in present]
        )
        out = [body[:at], added, b"" if begins.group(1) else b","]
    else:
        at, out = 0, []
    if there:
        found = _quick_spans(body, there)
        for start, end, key in spans(body, there) if found is None else found:
            out += (body[at:start], values[key])
            at = end
    out.append(body[at:])
    return b"".join(out)
