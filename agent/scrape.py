"""Asking an engine over HTTP: its metrics page, and where it publishes KV events.

Not here: what the page means (core.metrics), or how often it is asked (engine_link).
"""

from __future__ import annotations

import errno
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import msgspec

from agent.core.metrics import PageInvalid, Reading, read_metrics
from agent.kv_source import Publisher

_MAX_PAGE_BYTES: Final = 8 * 2**20
_TIMEOUT: Final = aiohttp.ClientTimeout(total=5.0, connect=2.0)


class Unreachable(Exception):
    """No answer. `refused`: nothing listens there, so that no process is there either."""

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


async def read(session: aiohttp.ClientSession, url: str) -> Reading:
    """One look at its /metrics.

    Raises:
        Unreachable: it does not answer.
        PageInvalid: it does, but not with the page of an engine known here.
    """
    status, body = await _get(session, f"{url}/metrics")
    if status != 200:
        raise PageInvalid(f"its /metrics answers {status}")
    try:
        return read_metrics(body.decode())
    except UnicodeDecodeError:
        raise PageInvalid("its /metrics is not text") from None


async def publishers(session: aiohttp.ClientSession, url: str) -> list[Publisher]:
    """Where it publishes KV events; none where it does not say.

    Raises:
        Unreachable: it does not answer.
    """
    status, body = await _get(session, f"{url}/kv_event_sources")
    if status != 200:
        return []
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    entries = list(said.values()) if isinstance(said, dict) else said
    found = [_publisher(one, url) for one in entries] if isinstance(entries, list) else []
    return [one for one in found if one is not None]


def _publisher(said: Any, url: str) -> Publisher | None:
    """One entry: a value of vLLM's map of data-parallel ranks."""
    if not isinstance(said, dict) or said.get("publisher", "zmq") != "zmq":
        return None
    endpoint, replay, topic = (said.get(k) for k in ("endpoint", "replay_endpoint", "topic"))
    if not isinstance(endpoint, str) or not endpoint:
        return None
    return Publisher(
        endpoint=dialled(endpoint, url),
        replay=dialled(replay, url) if isinstance(replay, str) and replay else "",
        topic=topic if isinstance(topic, str) else "",
    )


def dialled(endpoint: str, url: str) -> str:
    """An endpoint that is bound to all of a machine's addresses, as others dial it."""
    host = urlsplit(url).hostname or ""
    host = f"[{host}]" if ":" in host else host
    for every in ("tcp://*:", "tcp://0.0.0.0:", "tcp://[::]:", "tcp://:::"):
        if endpoint.startswith(every):
            return f"tcp://{host}:{endpoint.removeprefix(every)}"
    return endpoint


async def _get(session: aiohttp.ClientSession, url: str) -> tuple[int, bytes]:
    try:
        async with session.get(url, timeout=_TIMEOUT, allow_redirects=False) as response:
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > _MAX_PAGE_BYTES:
                    raise Unreachable(f"its {urlsplit(url).path} is over {_MAX_PAGE_BYTES} bytes")
            return response.status, bytes(body)
    except aiohttp.ClientConnectorError as error:
        refused = error.os_error.errno == errno.ECONNREFUSED
        raise Unreachable(
            "nothing listens there" if refused else "no connection", refused=refused
        ) from None
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise Unreachable(f"no answer: {type(error).__name__}") from None
