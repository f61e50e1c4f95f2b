"""One request, from the client's bytes to the engine's answer.

Authenticate, read, resolve, pick, send; again elsewhere if it failed before the first byte. The
decisions are core's; the bytes of the answer go by relay. Not here: listening (server).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Final, cast

import msgspec
from aiohttp import web

from router.brain import Brain, Sent
from router.client import SENT, SENT_AND_CLOSE, ClientConnection, refuse
from router.core import errors
from router.core.admission import admit
from router.core.api import Endpoint
from router.core.auth import Principal, authenticate
from router.core.blocks import Prompt
from router.core.errors import Refusal, Refused
from router.core.headers import ClientHeaders
from router.core.headers import read as read_headers
from router.core.health import Breaker, Failure, kept_out
from router.core.inflate import EncodingInvalid, inflate
from router.core.pick import available, by_weight, pick
from router.core.request import BodyInvalid, read_form, read_json, with_model
from router.core.retries import attempts, is_retryable
from router.core.snapshot import Candidate, Snapshot
from router.records import RequestRecord
from router.relay import STATUS_LINES, ClientGone, Framing, Relay
from router.settings import Settings
from router.state import RouterState
from router.upstream.connection import (
    ConnectFailed,
    Connection,
    ResponseHead,
    UpstreamFailed,
    UpstreamTimeout,
)
from router.upstream.pool import Pool
from schemas.wire.routing import Function, Tenant

if TYPE_CHECKING:
    from router.tracing import Tracing

_LOOKED_AT_BYTES: Final = 4096
"""Of a 500's body, to tell an engine that drains from one that fails."""
_REST_S: Final = 0.25
"""How long a replica is spared that is full and does not say for how long."""
_log: Final = logging.getLogger(__name__)
_FALL_BACK_ON: Final = frozenset({"no_replica", "at_capacity", "upstream_failed"})
_PLAIN: Final = frozenset({b"", b"identity"})
_ENCODINGS: Final = _PLAIN | {b"gzip", b"deflate"}


class _Call(msgspec.Struct):
    """What every attempt of one request shares."""

    request: web.BaseRequest
    client: ClientConnection
    endpoint: Endpoint
    headers: ClientHeaders
    snapshot: Snapshot
    function: Function
    candidates: tuple[Candidate, ...]
    body: bytes
    record: RequestRecord
    prompt: Prompt | None
    """What routing knows of the body; None where the policy does not ask."""
    has_fallback: bool
    """Another function will be asked if this one cannot answer."""


def _answers(function: Function, endpoint: Endpoint) -> bool:
    return not function.tasks or endpoint.task in function.tasks


def _meant(snapshot: Snapshot, tenant: Tenant, endpoint: Endpoint, model: str | None) -> Function:
    """The function that a request is for.

    Raises:
        Refused: the tenant has no such model, or it does not answer here.
        BodyInvalid: no model is named, and it is not clear which is meant.
    """
    if model is None:
        mine = snapshot.models(tenant) if endpoint.model_optional else ()
        answering = [function for function in mine if _answers(function, endpoint)]
        if len(answering) != 1:
            raise BodyInvalid("it must name a `model`", "model")
        return answering[0]
    function = snapshot.resolve(tenant, model)
    if function is None:
        raise Refused(errors.model_not_found(model[:200]))
    if not _answers(function, endpoint):
        raise Refused(errors.task_not_supported(function.name, endpoint.path))
    return function


@contextmanager
def _trying(breaker: Breaker) -> Iterator[None]:
    breaker.trying = True
    try:
        yield
    finally:
        breaker.trying = False


_NO_TRIAL: Final = nullcontext()
_UNCOUNTED: Final = nullcontext()
_EVENTS: Final = b"text/event-stream"


class Proxy:
    """Serves the endpoints that engines answer. `finished` hears of every request once."""

    def __init__(
        self,
        state: RouterState,
        settings: Settings,
        finished: Callable[[RequestRecord], None],
        brain: Brain,
        tracing: Tracing | None = None,
    ) -> None:
        self._state = state
        self._brain = brain
        self._tracing = tracing
        self._settings = settings
        self._finished = finished
        self._loop = asyncio.get_running_loop()

    def authenticate(
        self, request: web.BaseRequest, record: RequestRecord
    ) -> tuple[Snapshot, ClientHeaders, Principal]:
        """Who asks, by the table of this moment.

        Raises:
            Refused: with the answer.
        """
        snapshot = self._state.snapshot
        if snapshot is None:
            raise Refused(errors.NO_TABLE)
        record.generation = snapshot.generation
        headers = read_headers(request.raw_headers)
        if isinstance(headers, Refusal):
            raise Refused(headers)
        if headers.request_id is not None:
            record.id = headers.request_id.decode("ascii")
        principal = authenticate(snapshot, headers.token, time.time(), self._state.fresh_at)
        if isinstance(principal, Refusal):
            raise Refused(principal)
        record.tenant = principal.tenant.name
        record.key = principal.key.id
        return snapshot, headers, principal

    async def serve(self, request: web.BaseRequest, endpoint: Endpoint) -> web.StreamResponse:
        """Answers one request, whatever becomes of it."""
        record = self.record(request, endpoint.operation)
        try:
            with self._state.in_flight.request():
                return await self._serve(request, endpoint, record)
        except Refused as refused:
            return self.refuse(refused.refusal, record)
        except (asyncio.CancelledError, ClientGone):
            record.outcome = "client_gone"
            raise
        finally:
            record.ended = perf_counter()
            self._finished(record)

    def record(self, request: web.BaseRequest, operation: str) -> RequestRecord:
        """A new record with ids of its own."""
        decision = f"{self._state.chance.getrandbits(64):016x}"
        record = RequestRecord(
            path=request.raw_path,
            operation=operation,
            started=perf_counter(),
            id=f"req_{decision}",
            decision=decision,
        )
        if self._tracing is not None:
            record.trace = self._tracing.begin(request, record)
        return record

    def refuse(self, refusal: Refusal, record: RequestRecord) -> web.Response:
        """The router's own answer, noted in the record."""
        record.status = refusal.status
        record.code = refusal.code
        if not record.attempts:
            record.outcome = "refused"
        elif refusal.status == 504:
            record.outcome = "timeout"
        else:
            record.outcome = "upstream_error"
        return refuse(refusal, record.id, close=self._state.draining)

    async def _serve(
        self, request: web.BaseRequest, endpoint: Endpoint, record: RequestRecord
    ) -> web.StreamResponse:
        snapshot, headers, principal = self.authenticate(request, record)
        refusal = admit(self._state.in_flight.total - 1, self._settings.max_in_flight)
        if refusal is not None:
            raise Refused(refusal)
        body = await self._read(request, headers)
        record.request_bytes = len(body)
        if endpoint.stored:
            return await self._ask_keeper(
                request, endpoint, record, snapshot, headers, principal, body
            )
        model: str | None
        try:
            if endpoint.multipart:
                model, span = read_form(body, headers.content_type.decode("latin-1"))
            else:
                model, span = read_json(body), None
            function = _meant(snapshot, principal.tenant, endpoint, model)
        except BodyInvalid as error:
            raise Refused(errors.bad_json(str(error), param=error.param)) from None
        functions = [function]
        for name in function.fallbacks:
            fallback = snapshot.functions.get(name)
            # A fallback is no way to a model that the tenant may not use.
            if (
                fallback is not None
                and snapshot.may_use(principal.tenant, fallback)
                and _answers(fallback, endpoint)
            ):
                functions.append(fallback)
        while True:
            function = functions.pop(0)
            record.function = function.name
            sent = body
            if model is not None and model != function.served_name:
                sent = (
                    with_model(body, function.served_name)
                    if span is None
                    else body[: span[0]] + function.served_name.encode() + body[span[1] :]
                )
            call = _Call(
                request=request,
                client=cast("ClientConnection", request.protocol),
                endpoint=endpoint,
                headers=headers,
                snapshot=snapshot,
                function=function,
                candidates=snapshot.candidates(function, principal.tenant),
                body=sent,
                record=record,
                prompt=self._brain.prompt(function, endpoint, body),
                has_fallback=bool(functions),
            )
            try:
                return await self._attempt(call)
            except Refused as refused:
                if not functions or refused.refusal.code not in _FALL_BACK_ON:
                    raise

    async def _ask_keeper(
        self,
        request: web.BaseRequest,
        endpoint: Endpoint,
        record: RequestRecord,
        snapshot: Snapshot,
        headers: ClientHeaders,
        principal: Principal,
        body: bytes,
    ) -> web.StreamResponse:
        """Passes on a request about something that an engine keeps for this tenant alone."""
        keepers = [
            (function, candidate)
            for function in snapshot.models(principal.tenant)
            if _answers(function, endpoint)
            for candidate in snapshot.candidates(function, principal.tenant)
            if candidate.dedicated
        ]
        if len(keepers) != 1:
            raise Refused(errors.nothing_stored(request.raw_path.partition("?")[0][:300]))
        function, keeper = keepers[0]
        record.function = function.name
        return await self._attempt(
            _Call(
                request=request,
                client=cast("ClientConnection", request.protocol),
                endpoint=endpoint,
                headers=headers,
                snapshot=snapshot,
                function=function,
                candidates=(keeper,),
                body=body,
                record=record,
                prompt=None,
                has_fallback=False,
            )
        )

    async def _read(self, request: web.BaseRequest, headers: ClientHeaders) -> bytes:
        """The whole body, decoded.

        Raises:
            Refused: too large, too slow, or in an encoding that is not understood.
        """
        limit = self._settings.max_body_bytes
        content = request.content
        if headers.encoding not in _ENCODINGS:
            raise Refused(errors.UNSUPPORTED_ENCODING)
        try:
            if content.is_eof():
                body = content.read_nowait()
                if len(body) > limit:
                    raise Refused(errors.too_large(limit))
                return (
                    body
                    if headers.encoding in _PLAIN
                    else await self._plain(body, headers.encoding)
                )
            if request.content_length is not None and request.content_length > limit:
                raise Refused(errors.too_large(limit))
            if headers.expects_continue and request.transport:
                request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            parts: list[bytes] = []
            size = 0
            while True:
                async with asyncio.timeout(self._settings.body_timeout_s):
                    part = await content.readany()
                if not part:
                    body = b"".join(parts)
                    return (
                        body
                        if headers.encoding in _PLAIN
                        else await self._plain(body, headers.encoding)
                    )
                size += len(part)
                if size > limit:
                    raise Refused(errors.too_large(limit))
                parts.append(part)
        except TimeoutError:
            raise Refused(errors.BODY_TIMEOUT) from None
        except web.RequestPayloadError:
            raise Refused(errors.bad_json("it cannot be decoded")) from None

    async def _plain(self, body: bytes, encoding: bytes) -> bytes:
        """The decoded body. A bomb costs no more than the largest body, and holds up nobody."""
        limit = self._settings.max_body_bytes
        parts: list[bytes] = []
        size = 0
        try:
            for part in inflate(encoding, body):
                size += len(part)
                if size > limit:
                    raise Refused(errors.too_large(limit))
                parts.append(part)
                await asyncio.sleep(0)
        except EncodingInvalid as error:
            raise Refused(errors.bad_json(f"as {encoding.decode()}, {error}")) from None
        return b"".join(parts)

    def _choose(self, call: _Call, tried: set[str]) -> tuple[Candidate, Sent | None] | None:
        """A replica for one attempt, and how to count it where the policy weighs what it holds."""
        state = self._state
        function = state.function(call.function.name)
        load = state.in_flight.by_replica
        ejected = kept_out(call.candidates, state.breakers, self._loop.time())
        pool = available(call.candidates, load, without=tried, ejected=ejected)
        arm = by_weight(pool, state.chance) if len(pool) > 1 else pool
        if arm and call.prompt is not None:
            return self._brain.choose(arm, call.function, call.prompt, state.chance)
        found = pick(arm, call.function.policy.name, load, function.turn, state.chance)
        return None if found is None else (found, None)

    async def _attempt(self, call: _Call) -> web.StreamResponse:
        """Sends the request until an answer begins or there is nowhere left to send it."""
        policy, record = call.function.policy, call.record
        function = self._state.function(call.function.name)
        function.turn += 1
        function.budget.request(self._loop.time())
        left = attempts(policy)
        tried: set[str] = set()

        def another() -> tuple[Candidate, Sent | None] | None:
            """A replica for one more attempt, if it may be made at all."""
            if not left:
                return None
            found = self._choose(call, tried)
            if found is None or not function.budget.spend(
                self._loop.time(), policy.retry_budget_percent
            ):
                return None
            return found

        chosen = self._choose(call, tried)
        if chosen is None:
            if call.candidates:
                raise Refused(errors.at_capacity(call.function.name))
            raise Refused(errors.no_replica(call.function.name))
        while True:
            candidate, counted = chosen
            left -= 1
            tried.add(candidate.id)
            record.attempts += 1
            record.replica = candidate.id
            replica = candidate.id
            with (
                self._state.in_flight.slot(replica),
                self._trial(replica),
                counted if counted is not None else _UNCOUNTED,
            ):
                pool = self._state.pool(candidate)
                connection: Connection | None = None
                relay: Relay | None = None
                if record.trace is not None:
                    record.trace.attempt(candidate, record)
                try:
                    try:
                        connection, relay, head = await self._exchange(call, candidate, pool)
                    except UpstreamFailed as error:
                        self._blame(replica, error)
                        if record.trace is not None:
                            record.trace.failed(error)
                        too_late = isinstance(error, UpstreamTimeout) and error.phase != "connect"
                        chosen = None if too_late else another()
                        if chosen is None:
                            raise Refused(self._why(call, error)) from None
                        continue
                    body = await relay.body_start(_LOOKED_AT_BYTES) if head.status == 500 else b""
                    if is_retryable(head.status, body):
                        self._rest(replica, head)
                        alternative = another()
                        if alternative is not None:
                            chosen = alternative
                            continue
                        if call.has_fallback:
                            raise Refused(errors.at_capacity(call.function.name))
                    elif head.status < 500:
                        self._state.recovered(replica)
                    if counted is not None:
                        counted.first_token(streamed=head.content_type.startswith(_EVENTS))
                    return await self._deliver(call, candidate, relay, head)
                finally:
                    if relay is not None:
                        relay.close()
                        self._note(record, relay)
                    if connection is not None:
                        pool.give_back(connection)
                    if record.trace is not None:
                        record.trace.attempt_ended(relay)

    def _trial(self, replica: str) -> AbstractContextManager[None]:
        """Around a request that a half-open breaker lets through: it is the only one."""
        breaker = self._state.breakers.get(replica)
        if breaker is None or breaker.state(self._loop.time()) != "half-open":
            return _NO_TRIAL
        return _trying(breaker)

    def _blame(self, replica: str, error: UpstreamFailed) -> None:
        """A failure that is the replica's fault."""
        kind: Failure = "failed"
        if isinstance(error, ConnectFailed):
            kind = "refused"
        elif isinstance(error, UpstreamTimeout):
            kind = "timeout"
        breaker, now = self._state.breaker(replica), self._loop.time()
        before = breaker.state(now)
        breaker.failed(now, kind)
        if before == "closed" and breaker.state(now) == "open":
            _log.warning("replica %s is kept out: %s", replica, error)

    def _rest(self, replica: str, head: ResponseHead) -> None:
        """It answered that it takes no more: for how long, it says itself or is guessed."""
        breaker, now = self._state.breaker(replica), self._loop.time()
        if head.status == 500:
            breaker.failed(now, "refused")  # it shuts down
            return
        text = head.retry_after or b""
        breaker.asked_for_rest(now, float(text) if text.isdigit() else _REST_S)

    async def _exchange(
        self, call: _Call, candidate: Candidate, pool: Pool
    ) -> tuple[Connection, Relay, ResponseHead]:
        """Sends the request to one replica and waits for the head of its answer.

        Raises:
            UpstreamFailed: nothing of an answer came.
        """
        policy = call.function.policy
        head = self._head(call, candidate)
        while True:
            connection = pool.take()
            if connection is None:
                began = self._loop.time()
                connection = await pool.connect(policy.connect_timeout_s)
                self._brain.connected(candidate, self._loop.time() - began)
            relay = Relay(
                self._loop,
                connection,
                first_byte_timeout_s=policy.first_byte_timeout_s,
                between_chunks_timeout_s=policy.between_chunks_timeout_s,
                client_stall_timeout_s=self._settings.client_stall_timeout_s,
            )
            if not call.record.dispatched:
                call.record.dispatched = perf_counter()
            connection.send(head, call.body, relay)
            try:
                return connection, relay, await relay.answered()
            except UpstreamFailed as error:
                relay.close()
                connection.close()
                # The engine closed it while it was idle: that says nothing about the engine.
                if not error.stale:
                    raise
            except BaseException:
                relay.close()
                connection.close()
                raise

    def _head(self, call: _Call, candidate: Candidate) -> bytes:
        path = call.request.raw_path
        if candidate.api_path != "/v1" and path.startswith("/v1/"):
            path = candidate.api_path + path[3:]
        lines, trace = call.headers.lines, call.record.trace
        if trace is not None:
            lines = trace.passed_on(lines)
        return b"".join(
            (
                call.request.method.encode("ascii"),
                b" ",
                candidate.base_path.encode(),
                path.encode("utf-8", "surrogateescape"),
                b" HTTP/1.1\r\nHost: ",
                candidate.host_header,
                b"\r\nContent-Length: %d\r\nX-Request-Id: " % len(call.body),
                call.record.id.encode(),
                b"\r\n",
                *lines,
                b"\r\n",
            )
        )

    def _why(self, call: _Call, error: UpstreamFailed) -> Refusal:
        if isinstance(error, UpstreamTimeout) and error.phase == "first-byte":
            return errors.upstream_timeout(call.function.name, error.waited_s)
        return errors.upstream_failed(call.function.name)

    async def _deliver(
        self, call: _Call, candidate: Candidate, relay: Relay, head: ResponseHead
    ) -> web.StreamResponse:
        """Passes the answer on, to its end."""
        record, client = call.record, call.client
        modern = call.request.version >= (1, 1)
        framing: Framing
        if head.status in (204, 304):
            framing, frame = "none", b""
        elif head.length is not None:
            framing, frame = "length", b"Content-Length: %d\r\n" % head.length
        elif modern:
            framing, frame = "chunked", b"Transfer-Encoding: chunked\r\n"
        else:
            framing, frame = "close", b""
        keep = call.request.keep_alive and modern and not self._state.draining
        record.status = head.status
        if head.status >= 400:
            record.outcome = "upstream_error" if head.status >= 500 else "client_error"
        again = b""
        if head.status in (429, 503) and head.retry_after is None:
            again = b"Retry-After: 1\r\n"
        lines = b"".join(
            (
                STATUS_LINES.get(head.status) or b"HTTP/1.1 %d \r\n" % head.status,
                head.headers,
                candidate.route_header,
                record.decision.encode(),
                b"\r\nx-request-id: ",
                record.id.encode(),
                b"\r\n",
                again,
                frame,
                b"\r\n" if keep else b"Connection: close\r\n\r\n",
            )
        )
        transport = client.transport
        if transport is None:
            raise ClientGone("the client left before the answer")
        client.relay = relay
        if client.writing_paused:
            relay.pause()
        try:
            await relay.deliver(transport, lines, framing)
        except UpstreamFailed as error:
            self._blame(candidate.id, error)
            record.outcome = "timeout" if isinstance(error, UpstreamTimeout) else "interrupted"
            # A stream that ended with an error event is complete; to close its connection would
            # break the request that the client may be sending on it already.
            if not relay.complete:
                return SENT_AND_CLOSE
        finally:
            client.relay = None
        return SENT if keep and framing != "close" else SENT_AND_CLOSE

    @staticmethod
    def _note(record: RequestRecord, relay: Relay) -> None:
        record.response_bytes = relay.sent_bytes
        record.first_body = relay.first_body_at
        record.last_body = relay.last_at
        record.chunks = relay.chunks
