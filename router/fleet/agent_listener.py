"""Where agents without Redis post their reports: a listener of its own, which knows nothing else.

What counts is passed on to Redis, where there is one, so that other routers hear of it too: the next
router must not believe an agent less for having asked another. Reports are signed; TLS, here or in
front, keeps them to themselves. Not here: whether a POST is to be believed
(core.agent_auth), or what a report does (core.engine_reports).
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from aiohttp import web
from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.core.agent_auth import AgentGate, AgentKeys, AgentRefused, replicas_of
from router.fleet.engine_watch import ReportReader
from router.settings import Settings, SettingsInvalid
from schemas.wire import agent_signature, redis_keys
from schemas.wire.events import VERSION, AgentAnswer, AgentPost, EngineReport
from schemas.wire.routing import RoutingTable

_log: Final = logging.getLogger(__name__)

_REPORT_TTL_MS: Final = 15_000
_HEARTBEAT_TTL_MS: Final = 30_000
_MIN_KEY_BYTES: Final = 32
_MAX_REPORTS: Final = 10_000


def read_keys(file: Path) -> AgentKeys:
    """Keys from a file, one a line; lines that begin with # are for people.

    Raises:
        SettingsInvalid: it cannot be read, or a key is too short to be one.
    """
    try:
        lines = [line.strip() for line in file.read_bytes().splitlines()]
    except OSError as error:
        raise SettingsInvalid(f"agent_keys_file: {error}") from None
    keys = [line for line in lines if line and not line.startswith(b"#")]
    for number, line in enumerate(lines, 1):
        if line in keys and len(line) < _MIN_KEY_BYTES:
            raise SettingsInvalid(
                f"agent_keys_file: {file}:{number}: a key has {_MIN_KEY_BYTES} characters or more, "
                "as `openssl rand -hex 32` prints"
            )
    return AgentKeys(keys)


def tls_of(settings: Settings) -> ssl.SSLContext | None:
    """What the port speaks TLS with; None where it does not.

    Raises:
        SettingsInvalid: certificate and key cannot be read, or do not belong together.
    """
    if settings.agent_tls_cert_file is None or settings.agent_tls_key_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.agent_tls_cert_file, settings.agent_tls_key_file)
    except (OSError, ssl.SSLError) as error:
        raise SettingsInvalid(f"agent_tls_cert_file: {error}") from None
    return context


class AgentListener:
    """The handler of POST /agent/v1/report. `table` is the one served from, if there is one."""

    def __init__(
        self,
        keys: AgentKeys,
        table: Callable[[], RoutingTable | None],
        reader: ReportReader,
        redis: Redis | None,
    ) -> None:
        self._gate = AgentGate(keys)
        self._table = table
        self._reader = reader
        self._redis = redis
        self._decode = msgspec.msgpack.Decoder(AgentPost).decode
        self.refused: dict[str, int] = {}
        """Reason -> POSTs that counted for nothing."""

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        if request.raw_path != agent_signature.PATH:
            return _text(404, f"there is POST {agent_signature.PATH}")
        if request.method != "POST":
            return _text(405, "POST only")
        body = await _body(request)
        if body is None:
            return _text(413, f"a report has at most {agent_signature.MAX_BODY_BYTES} bytes")
        table = self._table()
        if table is None:
            return _text(503, "no routing table yet")
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            cluster = self._gate.check(headers, body, table, time.time())
        except AgentRefused as refused:
            return self._refuse(401, str(refused))
        try:
            post = self._decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._refuse(400, "unreadable")
        if post.version != VERSION:
            return self._refuse(400, f"version {post.version}; this router reads {VERSION}")
        if len(post.reports) > _MAX_REPORTS:
            return self._refuse(400, f"more than {_MAX_REPORTS} reports")
        answer = await self._take(cluster, post, replicas_of(table, cluster))
        return web.Response(body=msgspec.msgpack.encode(answer), content_type="application/msgpack")

    async def _take(self, cluster: str, post: AgentPost, mine: dict[str, str]) -> AgentAnswer:
        refused: dict[str, str] = {}
        believed: list[EngineReport] = []
        # Named after its cluster: an agent of one cannot speak with the voice of another's.
        agent = f"{cluster}/{post.heartbeat.id}"
        for said in post.reports:
            report = msgspec.structs.replace(said, agent=agent)
            if report.replica not in mine:
                refused[report.replica] = "no replica of this cluster"
            elif reason := self._reader.take(report):
                refused[report.replica] = reason
            else:
                believed.append(report)
        await self._pass_on(agent, post, believed)
        return AgentAnswer(replicas=mine, refused=refused)

    async def _pass_on(self, agent: str, post: AgentPost, believed: list[EngineReport]) -> None:
        if self._redis is None:
            return
        heartbeat = msgspec.structs.replace(post.heartbeat, id=agent)
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(redis_keys.agent(agent), msgspec.msgpack.encode(heartbeat), px=_HEARTBEAT_TTL_MS)
        for report in believed:
            data = msgspec.msgpack.encode(report)
            pipe.set(redis_keys.engine(report.replica), data, px=_REPORT_TTL_MS)
            pipe.publish(redis_keys.ENGINES_CHANNEL, data)
        try:
            await pipe.execute()
        except (RedisError, OSError, TimeoutError) as error:
            # This router has heard it; the others hear the next one.
            _log.warning("an agent's report is not passed on: Redis: %s", type(error).__name__)

    def _refuse(self, status: int, reason: str) -> web.Response:
        self.refused[reason] = self.refused.get(reason, 0) + 1
        return _text(status, reason)


async def _body(request: web.BaseRequest) -> bytes | None:
    """All of it; None when it is over the limit."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > agent_signature.MAX_BODY_BYTES:
            return None
    return bytes(body)


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text + "\n", headers={"Server": "detoserve"})
