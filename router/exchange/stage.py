"""What all stages of one request share: its state, and how it waits.

Not here: what any of them does.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from router.conversation import Conversation
from router.core.api import Endpoint
from router.core.blocks import Prompt
from router.core.errors import Refusal, Refused
from router.core.headers import ClientHeaders
from router.core.health import Breaker
from router.core.limits import estimated
from router.core.record import Seen
from router.core.snapshot import Candidate, Principal, Snapshot, Target
from router.core.usage import UNCHANGED, Metering
from router.downstream.connection import ClientConnection
from router.downstream.request import Request
from router.fleet.brain import Sent
from router.limits.limiter import Admission
from router.limits.queue import Place
from router.proxy import Proxy
from router.records import RequestRecord
from router.relay import Relay
from router.state import FunctionState, RouterState
from router.upstream.connection import Connection, ResponseHead
from router.upstream.pool import Pool
from router.usage.meter import Metered
from schemas.wire.routing import Function

_UNPARSED: Final[Mapping[str, Any]] = MappingProxyType({})


class Stage(ABC):
    """A request and its answer, as far as the stages below have brought it.

    What has no value here is set by a stage before another reads it.
    """

    _over: bool = False

    def __init__(
        self,
        proxy: Proxy,
        state: RouterState,
        request: Request,
        client: ClientConnection,
        endpoint: Endpoint,
        record: RequestRecord,
    ) -> None:
        self._proxy = proxy
        self._state = state
        self._request = request
        self._client = client
        self._endpoint = endpoint
        self.record = record
        self._parsed = _UNPARSED

    # Who asks for what:
    _snapshot: Snapshot
    _headers: ClientHeaders
    _principal: Principal
    _body: bytes = b""
    _parsed: Mapping[str, Any]
    _model: str | None = None
    _span: tuple[int, int] | None = None
    """Where the model's name stands in a form."""
    _fallbacks: tuple[Target, ...] = ()
    """To be asked if the function cannot answer."""

    # What it used:
    _metering: Metering = UNCHANGED
    _metered: Metered | None = None
    _judged: Sent | None = None
    """The last attempt, once there was one: its engine's word on the prompt is held against it."""
    _settled: bool = False

    # Of the function that is asked:
    _function: Function
    _counts: FunctionState
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
    _tried: tuple[str, ...] = ()
    _task: asyncio.Task[None] | None = None

    # Of the running attempt:
    _candidate: Candidate
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

    # What later stages do.

    @abstractmethod
    def _enter(self) -> None:
        """Takes what it needs of the limits that it stands under, and goes on."""

    @abstractmethod
    def _start(self) -> None:
        """Begins the first attempt with this function, or waits for room."""

    @abstractmethod
    def _choose(self) -> tuple[Candidate, Sent | None] | None:
        """A replica for one attempt, and how to count it where the policy weighs what it holds."""

    @abstractmethod
    def _attempt(self, candidate: Candidate, sent: Sent | None) -> None:
        """Counts it, and sends the request to one replica."""

    @abstractmethod
    def _deliver(self, relay: Relay, head: ResponseHead) -> None:
        """Passes the answer on."""

    @abstractmethod
    def _broke_off(self, error: Exception) -> None:
        """After some of the answer was sent: it cannot be made good."""

    @abstractmethod
    def _refuse(self, refusal: Refusal) -> None:
        """Another function answers instead, or the router itself does."""

    @abstractmethod
    def _fail(self, error: BaseException) -> None:
        """A defect of the router's own ends this request and no other."""

    @abstractmethod
    def _end(self, *, keep: bool | None) -> None:
        """However it ended: gives back everything, once."""

    # What has to wait.

    def _later(self, waiting: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        # Called within the task: one that is cancelled before it begins leaves nothing behind.
        self._task = self._proxy.loop.create_task(self._guarded(waiting, *args))

    async def _guarded(self, waiting: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        try:
            await waiting(*args)
        except Refused as refused:
            self._refuse(refused.refusal)
        except Exception as error:  # noqa: BLE001 - nobody awaits this task
            self._fail(error)

    def _estimated(self) -> tuple[int, int]:
        """Tokens of prompt and answer, until the engine says."""
        task, bound = self._endpoint.task, self._function.max_model_len
        return estimated(task, len(self._body), self._parsed, bound)
