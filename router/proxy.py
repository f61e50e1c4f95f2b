"""What all requests of one process share: who asks, which function is meant, and how it went.

Not here: one request's way to an engine and back (exchange), or listening (downstream).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Final

from router.core import errors
from router.core.api import Endpoint
from router.core.auth import authenticate, identify
from router.core.auth_failures import AuthFailures
from router.core.errors import Refusal, Refused
from router.core.headers import ClientHeaders
from router.core.headers import read as read_headers
from router.core.request import BodyInvalid
from router.core.snapshot import Principal, Snapshot, Target
from router.deadlines import Deadlines
from router.decisions import DecisionLog
from router.downstream.request import Request
from router.fleet.brain import Brain
from router.fleet.signals import Signals
from router.limits.limiter import Limiter
from router.limits.queue import Queues
from router.records import RequestRecord
from router.session_store import SessionStore
from router.settings import Settings
from router.shadow import Shadows
from router.state import RouterState
from router.upstream.connection import Connection
from router.usage.last_words import LastWords
from router.usage.meter import Meter, Metered
from router.usage.months import UsageMonths
from schemas.api_keys import PREFIX
from schemas.wire.routing import Function, Tenant

if TYPE_CHECKING:
    from router.telemetry.tracing import Tracing

_OWN_KEYS: Final = PREFIX.encode()


def answers(function: Function, endpoint: Endpoint) -> bool:
    """Whether a function serves this endpoint's task."""
    return not function.tasks or endpoint.task in function.tasks


def meant(snapshot: Snapshot, tenant: Tenant, endpoint: Endpoint, model: str | None) -> Function:
    """The function that a request is for.

    Raises:
        Refused: the tenant has no such model, or it does not answer here.
        BodyInvalid: no model is named, and it is not clear which is meant.
    """
    if model is None:
        mine = snapshot.models(tenant) if endpoint.model_optional else ()
        answering = [function for function in mine if answers(function, endpoint)]
        if len(answering) != 1:
            raise BodyInvalid("it must name a `model`", "model")
        return answering[0]
    function = snapshot.resolve(tenant, model)
    if function is None:
        raise Refused(errors.model_not_found(model[:200]))
    if not answers(function, endpoint):
        raise Refused(errors.task_not_supported(function.name, endpoint.path))
    return function


def targets(
    snapshot: Snapshot, tenant: Tenant, endpoint: Endpoint, model: str | None
) -> tuple[Target, ...]:
    """The function that a request is for, and after it those that may answer in its place.

    Raises: as `meant`.
    """
    key = tenant.name, endpoint.path, model
    found = snapshot.targets.get(key)
    if found is None:
        function = meant(snapshot, tenant, endpoint, model)
        fallbacks = [snapshot.functions.get(name) for name in function.fallbacks]
        found = snapshot.targets[key] = tuple(
            Target(each, snapshot.candidates(each, tenant))
            for each in (function, *fallbacks)
            # A fallback is no way to a model that the tenant may not use.
            if each is function
            or (each is not None and snapshot.may_use(tenant, each) and answers(each, endpoint))
        )
    return found


class Proxy:
    """`finished` hears of every request once."""

    def __init__(
        self,
        state: RouterState,
        settings: Settings,
        finished: Callable[[RequestRecord], None],
        brain: Brain,
        tracing: Tracing | None = None,
        *,
        limiter: Limiter,
        signals: Signals,
        sessions: SessionStore,
        shadows: Shadows,
        decisions: DecisionLog,
        meter: Meter,
        salt_key: bytes,
    ) -> None:
        self.meter = meter
        self.salt_key = salt_key
        self.state = state
        self.settings = settings
        self.finished = finished
        self.brain = brain
        self.tracing = tracing
        self.limiter = limiter
        self.queues = Queues()
        self.auth_failures = AuthFailures(settings.auth_failures_per_minute)
        self.signals = signals
        self.sessions = sessions
        self.shadows = shadows
        self.decisions = decisions
        self.usage_months = UsageMonths()
        self.loop = asyncio.get_running_loop()
        self.deadlines = Deadlines()
        self.listening: set[LastWords] = set()
        """To engines whose clients have left."""

    def record(self, request: Request, operation: str, *, traced: bool = True) -> RequestRecord:
        """A new record with ids of its own. Whoever does not let it be `traced` yet calls `trace`."""
        decision = f"{self.state.chance.getrandbits(64):016x}"
        record = RequestRecord(
            request.target, operation, perf_counter(), "req_" + decision, decision
        )
        if traced and self.tracing is not None:
            self.trace(request, record)
        return record

    def trace(self, request: Request, record: RequestRecord) -> None:
        """Begins its spans, where requests are traced."""
        if self.tracing is not None:
            record.trace = self.tracing.begin(request, record)

    def authenticate(
        self, request: Request, record: RequestRecord, scope: str = "inference"
    ) -> tuple[Snapshot, ClientHeaders, Principal]:
        """Who asks, by the table of this moment.

        Raises:
            Refused: with the answer.
        """
        snapshot = self.state.snapshot
        if snapshot is None:
            raise Refused(errors.NO_TABLE)
        record.generation = generation = snapshot.generation
        headers = request.read
        if headers is None:
            found = read_headers(request.headers)
            if isinstance(found, Refusal):
                raise Refused(found)
            headers = request.read = found
        if headers.request_id is not None:
            record.id = headers.request_id.decode("ascii")
        token, now = headers.token, time.time()
        if self.auth_failures.known and not (token and token.startswith(_OWN_KEYS)):
            wait_s = self.auth_failures.wait_s(request.address, now)
            if wait_s:
                raise Refused(errors.too_many_failures(wait_s))
        if headers.identified_by != generation:
            headers.identified_by = generation
            headers.principal = identify(snapshot, token) if token else None
        principal = authenticate(snapshot, headers.principal, now, self.state.fresh_at, scope)
        if isinstance(principal, Refusal):
            if principal is errors.INVALID_API_KEY:
                wait_s = self.auth_failures.wait_s(request.address, now)
                self.auth_failures.failed(request.address, now)
                if wait_s:
                    principal = errors.too_many_failures(wait_s)
            raise Refused(principal)
        record.tenant = principal.tenant.name
        record.key = principal.key.id
        return snapshot, headers, principal

    def abandoned(self, replica: str) -> None:
        """An attempt came to nothing, and another is made: the record tells of the last one alone."""
        self.signals.abandoned(replica)

    def listen_on(
        self, connection: Connection, metered: Metered, over: Callable[[Metered], None]
    ) -> None:
        """Counts what an engine has sent to a client that has left; `over` hears when that is all."""

        def ended() -> None:
            self.listening.discard(words)
            over(metered)

        words = LastWords(connection, metered, ended)
        self.listening.add(words)
        words.listen(self.loop)

    def refused(self, refusal: Refusal, record: RequestRecord) -> None:
        """Notes in the record that the router answered itself."""
        record.status = refusal.status
        record.code = refusal.code
        if not record.attempts:
            record.outcome = "refused"
        elif refusal.status == 504:
            record.outcome = "timeout"
        else:
            record.outcome = "upstream_error"

    def over(self, record: RequestRecord) -> None:
        """The request has ended, whichever way."""
        record.ended = perf_counter()
        self.finished(record)
