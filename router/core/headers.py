"""Which of a client's headers an engine gets to see, and what the router reads of them.

Everything passes but what concerns one hop only, what says who the client is (identity comes from
the key alone), and what the router sets itself. Pure; one pass over the headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Literal

from router.core.errors import Refusal, bad_request
from router.core.snapshot import Principal

_Use = Literal[
    "pass",
    "drop",
    "authorization",
    "key",
    "request-id",
    "content-type",
    "connection",
    "encoding",
    "expect",
    "length",
    "coding",
    "session",
    "session-final",
    "replica",
]

_READ: Final[dict[bytes, _Use]] = {
    b"authorization": "authorization",
    b"x-api-key": "key",
    b"api-key": "key",
    b"x-request-id": "request-id",
    b"content-type": "content-type",
    b"connection": "connection",
    # The body is decoded and complete when it is passed on.
    b"content-encoding": "encoding",
    b"expect": "expect",
    b"content-length": "length",
    b"transfer-encoding": "coding",
    b"x-session-id": "session",
    b"x-session-final": "session-final",
    b"x-detoserve-replica": "replica",
}
_DROPPED: Final = re.compile(
    rb"keep-alive|te|trailers?|upgrade|proxy-.*|host"
    # Engines answer without compression, so that an error event can be added to a stream.
    rb"|accept-encoding|http2-settings"
    # Whoever says who he is without a key.
    rb"|cookie|forwarded|x-forwarded-.*|x-real-ip|x-client-.*|true-client-ip|cf-.*|remote-.*|from"
    rb"|x-(?:remote|auth|authenticated|consumer|credential|user|tenant|team|org|organization"
    rb"|account|customer|identity|principal|goog|amzn|ms|envoy|ssl|b3)(?:-.*)?"
    rb"|openai-(?:organization|project)|x-detoserve-.*|gcp-.*|metadata(?:-flavor)?"
)
_REQUEST_ID: Final = re.compile(rb"[\w.:/=+-]{1,128}", re.ASCII)
_MAX_KNOWN: Final = 4096
_known: dict[bytes, _Use] = {}


def _use(name: bytes) -> _Use:
    lower = name.lower()
    use = _READ.get(lower) or ("drop" if _DROPPED.fullmatch(lower) else "pass")
    # CGI-like servers read X_User as X-User.
    if use == "pass" and b"_" in lower:
        dashed = lower.replace(b"_", b"-")
        use = "drop" if dashed in _READ or _DROPPED.fullmatch(dashed) else "pass"
    if len(_known) < _MAX_KNOWN:
        _known[name] = use
    return use


class ClientHeaders:
    """What the router read, and what is passed on."""

    passed: bytes = b""
    """`name: value` lines, each with its line end."""
    token: bytes | None = None
    request_id: bytes | None = None
    content_type: bytes = b""
    encoding: bytes = b""
    """Of the body, in lower case."""
    expects_continue: bool = False
    length: int | None = None
    """Of the body as it is sent."""
    coding: bytes | None = None
    """Transfer-Encoding."""
    session: bytes | None = None
    """What the client calls its conversation."""
    session_final: bool = False
    """This is the conversation's last request."""
    replica: bytes | None = None
    """The one that somebody who debugs wants to be asked."""
    identified_by: int = -1
    """The generation of the table by which it was seen whose the token is."""
    principal: Principal | None = None


def read(raw: Iterable[tuple[bytes, bytes]]) -> ClientHeaders | Refusal:
    """One pass. A refusal when credentials are given twice and it is not clear which count."""
    lines: list[bytes] = []
    out = ClientHeaders()
    named: bytes = b""
    for name, value in raw:
        use = _known.get(name) or _use(name)
        if use == "pass":
            lines.append(b"%b: %b\r\n" % (name, value))
        elif use == "authorization":
            if out.token is not None:
                return _TWICE
            scheme, _, token = value.partition(b" ")
            out.token = token.strip() if scheme.lower() == b"bearer" else b""
        elif use == "key":
            if out.token is not None:
                return _TWICE
            out.token = value.strip()
        elif use == "request-id":
            out.request_id = value if _REQUEST_ID.fullmatch(value) else None
        elif use == "content-type":
            out.content_type = value
            lines.append(b"%b: %b\r\n" % (name, value))
        elif use == "encoding":
            out.encoding = value.strip().lower()
        elif use == "length":
            out.length = int(value)  # llhttp has let only digits through
        elif use == "coding":
            if out.coding is not None or value.strip().lower() != b"chunked":
                return _CODING
            out.coding = b"chunked"
        elif use == "expect":
            out.expects_continue = value.strip().lower() == b"100-continue"
        elif use == "session":
            out.session = value.strip()
            lines.append(b"%b: %b\r\n" % (name, value))
        elif use == "session-final":
            out.session_final = value.strip().lower() not in (b"", b"0", b"false")
        elif use == "replica":
            out.replica = value.strip() or None
        elif use == "connection":
            named += value.lower() + b","
    if named and named not in (b"keep-alive,", b"close,"):
        hops = {hop.strip() for hop in named.split(b",")}
        lines = [line for line in lines if line.partition(b":")[0].lower() not in hops]
    out.passed = b"".join(lines)
    return out


_CODING: Final = bad_request(
    "The request is not valid HTTP/1.1: the one Transfer-Encoding is chunked.", code="invalid_http"
)
_TWICE: Final = bad_request("Credentials are given more than once.", code="ambiguous_credentials")
