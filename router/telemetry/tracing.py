"""OpenTelemetry traces: one server span a request, below it one client span an attempt.

W3C trace context comes in from the client and goes on to the engine, with the attempt's span as its
parent. Spans carry what the request's record does, and no prompt and no key. Imported only when
tracing is on. Not here: whether it is (trace_settings), or what is counted (metrics).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable
from time import perf_counter_ns
from typing import Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from router.core.api import MODEL_PREFIX, OWN, PASSED, stored
from router.core.snapshot import Candidate
from router.downstream.request import Request
from router.records import Outcome, RequestRecord
from router.relay import Relay
from router.settings import Settings
from router.upstream.failures import ClientGone, UpstreamFailed, UpstreamTimeout

_log: Final = logging.getLogger(__name__)
_FLUSH_S: Final = 3.0
"""How long the last spans may take at the end; a collector that is away holds up no shutdown."""
_UNTRACED: Final = frozenset({"/health", "/ready"})
"""Asked every few seconds by whoever watches the router; nobody looks for their traces."""
_FIRST_TOKEN: Final = "detoserve.first_token"  # noqa: S105 - an event's name
_CONTEXT_HEADERS: Final = frozenset({b"traceparent", b"tracestate"})
_BROKEN: Final = frozenset({"upstream_error", "timeout", "interrupted"})
_W3C: Final = TraceContextTextMapPropagator()


def _route(method: str, path: str) -> str | None:
    """The path as the API names it: without ids, and None for what is no path of it."""
    if path in PASSED or path in OWN:
        return path
    endpoint = stored(method, path)
    if endpoint is not None:
        return endpoint.path
    return MODEL_PREFIX + "{model}" if path.startswith(MODEL_PREFIX) else None


def _parent(headers: Iterable[tuple[bytes, bytes]]) -> Context:
    """The client's trace context; an empty one when there is none, or it is given more than once."""
    carrier: dict[str, list[str]] = {}
    for name, value in headers:
        lower = name.lower()
        if lower in _CONTEXT_HEADERS:
            carrier.setdefault(lower.decode(), []).append(value.decode("latin-1"))
    if len(carrier.get("traceparent", ())) != 1:
        return Context()
    return _W3C.extract(carrier, Context())


def _outcome(relay: Relay | None, error: UpstreamFailed | None) -> Outcome:
    """What became of one attempt."""
    failure = relay.error if error is None and relay is not None else error
    if isinstance(failure, ClientGone):
        return "client_gone"
    if isinstance(failure, UpstreamTimeout):
        return "timeout"
    if failure is not None:
        return "upstream_error" if relay is None else "interrupted"
    if relay is None or relay.head is None:
        return "client_gone"
    if relay.head.status >= 400:
        return "upstream_error" if relay.head.status >= 500 else "client_error"
    return "ok" if relay.complete else "client_gone"


class RequestTrace:
    """The spans of one request. One that is not sampled notes nothing, and passes on that it is not."""

    __slots__ = ("_attempt", "_clock_ns", "_error", "_span", "_tracing")

    def __init__(self, tracing: Tracing, span: Span, clock_ns: int) -> None:
        self._tracing = tracing
        self._span = span
        self._clock_ns = clock_ns
        """What to add to `perf_counter` for Unix time."""
        self._attempt: Span | None = None
        self._error: UpstreamFailed | None = None

    def _at(self, perf_counter_s: float) -> int:
        return self._clock_ns + int(perf_counter_s * 1e9)

    def attempt(self, candidate: Candidate, record: RequestRecord) -> None:
        """The request is about to be sent to this replica."""
        if not self._span.is_recording():
            return
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": record.operation,
            "gen_ai.provider.name": "detoserve",
            "gen_ai.request.model": candidate.function,
            "server.address": candidate.host,
            "server.port": candidate.port,
            "detoserve.replica": candidate.id,
            "detoserve.deployment": candidate.deployment,
            "detoserve.cluster": candidate.cluster,
        }
        if record.attempts > 1:
            attributes["http.request.resend_count"] = record.attempts - 1
        self._error = None
        self._attempt = self._tracing.tracer.start_span(
            f"{record.operation} {candidate.function}",
            set_span_in_context(self._span, Context()),
            SpanKind.CLIENT,
            attributes,
        )

    def passed_on(self, lines: bytes) -> bytes:
        """Header lines for the engine: the client's, with the trace context of the attempt."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(self._attempt or self._span, Context()))
        kept = [
            line
            for line in lines.splitlines(keepends=True)
            if line.partition(b":")[0].lower() not in _CONTEXT_HEADERS
        ]
        own = [f"{name}: {value}\r\n".encode("latin-1") for name, value in carrier.items()]
        return b"".join((*kept, *own))

    def failed(self, error: UpstreamFailed) -> None:
        """The attempt brought no answer."""
        self._error = error

    def attempt_ended(self, relay: Relay | None) -> None:
        """However it ended; `relay` is there when an answer began."""
        span = self._attempt
        if span is None:
            return
        outcome = _outcome(relay, self._error)
        span.set_attribute("detoserve.outcome", outcome)
        error_type: str = outcome if outcome in _BROKEN else ""
        if relay is not None and relay.head is not None:
            head = relay.head
            span.set_attribute("http.response.status_code", head.status)
            if head.status >= 400:
                error_type = str(head.status)
            elif relay.first_body_at:
                span.add_event(_FIRST_TOKEN, timestamp=self._at(relay.first_body_at))
        if error_type:
            span.set_attribute("error.type", error_type)
            span.set_status(StatusCode.ERROR)
        span.end()
        self._attempt = None

    def ended(self, record: RequestRecord) -> None:
        """The request is over; the record is complete."""
        span = self._span
        if not span.is_recording():
            return
        attributes: dict[str, AttributeValue] = {
            "http.request.body.size": record.request_bytes,
            "http.response.body.size": record.response_bytes,
            "detoserve.request_id": record.id,
            "detoserve.decision": record.decision,
            "detoserve.generation": record.generation,
            "detoserve.outcome": record.outcome,
            "detoserve.attempts": record.attempts,
        }
        if record.status:
            attributes["http.response.status_code"] = record.status
        if record.function:
            attributes["gen_ai.operation.name"] = record.operation
            attributes["gen_ai.request.model"] = record.function
        if record.replica:
            attributes["detoserve.replica"] = record.replica
        if record.tenant and self._tracing.tenants:
            attributes["detoserve.tenant"] = record.tenant
        if record.code:
            attributes["detoserve.code"] = record.code
        elif record.first_body and record.status < 400:
            span.add_event(_FIRST_TOKEN, timestamp=self._at(record.first_body))
        if record.status >= 500 or record.outcome in _BROKEN:
            attributes["error.type"] = record.code or (
                str(record.status) if record.status >= 500 else record.outcome
            )
            span.set_status(StatusCode.ERROR)
        span.set_attributes(attributes)
        span.end(self._at(record.ended))


class Tracing:
    """Makes spans and exports them by OTLP over HTTP, from a thread of its own.

    What the settings leave open, the SDK takes from the standard OTEL_* variables.
    """

    def __init__(self, settings: Settings, *, version: str, endpoint: str) -> None:
        """`endpoint` is the URL that spans are posted to.

        Raises:
            ValueError: a variable of the SDK's is out of its range.
        """
        self.tenants = settings.tenant_metrics
        ours = {
            "service.name": "detoserve-router",
            "service.version": version,
            "service.instance.id": settings.router_id,
        }
        resource = Resource.create({**ours, **OTELResourceDetector().detect().attributes})
        if settings.trace_service_name:
            resource = resource.merge(Resource({"service.name": settings.trace_service_name}))
        ratio = settings.trace_sample_ratio
        self._provider = TracerProvider(
            sampler=None if ratio is None else ParentBasedTraceIdRatio(ratio),
            resource=resource,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self.tracer = self._provider.get_tracer("detoserve.router", version)

    def begin(self, request: Request, record: RequestRecord) -> RequestTrace | None:
        """The server span of a request that has just been read."""
        path = request.path
        if path in _UNTRACED:
            return None
        clock_ns = time.time_ns() - perf_counter_ns()
        route = _route(request.method, path)
        attributes: dict[str, AttributeValue] = {
            "http.request.method": request.method,
            "url.scheme": "http",
        }
        if route is not None:
            attributes["http.route"] = route
            attributes["url.path"] = path[:200]
        span = self.tracer.start_span(
            f"{request.method} {route}" if route else request.method,
            _parent(request.headers),
            SpanKind.SERVER,
            attributes,
            start_time=clock_ns + int(record.started * 1e9),
        )
        return RequestTrace(self, span, clock_ns)

    async def close(self) -> None:
        """Sends what is left, if the collector takes it in time."""
        # Not the loop's executor, whose threads the program waits for at its end.
        last = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        last.start()
        await asyncio.to_thread(last.join, _FLUSH_S)
        if last.is_alive():
            _log.warning("the last spans are lost: no collector took them in %g s", _FLUSH_S)
