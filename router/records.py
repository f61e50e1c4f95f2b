"""What is noted of one request while it runs: the source of its log line and its metrics.

Names and numbers only; no prompt, no key, no header of the client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from router.core.shapes import Usage

if TYPE_CHECKING:
    from router.telemetry.tracing import RequestTrace

Outcome = Literal[
    "ok", "refused", "client_error", "upstream_error", "interrupted", "timeout", "client_gone"
]


class RequestRecord:
    """Filled in as the request goes. Times are `perf_counter` seconds."""

    tenant: str = ""
    key: str = ""
    function: str = ""
    replica: str = ""
    generation: int = 0
    status: int = 0
    outcome: Outcome = "ok"
    code: str = ""
    """Of the refusal, if the router answered itself."""
    attempts: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    dispatched: float = 0.0
    """When the request was written to the first replica."""
    first_body: float = 0.0
    last_body: float = 0.0
    chunks: int = 0
    ended: float = 0.0
    usage: Usage | None = None
    """Once it is known; None where nothing was sent to an engine."""
    trace: RequestTrace | None = None
    """Its spans, while requests are traced."""

    def __init__(
        self,
        path: str,
        operation: str,
        started: float,
        request_id: str = "",
        decision: str = "",
    ) -> None:
        self.path = path
        self.operation = operation
        self.started = started
        self.id = request_id
        self.decision = decision
