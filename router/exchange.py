"""One request, from its last byte read to the end of its answer, as a state machine.

Nothing waits in the common case: a request is authenticated, routed and written to an engine in the
call that read it, and the answer's bytes go on in the calls that read them. Only what must wait (a
new connection, a body to inflate) is a task. However a request ends, `_end` gives back all that it
held. The decisions are core's; the bytes go by relay. Not here: listening (downstream).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine, Mapping, Sequence
from time import perf_counter
from types import MappingProxyType
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from router.brain import Sent
from router.conversation import Conversation
from router.core import errors
from router.core.api import Endpoint
from router.core.arms import by_session, is_shadowed
from router.core.auth import Principal
from router.core.blocks import Prompt
from router.core.errors import Refusal, Refused
from router.core.headers import ClientHeaders
from router.core.health import Breaker, Failure, kept_out
from router.core.inflate import EncodingInvalid, inflate
from router.core.isolation import SALTED_ENGINES, SALTED_TASKS, cache_salt
from router.core.limits import estimated
from router.core.pick import available, full, pick
from router.core.record import Seen
from router.core.request import BodyInvalid, read_form, read_json
from router.core.retries import is_retryable
from router.core.snapshot import Candidate, Snapshot
from router.core.splice import spans, spliced
from router.core.usage import UNCHANGED, Metering
from router.downstream.answer import STATUS_LINES, refuse
from router.downstream.connection import ClientConnection, where
from router.downstream.request import Request
from router.limiter import Admission
from router.meter import Metered
from router.proxy import Proxy, answers, meant
from router.queue import Place
from router.records import RequestRecord
from router.relay import Framing, Relay
from router.state import FunctionState, RouterState
from router.upstream.connection import (
    ConnectFailed,
    Connection,
    ResponseHead,
    UpstreamFailed,
    UpstreamTimeout,
)
from router.upstream.pool import Pool
from schemas.wire.routing import Function

_log: Final = logging.getLogger(__name__)
_LOOKED_AT_BYTES: Final = 4096
"""Of a 500's body, to tell an engine that drains from one that fails."""
_REST_S: Final = 0.25
"""How long a replica is spared that is full and does not say for how long."""
_FALL_BACK_ON: Final = frozenset({"no_replica", "at_capacity", "upstream_failed"})
_PLAIN: Final = frozenset({b"", b"identity"})
_ENCODINGS: Final = _PLAIN | {b"gzip", b"deflate"}
_EVENTS: Final = b"text/event-stream"


_json: Final = msgspec.json.Encoder().encode
_UNPARSED: Final[Mapping[str, Any]] = MappingProxyType({})
_LATER: Final[Any] = None
"""Set before it is read."""


class Exchange(msgspec.Struct, eq=False):
    """A request and its answer. `begin` starts it; the client's connection is told of its end.

    A struct for its speed alone: one is made for every request.
    """

    _proxy: Proxy
    _state: RouterState
    _request: Request
    _client: ClientConnection
    _endpoint: Endpoint
    record: RequestRecord
    _over: bool = False

    # Who asks for what:
    _snapshot: Snapshot = _LATER
    _headers: ClientHeaders = _LATER
    _principal: Principal = _LATER
    _body: bytes = b""
    _parsed: Mapping[str, Any] = _UNPARSED
    _model: str | None = None
    _span: tuple[int, int] | None = None
    """Where the model's name stands in a form."""
    _functions: list[Function] = []
    """To be asked if the ones before cannot answer."""

    # What it used:
    _metering: Metering = UNCHANGED
    _metered: Metered | None = None
    _judged: Sent | None = None
    """The last attempt, once there was one: its engine's word on the prompt is held against it."""
    _settled: bool = False

    # Of the function that is asked:
    _function: Function = _LATER
    _counts: FunctionState = _LATER
    _admission: Admission | None = None
    """Under limits, where there are any."""
    _place: Place | None = None
    """In the queue of its function, where it had to wait."""
    _candidates: Sequence[Candidate] = ()
    _conversation: Conversation | None = None
    _sent_body: bytes = b""
    _salt: str = ""
    """Of the tenant, for caches of prompts."""
    _prompt: Prompt | None = None
    """What routing knows of the body; None where the policy does not ask."""
    _left: int = 0
    _tried: list[str] = []
    _task: asyncio.Task[None] | None = None

    # Of the running attempt:
    _candidate: Candidate = _LATER
    _seen: Seen | None = None
    """What it was chosen from, where that is recorded and not yet noted."""
    _sent: Sent | None = None
    _breaker: Breaker | None = None
    """Half open: this request is its one trial."""
    _pool: Pool | None = None
    _connection: Connection | None = None
    _relay: Relay | None = None
    _delivering: bool = False
    """The client has some of the answer: there is no other any more."""
    _keep: bool = False

    # The client's side.

    def begin(self) -> None:
        """Answers, or sends it on; what follows comes as calls."""
        self._state.in_flight.total += 1
        self._client.ongoing = self
        try:
            self._read()
        except Refused as refused:
            self._refuse(refused.refusal)

    def client_left(self) -> None:
        """Nobody is there to write to: ends the exchange before the engine's next bytes are read."""
        self.record.outcome = "client_gone"
        self._listen_on()
        self._end(keep=False)

    def pause(self) -> None:
        if self._relay is not None:
            self._relay.pause()

    def resume(self) -> None:
        if self._relay is not None:
            self._relay.resume()

    # From the body to the function that is meant.

    def _read(self) -> None:
        proxy = self._proxy
        self._snapshot, self._headers, self._principal = proxy.authenticate(
            self._request, self.record
        )
        most = proxy.settings.max_in_flight
        if most and self._state.in_flight.total > most:
            raise Refused(errors.ROUTER_FULL)
        self._body = self._request.body
        encoding = self._headers.encoding
        if encoding in _PLAIN:
            self._resolve()
        elif encoding in _ENCODINGS:
            self._later(self._inflate())
        else:
            raise Refused(errors.UNSUPPORTED_ENCODING)

    async def _inflate(self) -> None:
        """A bomb costs no more than the largest body, and holds up nobody."""
        limit = self._proxy.settings.max_body_bytes
        encoding = self._headers.encoding
        parts: list[bytes] = []
        size = 0
        try:
            for part in inflate(encoding, self._body):
                size += len(part)
                if size > limit:
                    raise Refused(errors.too_large(limit))
                parts.append(part)
                await asyncio.sleep(0)
        except EncodingInvalid as error:
            raise Refused(errors.bad_json(f"as {encoding.decode()}, {error}")) from None
        self._body = b"".join(parts)
        self._resolve()

    def _resolve(self) -> None:
        """Which function is meant, and which may answer in its place."""
        endpoint, snapshot, body = self._endpoint, self._snapshot, self._body
        tenant = self._principal.tenant
        self.record.request_bytes = len(body)
        if endpoint.stored:
            self._ask_keeper()
            return
        try:
            if endpoint.multipart:
                self._model, self._span = read_form(
                    body, self._headers.content_type.decode("latin-1")
                )
            else:
                self._model, self._parsed = read_json(body)
            function = meant(snapshot, tenant, endpoint, self._model)
        except BodyInvalid as error:
            raise Refused(errors.bad_json(str(error), param=error.param)) from None
        self._functions = [function]
        for name in function.fallbacks:
            fallback = snapshot.functions.get(name)
            # A fallback is no way to a model that the tenant may not use.
            if (
                fallback is not None
                and snapshot.may_use(tenant, fallback)
                and answers(fallback, endpoint)
            ):
                self._functions.append(fallback)
        self._ask_function()

    def _ask_keeper(self) -> None:
        """Passes on a request about something that an engine keeps for this tenant alone."""
        snapshot, tenant = self._snapshot, self._principal.tenant
        keepers = [
            (function, candidate)
            for function in snapshot.models(tenant)
            if answers(function, self._endpoint)
            for candidate in snapshot.candidates(function, tenant)
            if candidate.dedicated
        ]
        if len(keepers) != 1:
            raise Refused(errors.nothing_stored(self._request.path[:300]))
        self._function, keeper = keepers[0]
        self._candidates = (keeper,)
        self._enter()

    def _ask_function(self) -> None:
        """The next of the functions that may answer."""
        function = self._function = self._functions.pop(0)
        proxy, parsed = self._proxy, self._parsed
        wish = parsed.get("cache_salt")
        salt = self._salt = cache_salt(
            proxy.salt_key, self._principal.tenant.name, wish if type(wish) is str else ""
        )
        self._prompt = proxy.brain.prompt(function, self._endpoint, parsed, len(self._body), salt)
        self._sent_body = self._request_body(function, salt)
        tenant, headers = self._principal.tenant, self._headers
        self._conversation = Conversation(proxy.sessions, function, tenant, headers, parsed)
        if headers.replica is None:
            self._candidates = self._snapshot.candidates(function, tenant)
        else:
            self._candidates = [self._debugged(function, headers.replica)]
        self._enter()

    def _debugged(self, function: Function, replica: bytes) -> Candidate:
        """The one replica that somebody who may debug wants to be asked."""
        if "debug" not in self._principal.key.scopes:
            raise Refused(errors.NOT_FOR_DEBUGGING)
        name = replica.decode("latin-1")
        found = self._snapshot.named(function, self._principal.tenant, name)
        if found is None:
            raise Refused(errors.replica_not_found(name[:200], function.name))
        return found

    def _request_body(self, function: Function, salt: str) -> bytes:
        """As this function's engines are to get it."""
        body, model, span, parsed = self._body, self._model, self._span, self._parsed
        if span is not None:
            if model == function.served_name:
                return body
            return body[: span[0]] + function.served_name.encode() + body[span[1] :]
        task = self._endpoint.task
        values: dict[str, bytes] = {}
        if model is not None and model != function.served_name:
            values["model"] = _json(function.served_name)
        self._metering = self._proxy.meter.plan(task, function.engine, parsed)
        if self._metering.stream_options is not None:
            values["stream_options"] = self._metering.stream_options
        salted = function.engine in SALTED_ENGINES and task in SALTED_TASKS
        if salted or "cache_salt" in parsed or not parsed:
            values["cache_salt"] = b'"%b"' % salt.encode()
        if not values:
            return body
        # A body that could not be built is looked through.
        present = parsed or {key for _, _, key in spans(body, values)}
        if not salted and "cache_salt" not in present:
            values.pop("cache_salt", None)
        return spliced(body, values, present)

    # Whether it may enter, and whether there is room.

    def _estimated(self) -> tuple[int, int]:
        """Tokens of prompt and answer, until the engine says."""
        task, bound = self._endpoint.task, self._function.max_model_len
        return estimated(task, len(self._body), self._parsed, bound)

    def _enter(self) -> None:
        """Takes what it needs of the limits that it stands under."""
        limiter, function = self._proxy.limiter, self._function
        self.record.function = function.name
        if not limiter.enabled:
            self._start()
            return
        answer = limiter.admit_now(self._principal, function, *self._estimated())
        if answer is None:
            self._later(self._enter_later())
        else:
            self._entered(answer)

    async def _enter_later(self) -> None:
        limiter = self._proxy.limiter
        answer = await limiter.admit(self._principal, self._function, *self._estimated())
        self._task = None  # what waits from here on is another's
        self._entered(answer)

    def _entered(self, answer: Admission | Refusal) -> None:
        if isinstance(answer, Refusal):
            raise Refused(answer)
        self._admission = answer
        self._start()

    def _wait(self) -> None:
        """Waits for room, where that is what is missing and no other function is to be asked."""
        function, proxy = self._function, self._proxy
        candidates, breakers = self._candidates, self._state.breakers
        if not candidates:
            self._wake()
            return
        ejected = kept_out(candidates, breakers, perf_counter()) if breakers else ()
        if (
            self._functions
            or not function.policy.queue_max_wait_s
            # Where others wait there may be room that has just come: it is theirs.
            or not (
                proxy.queues.must_wait(function.name)
                or full(candidates, self._carried(candidates), ejected)
            )
        ):
            raise Refused(errors.at_capacity(function.name))
        place = proxy.queues.enter(
            function, self._principal.tenant, sum(self._estimated()), self._try, self._refuse
        )
        if isinstance(place, Refusal):
            raise Refused(place)
        self._place = place

    def _carried(self, candidates: Sequence[Candidate]) -> Mapping[str, int]:
        """Requests on each replica, as they count against what it may carry."""
        own = self._state.in_flight.by_replica
        if self._function.name not in self._snapshot.bounded:
            return own
        return self._proxy.brain.carried(candidates, own)

    def _wake(self) -> None:
        """Waits for a function that sleeps, where it does and no other is to be asked."""
        function, proxy = self._function, self._proxy
        if not function.wake_wait_s:
            raise Refused(errors.no_replica(function.name))
        proxy.signals.wakes(function.name)
        if self._functions:
            raise Refused(errors.no_replica(function.name))
        policy = replace(function.policy, queue_max_wait_s=function.wake_wait_s)
        place = proxy.queues.enter(
            replace(function, policy=policy),
            self._principal.tenant,
            sum(self._estimated()),
            self._try_awake,
            self._refuse,
        )
        if isinstance(place, Refusal):
            raise Refused(place)
        self._place = place

    def _try_awake(self) -> bool:
        """Its turn, if the newest table has a replica for it."""
        snapshot = self._state.snapshot
        if snapshot is not None and snapshot is not self._snapshot:
            function = snapshot.functions.get(self._function.name)
            if function is not None:
                self._snapshot, self._function = snapshot, function
                self._candidates = snapshot.candidates(function, self._principal.tenant)
        return bool(self._candidates) and self._try()

    def _try(self) -> bool:
        """Its turn: whether it need not wait any more."""
        try:
            chosen = self._choose()
            if chosen is None:
                return False
            self._attempt(*chosen)
        except Refused as refused:
            self._refuse(refused.refusal)
        except Exception as error:  # noqa: BLE001 - the others in the queue must not take the blame
            self._fail(error)
        return True

    # One attempt after another, until an answer begins or there is nowhere left to send it.

    def _start(self) -> None:
        function = self._function
        counts = self._counts = self._state.function(function.name)
        counts.turn += 1
        counts.budget.request(perf_counter())
        self._left = 1 if self._headers.replica else 1 + function.policy.retry_attempts
        if self._tried:
            self._tried = []
        queues = self._proxy.queues
        overtakes = self._headers.replica is None and (
            queues.waiting and queues.must_wait(function.name)
        )
        chosen = None if overtakes else self._choose()
        if chosen is None:
            self._wait()
        else:
            self._attempt(*chosen)

    def _choose(self) -> tuple[Candidate, Sent | None] | None:
        """A replica for one attempt, and how to count it where the policy weighs what it holds."""
        state, function = self._state, self._function
        load = state.in_flight.by_replica
        pool = self._candidates
        ejected: Collection[str] = ()
        forced = self._headers.replica is not None
        if (
            state.breakers or self._tried or function.name in self._snapshot.bounded
        ) and not forced:
            ejected = kept_out(pool, state.breakers, perf_counter())
            carried = self._carried(pool)
            pool = available(pool, carried, without=self._tried, ejected=ejected)
        session = pinned = None
        conversation = self._conversation
        if conversation is not None:
            if function.name in self._snapshot.divided and not forced:
                pool = self._of_arm(pool, conversation)
            if conversation.key is not None:
                session, pinned = conversation.session, conversation.pinned()
        if not pool:
            return None
        found: tuple[Candidate, Sent | None] | None
        if self._prompt is not None:
            found = self._proxy.brain.choose(pool, function, self._prompt, state.chance, pinned)
        else:
            turn, name = self._counts.turn, function.policy.name
            picked = pick(pool, name, load, turn, state.chance, session=session, pinned=pinned)
            found = None if picked is None else (picked, None)
        decisions = self._proxy.decisions
        if found is None:
            return None
        if decisions.wanted < 1:
            decisions.skipped += 1
        else:
            self._seen = self._what_was_seen(pool, found[0], found[1], ejected, pinned or "")
        return found

    def _of_arm(self, pool: Sequence[Candidate], conversation: Conversation) -> Sequence[Candidate]:
        """Those that the conversation's deployment has."""
        deployment = by_session(pool, conversation.number(self._state.chance))
        if deployment is None:
            return ()
        if pool is self._candidates:
            return self._snapshot.of_arm(self._function, self._principal.tenant, deployment)
        return [candidate for candidate in pool if candidate.deployment == deployment]

    def _what_was_seen(
        self,
        pool: Sequence[Candidate],
        chosen: Candidate,
        sent: Sent | None,
        ejected: Collection[str],
        pinned: str,
    ) -> Seen:
        """What the choice was made from, by reference; it is written out later."""
        proxy, function, record = self._proxy, self._function, self.record
        in_flight = self._state.in_flight.by_replica
        prompt = self._prompt or proxy.brain.read(
            function, self._endpoint, self._parsed, len(self._body), self._salt
        )
        fleet = proxy.brain.fleet(pool, function)
        if sent is None:  # nothing is counted then but requests
            fleet.requests = tuple(in_flight.get(c.id, 0) for c in pool)
        return Seen(
            id=record.decision,
            at=time.time(),
            snapshot=self._snapshot,
            function=function,
            tenant=self._principal.tenant,
            operation=record.operation,
            pool=pool,
            chosen=chosen,
            fleet=fleet,
            held=() if sent is None else sent.held,
            prompt=prompt,
            speeds=proxy.brain.factors(pool, function),
            turn=self._counts.turn,
            session=None if self._conversation is None else self._conversation.session,
            pinned=pinned,
            attempt=record.attempts + 1,
            forced=self._headers.replica is not None,
            skipped=proxy.decisions.skipped,
            tried=tuple(self._tried),
            ejected=ejected,
            in_flight=dict(in_flight) if len(pool) < len(self._candidates) else {},
        )

    def _choose_again(self) -> tuple[Candidate, Sent | None] | None:
        """A replica for one more attempt, if it may be made at all."""
        if not self._left:
            return None
        found = self._choose()
        percent = self._function.policy.retry_budget_percent
        if found is None or not self._counts.budget.spend(perf_counter(), percent):
            return None
        return found

    def _attempt(self, candidate: Candidate, sent: Sent | None) -> None:
        """Counts it, and sends the request to one replica."""
        state, record = self._state, self.record
        replica = candidate.id
        self._candidate = candidate
        self._left -= 1
        self._tried.append(replica)
        record.attempts += 1
        record.replica = replica
        state.in_flight.sent(replica)
        if state.breakers:
            breaker = state.breakers.get(replica)
            if breaker is not None and breaker.state(perf_counter()) == "half-open":
                breaker.trying = True
                self._breaker = breaker
        if self._seen is not None:
            self._proxy.decisions.noted(self._seen)
            self._seen = None
        if sent is not None:
            self._sent = self._judged = sent
            sent.begin()
        if record.trace is not None:
            record.trace.attempt(candidate, record)
        self._pool = state.pool(candidate)
        self._send()
        if self._conversation is not None:
            self._conversation.served(replica)
            if self._function.name in self._snapshot.shadowed and record.attempts == 1:
                self._copy_to_shadows(self._conversation)

    def _copy_to_shadows(self, conversation: Conversation) -> None:
        """Sends copies to those of the function's shadows that get this conversation's."""
        state, function = self._state, self._function
        number = conversation.number(state.chance)
        for shadow in self._snapshot.shadows(function, self._principal.tenant):
            if not is_shadowed(number, shadow.deployment, shadow.percent):
                continue
            load = state.in_flight.by_replica
            candidate = pick(shadow.replicas, "session", load, 0, state.chance, session=number)
            if candidate is not None and candidate is not self._candidate:
                head = self._head(candidate, self._headers.lines, f"{self.record.id}-shadow")
                self._proxy.shadows.send(candidate, function.policy, head, self._sent_body)

    def _send(self) -> None:
        assert self._pool is not None
        connection = self._pool.take()
        if connection is None:
            self._later(self._connect(self._pool))
        else:
            self._use(connection)

    async def _connect(self, pool: Pool) -> None:
        began = perf_counter()
        try:
            connection = await pool.connect(self._function.policy.connect_timeout_s)
        except UpstreamFailed as error:
            self._attempt_failed(error)
            return
        self._proxy.brain.connected(self._candidate, perf_counter() - began)
        self._use(connection)

    def _use(self, connection: Connection) -> None:
        proxy, policy = self._proxy, self._function.policy
        self._connection = connection
        now = perf_counter()
        relay = self._relay = Relay(
            self,
            connection,
            policy.between_chunks_timeout_s,
            proxy.settings.client_stall_timeout_s,
            policy.first_byte_timeout_s,
            now,
        )
        proxy.deadlines.watch(relay)
        if not self.record.dispatched:
            self.record.dispatched = now
        lines = self._headers.lines
        if self.record.trace is not None:
            lines = self.record.trace.passed_on(lines)
        head = self._head(self._candidate, lines, self.record.id)
        connection.send(head, self._sent_body, relay)

    def _head(self, candidate: Candidate, lines: Sequence[bytes], request_id: str) -> bytes:
        path = self._request.target
        if candidate.api_path != "/v1" and path.startswith("/v1/"):
            path = candidate.api_path + path[3:]
        return (
            f"{self._request.method} {candidate.base_path}{path} HTTP/1.1\r\n"
            f"Host: {candidate.host_header}\r\nContent-Length: {len(self._sent_body)}\r\n"
            f"X-Request-Id: {request_id}\r\n"
        ).encode("latin-1") + b"".join((*lines, b"\r\n"))

    # What becomes of the attempt: called by the relay.

    def answered(self) -> None:
        """Some of the body is there: it is delivered, or thrown away for another's."""
        try:
            self._judge()
        except Refused as refused:
            self._refuse(refused.refusal)
        except Exception as error:  # noqa: BLE001 - the engine's connection must not take the blame
            self._fail(error)

    def ended(self, error: Exception | None) -> None:
        """The answer is complete, or will never be."""
        try:
            if error is None:
                self._end(keep=self._keep)
            elif self._client.transport is not None and not self._delivering:
                assert isinstance(error, UpstreamFailed)
                self._attempt_failed(error)
            else:
                self._broke_off(error)
        except Exception as bug:  # noqa: BLE001 - as above
            self._fail(bug)

    def _judge(self) -> None:
        relay = self._relay
        assert relay is not None
        assert relay.head is not None
        head = relay.head
        if head.status < 400:
            if self._state.breakers:
                self._state.recovered(self._candidate.id)
            self._deliver(relay, head)
            return
        start = b""
        if head.status == 500:
            start = relay.start()
            if not relay.complete and len(start) < _LOOKED_AT_BYTES:
                return  # more is to come, and decides
        if is_retryable(head.status, start):
            self._rest(head)
            alternative = self._choose_again()
            if alternative is not None:
                if head.status != 429:
                    self._proxy.abandoned(self._candidate.id)
                self._end_attempt()
                self._attempt(*alternative)
                return
            if self._functions:
                raise Refused(errors.at_capacity(self._function.name))
        elif head.status < 500:
            self._state.recovered(self._candidate.id)
        self._deliver(relay, head)

    def _attempt_failed(self, error: UpstreamFailed) -> None:
        """Nothing of an answer came: again elsewhere, if that may help."""
        if error.stale:
            # The engine closed it while it was idle: that says nothing about the engine.
            self._drop_connection()
            self._send()
            return
        self._blame(error)
        if self.record.trace is not None:
            self.record.trace.failed(error)
        too_late = isinstance(error, UpstreamTimeout) and error.phase != "connect"
        alternative = None if too_late else self._choose_again()
        if alternative is None:
            self._refuse(self._why(error))
            return
        self._proxy.abandoned(self._candidate.id)
        self._end_attempt()
        self._attempt(*alternative)

    def _why(self, error: UpstreamFailed) -> Refusal:
        if isinstance(error, UpstreamTimeout) and error.phase == "first-byte":
            return errors.upstream_timeout(self._function.name, error.waited_s)
        return errors.upstream_failed(self._function.name)

    def _blame(self, error: UpstreamFailed) -> None:
        """A failure that is the replica's fault."""
        kind: Failure = "failed"
        if isinstance(error, ConnectFailed):
            kind = "refused"
        elif isinstance(error, UpstreamTimeout):
            kind = "timeout"
        replica = self._candidate.id
        breaker, now = self._state.breaker(replica), perf_counter()
        before = breaker.state(now)
        breaker.failed(now, kind)
        if before == "closed" and breaker.state(now) == "open":
            _log.warning("replica %s is kept out: %s", replica, error)

    def _rest(self, head: ResponseHead) -> None:
        """It answered that it takes no more: for how long, it says itself or is guessed."""
        breaker, now = self._state.breaker(self._candidate.id), perf_counter()
        if head.status == 500:
            breaker.failed(now, "refused")  # it shuts down
            return
        text = head.retry_after or b""
        breaker.asked_for_rest(now, float(text) if text.isdigit() else _REST_S)

    def _deliver(self, relay: Relay, head: ResponseHead) -> None:
        """Passes the answer on."""
        record, client = self.record, self._client
        status = head.status
        if self._sent is not None and not relay.complete:  # else it ends in a moment
            self._sent.first_token(streamed=head.content_type.startswith(_EVENTS))
        framing: Framing
        if status in (204, 304):
            framing, frame = "none", b""
        elif head.length is not None:
            framing, frame = "length", b"Content-Length: %d\r\n" % head.length
        elif self._request.modern:
            framing, frame = "chunked", b"Transfer-Encoding: chunked\r\n"
        else:
            framing, frame = "close", b""
        keep = self._request.keep_alive and self._request.modern and not self._state.draining
        self._keep = keep and framing != "close"
        record.status = status
        if status >= 400:
            record.outcome = "upstream_error" if status >= 500 else "client_error"
            if status in (429, 503) and head.retry_after is None:
                frame = b"Retry-After: 1\r\n" + frame
        lines = b"%b%b%b%b%b\r\nx-request-id: %b\r\n%b%b" % (
            STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status,
            head.headers,
            b"" if self._admission is None else self._admission.headers(),
            self._candidate.route_header,
            record.decision.encode(),
            record.id.encode(),
            frame,
            b"\r\n" if keep else b"Connection: close\r\n\r\n",
        )
        transport = client.transport
        assert transport is not None  # else client_left had been called
        self._delivering = True
        metered = self._metered = self._meter()
        if metered is not None and metered.answered(
            status, head.content_type, fixed=framing == "length"
        ):
            relay.feed = metered.feed
        if client.write_paused:
            relay.pause()
        relay.deliver(transport, lines, framing)

    def _broke_off(self, error: Exception) -> None:
        """After some of the answer was sent: it cannot be made good."""
        record, relay = self.record, self._relay
        assert relay is not None
        if not isinstance(error, UpstreamFailed):
            self.client_left()
            return
        told = relay.tell_of_failure()
        self._blame(error)
        record.outcome = "timeout" if isinstance(error, UpstreamTimeout) else "interrupted"
        # A stream that ended with an error event is complete; to close its connection would
        # break the request that the client may be sending on it already.
        self._end(keep=told and self._keep)

    # What it used.

    def _meter(self) -> Metered | None:
        """None where nothing is used, or nothing was sent."""
        record = self.record
        if self._endpoint.stored or not record.attempts:
            return None
        principal = self._principal
        return self._proxy.meter.begin(
            self._function,
            request_id=record.id,
            tenant=principal.tenant.name,
            key=principal.key.id,
            revision=self._snapshot.revision,
            task=self._endpoint.task,
            plan=self._metering,
            request_bytes=record.request_bytes,
            age_s=perf_counter() - record.started,
        )

    def _listen_on(self) -> None:
        """The client has left: what the engine has sent by now is counted all the same."""
        connection, relay, proxy = self._connection, self._relay, self._proxy
        if connection is None or relay is None or relay.complete or not proxy.meter.wanted:
            return
        metered = self._metered or self._meter()
        if metered is not None:
            self._connection = None
            self._settled = True
            proxy.listen_on(connection, metered, self._used)

    def _settle(self) -> None:
        """What it used is known, or nothing was sent: noted once, and given back what it did not need."""
        if self._settled:
            return
        self._settled = True
        metered = self._metered or self._meter()
        if metered is not None:
            self._used(metered)
        elif self._admission is not None:
            self._admission.release()

    def _used(self, metered: Metered) -> None:
        """For the ledger, and for what it stood under."""
        record, admission = self.record, self._admission
        usage = record.usage = metered.finish(
            outcome=record.outcome,
            replica=record.replica,
            ttft_s=record.first_body - record.started if record.first_body else None,
            ended_at=time.time(),
        )
        # Only a whole answer says what was cached: before its end an engine leaves that out.
        if self._judged is not None and record.outcome == "ok" and not usage.estimated:
            self._judged.used(usage.input_tokens, usage.cached_tokens)
        tokens = usage.input_tokens, usage.output_tokens
        if not metered.known and record.outcome == "ok":
            tokens = self._estimated()
        if admission is not None:
            admission.settle(*tokens, metered.cost_usd(usage) if metered.known else None)
        if self._place is not None:
            self._place.needed(sum(tokens))

    # Ends.

    def _refuse(self, refusal: Refusal) -> None:
        """Another function answers instead, or the router itself does."""
        self._end_attempt()
        if self._functions and refusal.code in _FALL_BACK_ON:
            admission, self._admission = self._admission, None
            if admission is not None:
                admission.undo()
            if refusal.code == "upstream_failed":
                self._proxy.abandoned(self._candidate.id)
            try:
                self._ask_function()
            except Refused as refused:
                self._refuse(refused.refusal)
            return
        record, request = self.record, self._request
        self._proxy.refused(refusal, record)
        keep = request.keep_alive and not self._state.draining
        transport = self._client.transport
        if transport is not None:
            transport.write(refuse(refusal, record.id, close=not keep))
        self._end(keep=keep)

    def _fail(self, error: BaseException) -> None:
        """A defect of the router's own ends this request and no other."""
        delivering = self._delivering
        self._end(keep=None)
        if delivering:
            _log.error("a request failed in the router: %s", where(error))
            self._client.abort()  # an answer that is cut is no answer; a second one would be a lie
        else:
            self._client.failed(error)

    def _drop_connection(self) -> None:
        relay, connection = self._relay, self._connection
        if relay is not None:
            self._relay = None
            self._proxy.deadlines.forget(relay)
            record = self.record
            record.response_bytes = relay.sent_bytes
            record.first_body = relay.first_body_at
            record.last_body = relay.since
            record.chunks = relay.chunks
        if connection is not None:
            self._connection = None
            assert self._pool is not None
            self._pool.give_back(connection)

    def _end_attempt(self) -> None:
        """Gives back what the running attempt holds, if there is one."""
        if self._pool is None:
            return
        trace = self.record.trace
        if trace is not None:
            trace.attempt_ended(self._relay)
        self._drop_connection()
        self._pool = None
        self._state.in_flight.ended(self._candidate.id)
        if self._proxy.queues.waiting:
            self._proxy.queues.freed()
        if self._breaker is not None:
            self._breaker.trying = False
            self._breaker = None
        if self._sent is not None:
            self._sent.finish()
            self._sent = None

    def _end(self, *, keep: bool | None) -> None:
        """However it ended: gives back everything, once. `keep` None: the client hears it elsewhere."""
        if self._over:
            return
        self._over = True
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task(self._proxy.loop):
            task.cancel()
        self._end_attempt()
        if self._place is not None:
            self._place.leave()
        self._state.in_flight.total -= 1
        self._settle()
        self._proxy.over(self.record)
        if keep is not None:
            self._client.done(keep=keep)

    # What has to wait.

    def _later(self, waiting: Coroutine[Any, Any, None]) -> None:
        self._task = self._proxy.loop.create_task(self._guarded(waiting))

    async def _guarded(self, waiting: Coroutine[Any, Any, None]) -> None:
        try:
            await waiting
        except Refused as refused:
            self._refuse(refused.refusal)
        except Exception as error:  # noqa: BLE001 - nobody awaits this task
            self._fail(error)
