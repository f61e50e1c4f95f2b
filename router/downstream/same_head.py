"""A head that was sent before, told by its bytes alone.

Most clients send one head with every request, but for the length of the body, and on every connection
that they open. What llhttp made of it once it would make of it again, whatever digits that length has:
so it is not asked.
Pure. Not here: the first reading of a head, and any request that does not come whole in one read
(connection).
"""

from __future__ import annotations

from typing import Final, Self

from router.downstream.request import Request

_MOST_DIGITS: Final = 10
_MOST_KNOWN: Final = 256
_LONGEST: Final = 4096
"""Bytes before the length, of a head that other connections are to know."""
_LENGTH: Final = b"ength: "


class SameHead:
    """The head of a request that was read before, in two parts: what is before and after the length."""

    __slots__ = ("_after", "_digits_at", "_request", "before")

    def __init__(self, before: bytes, after: bytes, request: Request) -> None:
        self.before = before
        self._after = after
        self._digits_at = len(before)
        self._request = request

    @classmethod
    def of(cls, data: bytes, request: Request) -> Self | None:
        """To know this request's head by, if `data` is all of the request and tells its length."""
        lengths = [h for h in request.headers if h[0].lower() == b"content-length"]
        head_end = data.find(b"\r\n\r\n") + 4
        if len(lengths) != 1 or not request.modern or len(data) - head_end != len(request.body):
            return None
        name, value = lengths[0]
        line = b"\r\n%b: %b\r\n" % (name, value)
        at = data.find(line, 0, head_end)
        if at < 0 or not value.isdigit() or int(value) != len(request.body):
            return None
        digits_at = at + len(line) - 2 - len(value)
        # Not the request itself: its body would stay in memory.
        kept = request.again(b"")
        return cls(data[:digits_at], data[digits_at + len(value) : head_end], kept)

    def again(self, data: bytes, max_body_bytes: int) -> Request | None:
        """The request, if this is all of one with the same head; None: to be read like any other.

        Its headers are the first one's, whose length they tell: go by the body.
        """
        if not data.startswith(self.before):
            return None
        digits_at = self._digits_at
        digits_end = data.find(b"\r", digits_at, digits_at + _MOST_DIGITS + 1)
        if digits_end < 0:
            return None
        digits = data[digits_at:digits_end]
        if not digits.isdigit() or not data.startswith(self._after, digits_end):
            return None
        body = data[digits_end + len(self._after) :]
        if len(body) != int(digits) or len(body) > max_body_bytes:
            return None
        return self._request.again(body)


class KnownHeads:
    """Heads that came by any connection, for the first requests of others; the newest of them."""

    def __init__(self) -> None:
        self._known: dict[bytes, SameHead] = {}
        """By what is before the length."""

    def add(self, head: SameHead) -> None:
        known, before = self._known, head.before
        if len(before) <= _LONGEST:
            known.pop(before, None)
            known[before] = head
            if len(known) > _MOST_KNOWN:
                del known[next(iter(known))]

    def find(self, data: bytes) -> SameHead | None:
        """One that `data` may begin with."""
        at = data.find(_LENGTH, 0, _LONGEST)
        return self._known.get(data[: at + len(_LENGTH)]) if at >= 0 else None
