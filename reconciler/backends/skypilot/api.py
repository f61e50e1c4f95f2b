"""SkyPilot's REST API: one request to one answer, every one with a deadline. API versions 24 to 62.

Each call is asynchronous on the server: a POST gives a request id, and `/api/get` its result. Errors
come as type and message beside a pickle, which is never opened. Not here: what to ask (backend), or
what rows mean (rows).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from reconciler.errors import BackendUnreachable, Stalled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

T = TypeVar("T")

DEFAULT_ENDPOINT: Final = "http://127.0.0.1:46580"
OLDEST_API: Final = 24
"""What SkyPilot 0.14.1 itself still talks to."""
_REQUEST_ID: Final = "X-Skypilot-Request-ID"
# As the SDK of the version that this was read and tested against.
_VERSIONS: Final = {"X-SkyPilot-API-Version": "62", "X-SkyPilot-Version": "0.14.1"}
_CONTROLLER: Final = "sky-serve-controller-"
_GONE: Final = frozenset({"RequestInterruptedError", "RequestCancelled"})


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """`token`: of a service account; it goes into a header and nowhere else."""

    endpoint: str = DEFAULT_ENDPOINT
    token: str | None = field(default=None, repr=False)
    call_timeout_s: float = 15.0
    """Until the server has taken a request on."""
    result_timeout_s: float = 60.0
    """Until a status request has its result."""


def api_settings(url: str, environ: Mapping[str, str]) -> ApiSettings:
    """The server at `url`, with the token that SkyPilot's own clients would use.

    Raises:
        Stalled: it is no URL of a server, or no token.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Stalled(f"{url!r} is no SkyPilot API server; write it like http://127.0.0.1:46580")
    if parts.username or parts.password:
        raise Stalled("a SkyPilot API server's URL must not hold credentials; use a token")
    token = environ.get("SKYPILOT_SERVICE_ACCOUNT_TOKEN") or None
    if token is not None and not token.startswith("sky_"):
        raise Stalled("SKYPILOT_SERVICE_ACCOUNT_TOKEN is no service account's token: sky_...")
    return ApiSettings(url.rstrip("/"), token)


class Refusal(Exception):
    """The server ran a request, and it failed. `kind` is the name of SkyPilot's exception."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def interrupted(self) -> bool:
        """It did not fail: the server was restarted, or somebody cancelled it."""
        return self.kind in _GONE


class RequestUnknown(Exception):
    """The server knows no such request any more."""


class Pending(msgspec.Struct, frozen=True):
    """A request that is under way on the server."""

    request_id: str
    name: str
    user_id: str = ""


class _Payload(msgspec.Struct, frozen=True):
    return_value: str = "null"
    error: str = "null"


class _Failure(msgspec.Struct, frozen=True):
    detail: _Payload | str | None = None


class _Error(msgspec.Struct, frozen=True):
    type: str = "Exception"
    message: str = ""


class _Cluster(msgspec.Struct, frozen=True):
    name: str


class _User(msgspec.Struct, frozen=True):
    id: str = ""


class Health(msgspec.Struct, frozen=True):
    status: str = ""
    api_version: str = ""
    version: str = ""
    user: _User | None = None


class SkyPilotApi:
    """One server, as one user. `owner` gives the user id where the server asks for no token."""

    def __init__(self, settings: ApiSettings, owner: str) -> None:
        self._settings = settings
        # Eight hexadecimal digits, as SkyPilot makes them; names of machines end in it.
        self._user_id = hashlib.sha256(f"detoserve:{owner}".encode()).hexdigest()[:8]
        self._session: aiohttp.ClientSession | None = None
        self.calls: dict[str, int] = {}
        """How often each path was asked; for tests and measurements."""

    @property
    def endpoint(self) -> str:
        return self._settings.endpoint

    async def submit(self, path: str, body: Mapping[str, Any]) -> str:
        """Posts one request; its id. Taken on by the server when this returns.

        Raises:
            BackendUnreachable: whether it was taken on is not known.
            Refusal: it was not.
        """
        who = {"SKYPILOT_USER_ID": self._user_id, "SKYPILOT_USER": "detoserve"}
        timeout_s = self._settings.call_timeout_s
        async with self._call("POST", path, timeout_s, json={**body, "env_vars": who}) as answer:
            data = await answer.read()
            if answer.status >= 500:
                raise BackendUnreachable(f"{self.endpoint}: {_words(answer.status, data)}")
            if answer.status >= 400:
                raise Refusal("InvalidRequest", _words(answer.status, data))
            request_id = answer.headers.get(_REQUEST_ID, "")
        if not request_id:
            raise BackendUnreachable(f"{self.endpoint}{path} gave no request id: no SkyPilot API?")
        return request_id

    async def result(self, request_id: str, timeout_s: float) -> bytes:
        """The JSON of what a request returned; waits for it.

        Raises:
            Refusal: the request failed.
            RequestUnknown: the server does not know it (any more).
            TimeoutError: it is not done within `timeout_s`.
            BackendUnreachable: the server cannot be asked.
        """
        call = self._call(
            "GET", "/api/get", timeout_s, params={"request_id": request_id}, late=True
        )
        async with call as answer:
            data = await answer.read()
            status = answer.status
        if status == 404:
            raise RequestUnknown(request_id)
        if status == 500:
            raise _refusal(data)
        if status != 200:
            raise BackendUnreachable(f"{self.endpoint}: {_words(status, data)}")
        return _decode(_Payload, data).return_value.encode()

    async def status(self) -> bytes:
        """The rows of all services of the server, as JSON.

        Raises:
            Refusal, BackendUnreachable: nothing is known.
        """
        request_id = await self.submit("/serve/status", {"service_names": None})
        try:
            return await self.result(request_id, self._settings.result_timeout_s)
        except RequestUnknown:
            raise BackendUnreachable(f"{self.endpoint} forgot a request it had taken on") from None
        except TimeoutError:
            await self._cancel(request_id)
            raise BackendUnreachable(
                f"{self.endpoint} did not answer a status request within "
                f"{self._settings.result_timeout_s:g} s"
            ) from None

    async def has_controller(self) -> bool:
        """Whether the server knows a machine that SkyServe's controller runs on, stopped or not.

        Raises:
            Refusal, BackendUnreachable: nothing is known.
        """
        asked = {
            "cluster_names": [f"{_CONTROLLER}*"],
            "include_credentials": False,
            "include_handle": False,
        }
        request_id = await self.submit("/status", asked)
        try:
            found = await self.result(request_id, self._settings.result_timeout_s)
        except (RequestUnknown, TimeoutError):
            raise BackendUnreachable(f"{self.endpoint} does not tell its clusters") from None
        return any(c.name.startswith(_CONTROLLER) for c in _decode(list[_Cluster], found))

    async def check(self, task: str) -> None:
        """Has SkyPilot's optimizer say whether a task can run anywhere, before anything is started.

        Raises:
            Refusal: it cannot, or is no task.
            BackendUnreachable: nothing is known.
        """
        request_id = await self.submit("/optimize", {"dag": task, "request_options": None})
        try:
            await self.result(request_id, self._settings.result_timeout_s)
        except (RequestUnknown, TimeoutError):
            raise BackendUnreachable(
                f"{self.endpoint} did not say whether a task can run"
            ) from None

    async def pending(self) -> list[Pending]:
        """Our own requests that are not finished.

        Raises:
            BackendUnreachable: nothing is known.
        """
        fields = [("fields", name) for name in ("request_id", "name", "user_id")]
        async with self._call(
            "GET", "/api/status", self._settings.call_timeout_s, params=fields
        ) as answer:
            data = await answer.read()
            if answer.status != 200:
                raise BackendUnreachable(f"{self.endpoint}: {_words(answer.status, data)}")
        found = _decode(list[Pending], data)
        if self._settings.token:
            # The server tells who we are by the token, and shows a user's own requests alone.
            return found
        return [request for request in found if request.user_id in ("", self._user_id)]

    async def health(self) -> Health:
        """Raises: BackendUnreachable, also where the server is no version that this speaks."""
        async with self._call("GET", "/api/health", self._settings.call_timeout_s) as answer:
            data = await answer.read()
            if answer.status != 200:
                raise BackendUnreachable(f"{self.endpoint}: {_words(answer.status, data)}")
        health = _decode(Health, data)
        if health.api_version.isdigit() and int(health.api_version) < OLDEST_API:
            raise BackendUnreachable(
                f"{self.endpoint} speaks API version {health.api_version}; DetoServe needs "
                f"{OLDEST_API} or newer (SkyPilot 0.11)"
            )
        return health

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _cancel(self, request_id: str) -> None:
        try:
            await self.submit("/api/cancel", {"request_ids": [request_id]})
        except (BackendUnreachable, Refusal):
            # The server ends it by itself; this only spares it work.
            return

    @asynccontextmanager
    async def _call(
        self, method: str, path: str, timeout_s: float, *, late: bool = False, **how: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One HTTP exchange. `late`: the deadline passing is TimeoutError, and says nothing else."""
        self.calls[path] = self.calls.get(path, 0) + 1
        headers = dict(_VERSIONS)
        if self._settings.token:
            headers["Authorization"] = f"Bearer {self._settings.token}"
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout())
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method,
                    self.endpoint + path,
                    headers=headers,
                    allow_redirects=False,
                    **how,
                ) as answer,
            ):
                if answer.status in (401, 403):
                    raise BackendUnreachable(
                        f"{self.endpoint} refuses the credentials ({answer.status}); set "
                        "SKYPILOT_SERVICE_ACCOUNT_TOKEN to a valid token of a service account"
                    )
                yield answer
        except TimeoutError:
            if late:
                raise
            raise BackendUnreachable(
                f"{self.endpoint}{path} did not answer within {timeout_s:g} s"
            ) from None
        except aiohttp.ClientError as error:
            why = str(error) or type(error).__name__
            raise BackendUnreachable(f"{self.endpoint} cannot be reached: {why}") from None


def _decode(shape: type[T], data: bytes) -> T:
    try:
        return msgspec.json.decode(data, type=shape)
    except msgspec.DecodeError as error:
        raise BackendUnreachable(f"an answer of SkyPilot cannot be read: {error}") from None


def _refusal(data: bytes) -> Refusal:
    """From the body of a failed request."""
    try:
        detail = msgspec.json.decode(data, type=_Failure).detail
        if isinstance(detail, str) or detail is None:
            return Refusal("ServerError", detail or "no reason given")
        error = msgspec.json.decode(detail.error, type=_Error)
    except msgspec.DecodeError:
        return Refusal("ServerError", _words(500, data))
    return Refusal(error.type, error.message)


def _words(status: int, data: bytes) -> str:
    """What the server says of an error, without what it was sent: that may hold secrets."""
    try:
        body = json.loads(data)
    except ValueError:
        text = data.decode(errors="replace")
    else:
        detail = body.get("detail") if isinstance(body, dict) else None
        if isinstance(detail, list):
            # FastAPI's list of what is wrong repeats the whole input in each entry.
            told = [d for d in detail if isinstance(d, dict)]
            text = "; ".join(f"{d.get('msg')} at {d.get('loc')}" for d in told)
        elif isinstance(detail, dict):
            text = str(detail.get("message", "no reason given"))
        else:
            text = str(detail or "no reason given")
    return f"HTTP {status}: {' '.join(text.split())[:300]}"
