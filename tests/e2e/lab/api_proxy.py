"""Between a reconciler and SkyPilot's API server: sees every call, and tells at which point it is."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

STAGES = ("sent", "taken", "answered")
"""sent: the server has not got it. taken: the reconciler has no answer. answered: it has."""


class ApiProxy:
    """`at(stage, call, service)` is asked at every stage; True: the reconciler was killed there.

    `call` is the path; for `/api/get` with that of the request whose result is asked for:
    `/api/get /serve/up`. `service` is empty where a call is about none. Calls of one kind that change
    something go one at a time, and none that came before a kill goes after it: so each kill leaves the
    other services as they were.
    """

    def __init__(self, upstream: str, at: Callable[[str, str, str], bool]) -> None:
        self._upstream = upstream
        self._at = at
        self._requests: dict[str, tuple[str, str]] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._kills = 0
        self.taken: Counter[tuple[str, str]] = Counter()
        """(call, service) -> how many the server got."""
        self.url = ""

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        call, service = self._named(request, body)
        if not call.startswith("/serve/") or call == "/serve/status":
            return await self._answer(request, body, call, service)
        kills = self._kills
        async with self._turns[call]:
            if self._kills != kills:
                return self._cut(request)
            return await self._answer(request, body, call, service)

    def _killed(self, stage: str, call: str, service: str) -> bool:
        killed = self._at(stage, call, service)
        self._kills += killed
        return killed

    async def _answer(
        self, request: web.Request, body: bytes, call: str, service: str
    ) -> web.StreamResponse:
        if self._killed("sent", call, service):
            return self._cut(request)
        headers = {k: v for k, v in request.headers.items() if k.lower() != "host"}
        timeout = aiohttp.ClientTimeout(180)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(
                request.method, self._upstream + request.path_qs, data=body, headers=headers
            ) as answer,
        ):
            data = await answer.read()
            request_id = answer.headers.get("X-Skypilot-Request-ID")
        self.taken[call, service] += 1
        if request_id:
            self._requests[request_id] = (call, service)
        if self._killed("taken", call, service):
            return self._cut(request)
        passed = {"X-Skypilot-Request-ID": request_id} if request_id else {}
        response = web.Response(
            status=answer.status, body=data, content_type="application/json", headers=passed
        )
        try:
            await response.prepare(request)
            await response.write_eof()
        except ConnectionError:
            return response  # whoever asked was killed meanwhile
        self._killed("answered", call, service)
        return response

    def _named(self, request: web.Request, body: bytes) -> tuple[str, str]:
        if request.path == "/api/get":
            call, service = self._requests.get(request.query["request_id"], ("", ""))
            return f"/api/get {call}", service
        said = json.loads(body) if body else {}
        names = said.get("service_names") or [said.get("service_name", "")]
        return request.path, names[0]

    def _cut(self, request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()


@asynccontextmanager
async def api_proxy(upstream: str, at: Callable[[str, str, str], bool]) -> AsyncIterator[ApiProxy]:
    proxy = ApiProxy(upstream, at)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", proxy._pass_on)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        proxy.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield proxy
    finally:
        await runner.cleanup()
