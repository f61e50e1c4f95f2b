"""What operators connect to: /metrics, /status, and health once more, on a listener of their own.

Not here: what clients see (server).
"""

from __future__ import annotations

import time
from time import perf_counter
from typing import Any

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from router.build import is_compiled, version_name
from router.core.pick import effective_policy
from router.server import health, ready
from router.state import RouterState
from router.telemetry.metrics import Metrics


def _json(payload: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=payload if isinstance(payload, bytes) else orjson.dumps(payload),
        status=status,
        content_type="application/json",
        headers={"Server": "detoserve"},
    )


class Admin:
    """The handler of the private listener."""

    def __init__(self, state: RouterState, metrics: Metrics, router_id: str) -> None:
        self._state = state
        self._metrics = metrics
        self._router_id = router_id

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        if request.method != "GET":
            return _json({"error": f"{path} answers GET only"}, 405)
        if path == "/health":
            status, body = health()
            return _json(body, status)
        if path == "/ready":
            status, body = ready(self._state)
            return _json(body, status)
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
            "version": version_name(),
            "compiled": is_compiled(),
            "draining": state.draining,
            "in_flight": state.in_flight.total,
            "generation": 0,
        }
        snapshot = state.snapshot
        if snapshot is None:
            return out
        load = state.in_flight.by_replica
        breakers, now = state.breakers, perf_counter()
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
