"""A collector of OTLP over HTTP: it decodes what a router exports, and keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import Status


def _plain(value: AnyValue) -> Any:
    return getattr(value, value.WhichOneof("value"))


def _mapping(pairs: list[KeyValue]) -> dict[str, Any]:
    return {pair.key: _plain(pair.value) for pair in pairs}


@dataclass
class ExportedSpan:
    """One span as it came over the wire."""

    message: SpanMessage
    resource: Mapping[str, Any]
    attributes: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.attributes = _mapping(list(self.message.attributes))

    @property
    def name(self) -> str:
        return self.message.name

    @property
    def trace_id(self) -> str:
        return self.message.trace_id.hex()

    @property
    def id(self) -> str:
        return self.message.span_id.hex()

    @property
    def parent(self) -> str:
        return self.message.parent_span_id.hex()

    @property
    def is_error(self) -> bool:
        return self.message.status.code == Status.STATUS_CODE_ERROR

    @property
    def events(self) -> dict[str, int]:
        """Name -> Unix nanoseconds."""
        return {event.name: event.time_unix_nano for event in self.message.events}


@dataclass
class Collector:
    """What was posted so far."""

    url: str = ""
    paths: list[str] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    spans: list[ExportedSpan] = field(default_factory=list)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        self.paths.append(request.path)
        self.headers.append(request.headers)
        self.bodies.append(body)
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = _mapping(list(of_resource.resource.attributes))
            for of_scope in of_resource.scope_spans:
                self.spans += [ExportedSpan(span, resource) for span in of_scope.spans]
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(),
            content_type="application/x-protobuf",
        )

    @property
    def servers(self) -> list[ExportedSpan]:
        return self._of_kind(SpanMessage.SPAN_KIND_SERVER)

    @property
    def clients(self) -> list[ExportedSpan]:
        return self._of_kind(SpanMessage.SPAN_KIND_CLIENT)

    def _of_kind(self, kind: int) -> list[ExportedSpan]:
        found = [span for span in self.spans if span.message.kind == kind]
        return sorted(found, key=lambda span: span.message.start_time_unix_nano)


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    running = Collector()
    web_server = web.Server(running._answer, access_log=None)
    server = await asyncio.get_running_loop().create_server(web_server, "127.0.0.1", 0)
    running.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield running
    finally:
        server.close()
        await web_server.shutdown(0.1)
