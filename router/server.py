"""What clients and operators connect to: dispatch by path, and the router's own answers.

Not here: requests that go to an engine (proxy), or the life of the process (app).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from router.core import errors
from router.core.api import MODEL_PREFIX, OWN, PASSED, methods_of, stored
from router.core.errors import Refused
from router.core.pick import effective_policy
from router.metrics import Metrics
from router.openapi import document
from router.proxy import Proxy
from router.records import RequestRecord
from router.state import RouterState
from router.turns import Turns
from schemas.wire.routing import Function

_OPENAPI: Final = orjson.dumps(document())


def _json(payload: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=payload if isinstance(payload, bytes) else orjson.dumps(payload),
        status=status,
        content_type="application/json",
        headers={"Server": "detoserve"},
    )


def health(_: RouterState) -> web.Response:
    """The process lives; nothing is said of tables or engines."""
    return _json({"status": "ok"})


def ready(state: RouterState) -> web.Response:
    """Whether to send clients here: a table that keys can be checked with, and not on its way out."""
    table = state.snapshot
    if state.draining:
        reason = "draining"
    elif table is None:
        reason = "no routing table yet"
    elif time.time() - state.fresh_at > table.table.max_table_age_s:
        reason = "the routing table is too old"
    else:
        return _json({"status": "ready", "generation": table.generation})
    return _json({"status": "not ready", "reason": reason}, 503)


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

    def __init__(
        self, state: RouterState, proxy: Proxy, finished: Callable[[RequestRecord], None]
    ) -> None:
        self._state = state
        self._proxy = proxy
        self._finished = finished
        self._turns = Turns()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        endpoint = PASSED.get(path)
        if endpoint is None or request.method != "POST":
            endpoint = stored(request.method, path)
        if endpoint is not None:
            turn = self._turns.take()
            if turn is not None:
                await turn
            return await self._proxy.serve(request, endpoint)
        record = self._proxy.record(request, "")
        try:
            return self._own(request, path, record)
        except Refused as refused:
            return self._proxy.refuse(refused.refusal, record)
        finally:
            record.ended = time.perf_counter()
            self._finished(record)

    def _own(
        self, request: web.BaseRequest, path: str, record: RequestRecord
    ) -> web.StreamResponse:
        method, allowed = request.method, methods_of(path)
        if not allowed:
            raise Refused(errors.unknown_url(method, path[:200]))
        if method not in allowed:
            raise Refused(errors.method_not_allowed(method, path[:200], allowed))
        if method != "GET":
            raise Refused(
                errors.nothing_stored(path[:200])
            )  # no id that an engine could have given
        if path == "/health":
            response = health(self._state)
        elif path == "/ready":
            response = ready(self._state)
        elif path == "/openapi.json":
            response = _json(_OPENAPI)
        elif path == "/v1/models":
            response = self._models(request, record)
        else:
            response = self._one_model(request, record, unquote(path[len(MODEL_PREFIX) :]))
        record.status = response.status
        record.operation = path if path in OWN else "model"
        if self._state.draining:
            response.force_close()
        return response

    def _models(self, request: web.BaseRequest, record: RequestRecord) -> web.Response:
        snapshot, _, principal = self._proxy.authenticate(request, record)
        created = int(snapshot.table.published_at)
        listed: dict[str, dict[str, Any]] = {}
        for function in snapshot.models(principal.tenant):
            for name in (function.name, function.served_name, *function.aliases):
                if name not in listed and snapshot.resolve(principal.tenant, name) is function:
                    listed[name] = _model(function, name, created)
        return _json({"object": "list", "data": list(listed.values())})

    def _one_model(
        self, request: web.BaseRequest, record: RequestRecord, name: str
    ) -> web.Response:
        snapshot, _, principal = self._proxy.authenticate(request, record)
        function = snapshot.resolve(principal.tenant, name)
        if function is None:
            raise Refused(errors.model_not_found(name[:200]))
        return _json(_model(function, name, int(snapshot.table.published_at)))


class Admin:
    """The handler of the private listener: /metrics, /status, and health once more."""

    def __init__(self, state: RouterState, metrics: Metrics, router_id: str) -> None:
        self._state = state
        self._metrics = metrics
        self._router_id = router_id

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        if request.method != "GET":
            return _json({"error": f"{path} answers GET only"}, 405)
        if path == "/health":
            return health(self._state)
        if path == "/ready":
            return ready(self._state)
        if path == "/metrics":
            return web.Response(
                body=generate_latest(self._metrics.registry),
                headers={"Content-Type": CONTENT_TYPE_LATEST},
            )
        if path == "/status":
            return _json(self._status())
        return _json({"error": "there are /health, /ready, /metrics and /status"}, 404)

    def _status(self) -> dict[str, Any]:
        """What this router serves, without secrets: no keys, no tenants' limits."""
        state = self._state
        out: dict[str, Any] = {
            "id": self._router_id,
            "draining": state.draining,
            "in_flight": state.in_flight.total,
            "generation": 0,
        }
        snapshot = state.snapshot
        if snapshot is None:
            return out
        load = state.in_flight.by_replica
        breakers, now = state.breakers, asyncio.get_running_loop().time()
        table = snapshot.table
        out |= {
            "generation": table.generation,
            "revision": table.revision,
            "published_at": table.published_at,
            "age_s": round(max(0.0, time.time() - state.fresh_at), 3),
            "max_table_age_s": table.max_table_age_s,
            "unusable": list(snapshot.unusable),
            "tenants": len(table.tenants),
            "functions": {
                function.name: {
                    "policy": function.policy.name,
                    "effective_policy": effective_policy(function.policy.name),
                    "aliases": list(function.aliases),
                    "served_name": function.served_name,
                }
                for function in table.functions
            },
            "replicas": {
                candidate.id: {
                    "function": candidate.function,
                    "deployment": candidate.deployment,
                    "cluster": candidate.cluster,
                    "state": "draining" if candidate.draining else "ready",
                    "in_flight": load.get(candidate.id, 0),
                    "breaker": breakers[candidate.id].state(now)
                    if candidate.id in breakers
                    else "closed",
                }
                for candidate in snapshot.replicas.values()
            },
        }
        gone = {
            replica: count for replica, count in load.items() if replica not in snapshot.replicas
        }
        if gone:
            out["departed"] = gone
        return out
