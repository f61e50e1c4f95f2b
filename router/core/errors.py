"""Refusals: every answer the router makes up itself, in OpenAI's error shape.

Not here: sending them (server), or errors of an engine, which pass through untouched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served, as the client is told it."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None
    allow: tuple[str, ...] = ()
    """Methods that the path does answer."""
    retry: bool = False
    """Whether the same request may succeed if it is sent again (`x-should-retry`)."""
    more_headers: tuple[tuple[str, str], ...] = ()
    elsewhere: bool = False
    """Whether a function that the refusing one falls back on may answer."""

    def body(self) -> bytes:
        """JSON of `{"error": {message, type, param, code}}`."""
        return json.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            },
            separators=(",", ":"),
        ).encode()

    def headers(self) -> dict[str, str]:
        """`x-should-retry`, and what the status obliges to."""
        out = {"x-should-retry": "true" if self.retry else "false"}
        if self.retry_after_s is not None:
            out["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.allow:
            out["Allow"] = ", ".join(self.allow)
        out.update(self.more_headers)
        if self.status == 401:
            out["WWW-Authenticate"] = "Bearer"
        return out


class Refused(Exception):
    """Ends a request with the router's own answer."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


def bad_request(
    message: str, *, param: str | None = None, code: str = "invalid_request"
) -> Refusal:
    return Refusal(400, message, "invalid_request_error", code, param)


def bad_json(detail: str, *, param: str | None = None) -> Refusal:
    """`detail` says what is wrong and at which byte or field; it never quotes the body."""
    return bad_request(
        f"The body is not what this endpoint takes: {detail}.", param=param, code="invalid_json"
    )


INVALID_API_KEY = Refusal(
    401,
    "Incorrect API key provided. Send a key that is valid now as `Authorization: Bearer <key>`.",
    "invalid_request_error",
    "invalid_api_key",
)


def too_many_failures(retry_after_s: float) -> Refusal:
    return Refusal(
        429,
        "Too many requests with a wrong API key came from this address.",
        "invalid_request_error",
        "too_many_auth_failures",
        retry_after_s=retry_after_s,
    )


INSUFFICIENT_SCOPE = Refusal(
    403, "This API key may not run models.", "permission_error", "insufficient_scope"
)

NOT_FOR_USAGE = Refusal(
    403, "This API key may not read usage.", "permission_error", "insufficient_scope"
)

USAGE_UNKNOWN = Refusal(
    503,
    "What was used this month is not known here yet.",
    "server_error",
    "usage_unknown",
    retry_after_s=5,
    retry=True,
)

NOT_FOR_DEBUGGING = Refusal(
    403,
    "`x-detoserve-replica` needs an API key with the scope `debug`.",
    "permission_error",
    "insufficient_scope",
)

TENANT_SUSPENDED = Refusal(
    403,
    "This account is suspended; ask whoever runs this service.",
    "permission_error",
    "tenant_suspended",
)

TABLE_STALE = Refusal(
    503,
    "API keys cannot be checked now: the router's table is too old to be trusted.",
    "server_error",
    "routing_table_stale",
    retry_after_s=5,
    retry=True,
)

NO_TABLE = Refusal(
    503,
    "The router has no routing table yet.",
    "server_error",
    "not_ready",
    retry_after_s=1,
    retry=True,
)


def model_not_found(model: str) -> Refusal:
    """The same bytes whether the model does not exist or is another tenant's."""
    return Refusal(
        404,
        f"The model `{model}` does not exist or you do not have access to it.",
        "invalid_request_error",
        "model_not_found",
        "model",
    )


def replica_not_found(replica: str, model: str) -> Refusal:
    """For whoever may debug: the replica is not there, drains, or serves others."""
    return Refusal(
        404,
        f"`{replica}` is no replica of `{model}` that takes requests of this account.",
        "invalid_request_error",
        "replica_not_found",
    )


def task_not_supported(model: str, path: str) -> Refusal:
    return bad_request(
        f"The model `{model}` does not answer {path}.", param="model", code="unsupported_endpoint"
    )


def nothing_stored(path: str) -> Refusal:
    return Refusal(
        404,
        f"Nothing is stored for you at {path}. What engines store can be reached where exactly one "
        "replica serves your account alone.",
        "invalid_request_error",
        "not_found",
    )


def unknown_url(method: str, path: str) -> Refusal:
    return Refusal(
        404,
        f"Unknown request URL: {method} {path}. /openapi.json lists what there is.",
        "invalid_request_error",
        "unknown_url",
    )


def method_not_allowed(method: str, path: str, allowed: Iterable[str]) -> Refusal:
    return Refusal(
        405,
        f"{path} does not answer {method}.",
        "invalid_request_error",
        "method_not_allowed",
        allow=tuple(sorted(allowed)),
    )


def too_large(limit_bytes: int) -> Refusal:
    return Refusal(
        413,
        f"The body is larger than {limit_bytes} bytes.",
        "invalid_request_error",
        "request_too_large",
    )


BODY_TIMEOUT = Refusal(
    408,
    "The body of the request did not arrive in time.",
    "invalid_request_error",
    "request_timeout",
    retry=True,
)

UNSUPPORTED_ENCODING = Refusal(
    415,
    "The body's Content-Encoding is not one of gzip, deflate or none.",
    "invalid_request_error",
    "unsupported_content_encoding",
)


def no_replica(model: str) -> Refusal:
    return Refusal(
        503,
        f"No replica of `{model}` can take the request now.",
        "server_error",
        "no_replica",
        retry_after_s=2,
        retry=True,
        elsewhere=True,
    )


def at_capacity(model: str) -> Refusal:
    return Refusal(
        503,
        f"Every replica of `{model}` is full.",
        "server_error",
        "at_capacity",
        retry_after_s=1,
        retry=True,
        elsewhere=True,
    )


def would_wait_too_long(model: str, retry_after_s: float) -> Refusal:
    """It would not be sent in time, so that it need not wait to hear it."""
    return Refusal(
        503,
        f"Every replica of `{model}` is full, and too many requests wait.",
        "server_error",
        "at_capacity",
        retry_after_s=retry_after_s,
        retry=True,
        elsewhere=True,
    )


def waited_in_vain(model: str, waited_s: float) -> Refusal:
    return Refusal(
        503,
        f"No replica of `{model}` had room for the request within {waited_s:g} s.",
        "server_error",
        "at_capacity",
        retry_after_s=1,
        retry=True,
        elsewhere=True,
    )


ROUTER_FULL = Refusal(
    503,
    "The router has as many requests as it may carry.",
    "server_error",
    "router_full",
    retry_after_s=1,
    retry=True,
)


def upstream_failed(model: str) -> Refusal:
    return Refusal(
        502,
        f"The replica of `{model}` failed before it answered.",
        "server_error",
        "upstream_failed",
        retry=True,
        elsewhere=True,
    )


def upstream_timeout(model: str, waited_s: float) -> Refusal:
    """Not to be retried at once: what took too long would take as long again."""
    return Refusal(
        504,
        f"The replica of `{model}` did not begin its answer within {waited_s:g} s.",
        "server_error",
        "upstream_timeout",
    )


def died_mid_stream() -> Refusal:
    """Not an answer but an event in one that had begun."""
    return Refusal(
        502,
        "The replica failed while it was answering; what came before is incomplete.",
        "server_error",
        "stream_interrupted",
    )
