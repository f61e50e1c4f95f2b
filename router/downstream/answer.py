"""The router's own answers as bytes.

Not here: an engine's answers, which pass through (relay).
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from router.core.errors import Refusal

STATUS_LINES: Final[dict[int, bytes]] = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_NO_HEADERS: Final[Mapping[str, str]] = {}


def answer(
    status: int,
    body: bytes,
    *,
    headers: Mapping[str, str] = _NO_HEADERS,
    close: bool = False,
    bodiless: bool = False,
) -> bytes:
    """Head and body, in JSON. `bodiless`: the head alone, as HEAD asks for."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    head = (
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"Server: detoserve\r\n{lines}{'Connection: close' if close else 'Connection: keep-alive'}\r\n\r\n"
    )
    return STATUS_LINES[status] + head.encode("latin-1") + (b"" if bodiless else body)


def refuse(
    refusal: Refusal, request_id: str, *, close: bool = False, bodiless: bool = False
) -> bytes:
    """The answer to a request that is not passed on."""
    headers = {"x-request-id": request_id, **refusal.headers()}
    return answer(refusal.status, refusal.body(), headers=headers, close=close, bodiless=bodiless)
