"""The engine's HTTP server: its lifetime, and the endpoints beside the OpenAI API.

    async with running_engine(EngineSettings(...)) as engine:
        engine.url                       # http://127.0.0.1:43817

Not here: signals and flags (command).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from aiohttp import web

from agent.simulated.answers import ApiError
from agent.simulated.engine import Engine
from agent.simulated.faults import FaultPlan
from agent.simulated.inputs import parse
from agent.simulated.metrics import render
from agent.simulated.openai_api import OpenAIApi
from agent.simulated.settings import EngineSettings
from agent.simulated.state import ServerState

_MAX_BODY_BYTES = 64 * 1024 * 1024
_CLOSE_TIMEOUT_S = 0.2  # for handlers that are cancelled; whoever wants to wait drains first
_EXIT_DELAY_S = 0.05  # lets the answer to the request for it go out
# vLLM guards /v1 alone; whoever may not use the engine shall not break it either.
_GUARDED = ("/v1", "/faults")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class SimulatedEngine:
    """A listening engine. `url` has no trailing slash; the OpenAI API is below `url`/v1."""

    def __init__(self, engine: Engine, state: ServerState, url: str) -> None:
        self._engine = engine
        self._state = state
        self.settings = engine.settings
        self.url = url

    @property
    def kv_event_sources(self) -> list[dict[str, Any]]:
        """Resolved ZMQ endpoints, as /kv_event_sources lists them; empty when events are off."""
        publisher = self._engine.publisher
        return [publisher.source] if publisher is not None else []

    @property
    def stats(self) -> dict[str, Any]:
        """What /stats answers."""
        scheduler, state = self._engine.scheduler, self._state
        return {
            "models": list(self.settings.model_names),
            "pid": os.getpid(),
            "uptime_s": round(time.time() - state.started_s, 3),
            "draining": state.draining,
            "requests": state.requests,
            "succeeded": state.succeeded,
            "failed": state.failed,
            "aborted": state.aborted,
            "rejected": scheduler.stats.rejected,
            "in_flight": state.in_flight,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "peak_running": scheduler.stats.peak_running,
            "peak_waiting": scheduler.stats.peak_waiting,
            "prompt_tokens": scheduler.metrics.prompt_tokens,
            "cached_tokens": scheduler.metrics.prompt_tokens_cached,
            "generation_tokens": scheduler.metrics.generation_tokens,
            "blocks_seen": scheduler.stats.blocks_seen,
            "blocks_hit": scheduler.stats.blocks_hit,
            "blocks_cached": scheduler.cache.cached_blocks,
            "blocks_pinned": scheduler.cache.pinned_blocks,
            "faults": dict(state.struck),
        }

    def set_faults(self, plan: FaultPlan) -> None:
        """Replaces what is to go wrong from now on."""
        self._state.faults = plan
        self._engine.scheduler.slow_factor = plan.slow_factor

    async def drain(self, *, timeout_s: float) -> bool:
        """Refuses new requests and waits for those in flight; False when some were left."""
        self._state.draining = True
        if not self._state.in_flight:
            return True
        try:
            await asyncio.wait_for(self._state.idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


@asynccontextmanager
async def running_engine(
    settings: EngineSettings, *, end_process: Callable[[int], None] | None = None
) -> AsyncIterator[SimulatedEngine]:
    """An engine that listens while the context is open; leaving it aborts what is unfinished.

    `end_process` carries out the fault `exit`, which is refused without it.

    Raises:
        OSError: when the address, or an endpoint for KV events, cannot be used.
    """
    engine = Engine(settings)
    state = ServerState(settings.faults, end_process)
    await engine.start()
    app = web.Application(middlewares=[_guard(settings.api_key)], client_max_size=_MAX_BODY_BYTES)
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,  # a client that leaves aborts its request at once
        shutdown_timeout=_CLOSE_TIMEOUT_S,
    )
    simulated = SimulatedEngine(engine, state, url="")
    simulated.set_faults(settings.faults)
    app.add_routes(OpenAIApi(engine, state).routes())
    app.add_routes(_Operations(simulated, engine, state).routes())
    try:
        await runner.setup()
        await web.TCPSite(runner, settings.host, settings.port, backlog=4096).start()
        simulated.url = _url(settings.host, runner.addresses[0][1])
        yield simulated
    finally:
        await runner.cleanup()
        await engine.close()


class _Operations:
    """Health, metrics, statistics, faults and the rest of what vLLM has besides the API."""

    def __init__(self, simulated: SimulatedEngine, engine: Engine, state: ServerState) -> None:
        self._simulated = simulated
        self._engine = engine
        self._state = state
        self._started_at = time.time()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.get("/version", self.version),
            web.get("/metrics", self.metrics),
            web.get("/stats", self.stats),
            web.get("/handed_out", self.handed_out),
            web.get("/kv_event_sources", self.kv_event_sources),
            web.post("/reset_prefix_cache", self.reset_prefix_cache),
            web.get("/faults", self.faults),
            web.post("/faults", self.change_faults),
            web.delete("/faults", self.reset_faults),
        ]

    async def health(self, request: web.Request) -> web.Response:  # noqa: ARG002 - a handler
        status = self._state.faults.health_status or (503 if self._engine.failed else 200)
        return web.Response(status=status)

    async def version(self, request: web.Request) -> web.Response:  # noqa: ARG002 - a handler
        try:
            own = version("detoserve")
        except PackageNotFoundError:  # run from a source tree that is not installed
            own = "0"
        return web.json_response({"version": f"{own}+simulated"})

    async def metrics(self, request: web.Request) -> web.Response:  # noqa: ARG002 - a handler
        settings = self._engine.settings
        page = render(
            self._engine.scheduler.metrics,
            self._engine.gauges,
            model_name=settings.served_model_names[0],
            cache_config={
                "block_size": settings.block_size,
                "num_gpu_blocks": settings.num_blocks,
                "kv_cache_size_tokens": settings.kv_cache_tokens,
            },
            started_at=self._started_at,
        )
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body=page.encode(), headers={"Content-Type": content_type})

    async def stats(self, request: web.Request) -> web.Response:  # noqa: ARG002 - a handler
        return web.json_response(self._simulated.stats)

    async def handed_out(self, request: web.Request) -> web.Response:  # noqa: ARG002 - a handler
        """X-Request-Id -> tokens of prompt, answer and cache that its answer has told of."""
        return web.json_response(self._state.handed)

    async def kv_event_sources(self, request: web.Request) -> web.Response:  # noqa: ARG002
        return web.json_response(self._simulated.kv_event_sources)

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:  # noqa: ARG002
        # vLLM answers 200 with an empty body whether or not blocks were in use.
        self._engine.scheduler.reset_prefix_cache()
        return web.Response()

    async def faults(self, request: web.Request) -> web.Response:  # noqa: ARG002 - a handler
        return web.json_response(msgspec.structs.asdict(self._state.faults))

    async def reset_faults(self, request: web.Request) -> web.Response:
        self._simulated.set_faults(FaultPlan())
        return await self.faults(request)

    async def change_faults(self, request: web.Request) -> web.Response:
        """Sets the fields that are given and leaves the others."""
        changes = parse(await request.read(), dict[str, Any])
        try:
            plan = self._state.faults.merged(changes)
        except msgspec.ValidationError as error:
            raise ApiError(400, f"faults: {error}", kind="Bad Request") from error
        if plan.exit is not None:
            if self._state.end_process is None:
                raise ApiError(400, "exit needs an engine in a process of its own", param="exit")
            asyncio.get_running_loop().call_later(_EXIT_DELAY_S, self._state.end_process, plan.exit)
        self._simulated.set_faults(plan)
        return await self.faults(request)


def _guard(api_key: str | None) -> Any:
    """A middleware: the key, if there is one, and errors in the API's shape."""
    expected = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if expected is not None and request.path.startswith(_GUARDED):
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            given = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
            if scheme.lower() != "bearer" or not hmac.compare_digest(given, expected):
                return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except ApiError as error:
            return _error(error)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return _error(ApiError(error.status, error.reason, kind=error.reason))

    return guard


def _error(error: ApiError) -> web.Response:
    response = web.Response(status=error.status, body=error.body, content_type="application/json")
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response


def _url(host: str, port: int) -> str:
    """Where this machine reaches a listener on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
