"""What clients connect to: dispatch by path, and the router's own answers.

Not here: requests that go to an engine (exchange), operators' pages (admin), or the life of the
process (app).
"""

from __future__ import annotations

import time
from typing import Any, Final
from urllib.parse import unquote

import orjson

from router.core import errors
from router.core.api import MODEL_PREFIX, OWN, PASSED, SESSION_PREFIX, methods_of, stored
from router.core.errors import Refusal, Refused, too_large
from router.core.sessions import session_key
from router.downstream.answer import answer, refuse
from router.downstream.connection import ClientConnection
from router.downstream.request import Request
from router.exchange import Exchange
from router.openapi import document
from router.proxy import Proxy
from router.records import RequestRecord
from router.state import RouterState
from schemas.wire.routing import Function

_OPENAPI: Final = orjson.dumps(document())
_OK: Final = b'{"status":"ok"}'


def health() -> tuple[int, bytes]:
    """The process lives; nothing is said of tables or engines."""
    return 200, _OK


def ready(state: RouterState) -> tuple[int, bytes]:
    """Whether to send clients here: a table that keys can be checked with, and not on its way out."""
    table = state.snapshot
    if state.draining:
        reason = "draining"
    elif table is None:
        reason = "no routing table yet"
    elif time.time() - state.fresh_at > table.table.max_table_age_s:
        reason = "the routing table is too old"
    else:
        return 200, orjson.dumps({"status": "ready", "generation": table.generation})
    return 503, orjson.dumps({"status": "not ready", "reason": reason})


def _model(function: Function, name: str, created: int) -> dict[str, Any]:
    out: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "detoserve",
        "root": function.name,
    }
    if function.max_model_len is not None:
        out["max_model_len"] = function.max_model_len
    return out


class Api:
    """The handler of the public listener."""

    def __init__(self, proxy: Proxy) -> None:
        self._state = proxy.state
        self._proxy = proxy

    def serve(self, request: Request, client: ClientConnection) -> None:
        """Answers one request, now or later."""
        endpoint = PASSED.get(request.path)
        if endpoint is None or request.method != "POST":
            endpoint = stored(request.method, request.path)
        if endpoint is not None:
            record = self._proxy.record(request, endpoint.operation)
            Exchange(self._proxy, self._state, request, client, endpoint, record).begin()
            return
        record = self._proxy.record(request, "")
        keep = request.keep_alive and not self._state.draining
        bodiless = request.method == "HEAD"
        try:
            status, body = self._own(request, record)
            record.status = status
            out = answer(status, body, close=not keep, bodiless=bodiless)
        except Refused as refused:
            self._proxy.refused(refused.refusal, record)
            out = refuse(refused.refusal, record.id, close=not keep, bodiless=bodiless)
        self._proxy.over(record)
        if client.transport is not None:
            client.transport.write(out)
        client.done(keep=keep)

    def look_at_head(self, request: Request) -> Refusal | bool:
        """Whoever has no key need not send a body, and must not fill memory with it."""
        proxy, limit = self._proxy, self._proxy.settings.max_body_bytes
        # Once its body is there the request has a record of its own: two would be two traces.
        record = proxy.record(request, "", traced=False)
        try:
            _, headers, _ = proxy.authenticate(request, record)
            if headers.length is not None and headers.length > limit:
                raise Refused(too_large(limit))  # noqa: TRY301 - turned away like the others
        except Refused as refused:
            proxy.trace(request, record)
            proxy.refused(refused.refusal, record)
            proxy.over(record)
            return refused.refusal
        return headers.expects_continue

    def _own(self, request: Request, record: RequestRecord) -> tuple[int, bytes]:
        method, path = request.method, request.path
        allowed = methods_of(path)
        if not allowed:
            raise Refused(errors.unknown_url(method, path[:200]))
        if method not in allowed:
            raise Refused(errors.method_not_allowed(method, path[:200], allowed))
        if path.startswith(SESSION_PREFIX):
            record.operation = "end_session"
            return self._end_session(request, record, unquote(path[len(SESSION_PREFIX) :]))
        if method != "GET":
            raise Refused(
                errors.nothing_stored(path[:200])
            )  # no id that an engine could have given
        record.operation = path if path in OWN else "model"
        if path == "/health":
            return health()
        if path == "/ready":
            return ready(self._state)
        if path == "/openapi.json":
            return 200, _OPENAPI
        if path == "/v1/models":
            return self._models(request, record)
        if path == "/v1/usage":
            return self._usage(request, record)
        return self._one_model(request, record, unquote(path[len(MODEL_PREFIX) :]))

    def _models(self, request: Request, record: RequestRecord) -> tuple[int, bytes]:
        snapshot, _, principal = self._proxy.authenticate(request, record)
        created = int(snapshot.table.published_at)
        listed: dict[str, dict[str, Any]] = {}
        for function in snapshot.models(principal.tenant):
            for name in (function.name, function.served_name, *function.aliases):
                if name not in listed and snapshot.resolve(principal.tenant, name) is function:
                    listed[name] = _model(function, name, created)
        return 200, orjson.dumps({"object": "list", "data": list(listed.values())})

    def _usage(self, request: Request, record: RequestRecord) -> tuple[int, bytes]:
        _, _, principal = self._proxy.authenticate(request, record, scope="usage")
        used = self._proxy.usage_months.of(principal.tenant.name)
        if used is None:
            raise Refused(errors.USAGE_UNKNOWN)
        return 200, orjson.dumps(used)

    def _one_model(self, request: Request, record: RequestRecord, name: str) -> tuple[int, bytes]:
        snapshot, _, principal = self._proxy.authenticate(request, record)
        function = snapshot.resolve(principal.tenant, name)
        if function is None:
            raise Refused(errors.model_not_found(name[:200]))
        return 200, orjson.dumps(_model(function, name, int(snapshot.table.published_at)))

    def _end_session(self, request: Request, record: RequestRecord, name: str) -> tuple[int, bytes]:
        """Forgotten for every function that the tenant may use; whether it was known is not told."""
        snapshot, _, principal = self._proxy.authenticate(request, record)
        sessions = self._proxy.sessions
        for function in snapshot.models(principal.tenant):
            key = session_key(
                sessions.secret,
                principal.tenant.name,
                function.name,
                name.encode("utf-8", "surrogatepass"),
            )
            sessions.release(key)
        return 200, orjson.dumps({"object": "session.deleted", "deleted": True})
