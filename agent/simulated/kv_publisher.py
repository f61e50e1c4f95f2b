"""KV events over ZMQ, numbered, with replay.

A message is three frames: topic, sequence number (8 bytes, big-endian, from 0 at each start), and
the payload (kv_events). A DEALER that sends `[b"", first sequence number]` to the replay endpoint
gets `[b"", topic, number, payload]` for each batch still buffered, and then `[b"", b"", ff*8, b""]`.

Not here: what the events say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import zmq
import zmq.asyncio

from agent.simulated.kv_events import Event, encode_batch
from agent.simulated.settings import KVEventSettings

_END_OF_REPLAY = b"\xff" * 8
_HIGH_WATER_MARK = 100_000
_LOG = logging.getLogger(__name__)


class KVEventPublisher:
    """A PUB socket and, if asked for, a ROUTER for replay. Never blocks: slow subscribers lose
    messages, see a gap in the numbers, and replay.
    """

    def __init__(self, settings: KVEventSettings) -> None:
        """Binds or dials at once.

        Raises:
            OSError: when an endpoint cannot be used; the message names it.
        """
        self._settings = settings
        self._topic = settings.topic.encode()
        self._sequence_number = 0
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=settings.buffer_steps)
        self._context = zmq.Context()
        # A plain PUB: sending is one call without a wait, and order is the order of calls.
        self._pub = self._context.socket(zmq.PUB)
        self._pub.set_hwm(_HIGH_WATER_MARK)
        self._replay = zmq.asyncio.Socket(self._context, zmq.ROUTER)
        self._replay.set_hwm(_HIGH_WATER_MARK)
        self._replay_task: asyncio.Task[None] | None = None
        self.replay_endpoint: str | None = None
        try:
            self.endpoint = _open(self._pub, settings.endpoint)
            if settings.replay_endpoint is not None:
                self.replay_endpoint = _open(self._replay, settings.replay_endpoint, bind=True)
                self._replay_task = asyncio.create_task(self._serve_replay())
        except OSError:
            self._close_sockets()
            raise

    @property
    def source(self) -> dict[str, Any]:
        """The entry of /kv_event_sources."""
        return {
            "data_parallel_rank": 0,
            "endpoint": self.endpoint,
            "replay_endpoint": self.replay_endpoint,
            "topic": self._settings.topic,
        }

    def publish(self, events: Sequence[Event]) -> None:
        """Sends one batch and keeps it for replay."""
        payload = encode_batch(events, timestamp_s=time.time(), form=self._settings.format)
        number = self._sequence_number
        self._sequence_number += 1
        self._buffer.append((number, payload))
        self._pub.send_multipart((self._topic, number.to_bytes(8, "big"), payload), zmq.NOBLOCK)

    async def close(self) -> None:
        if self._replay_task is not None:
            self._replay_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._replay_task
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._pub.close(linger=0)
        self._replay.close(linger=0)
        self._context.term()

    async def _serve_replay(self) -> None:
        while True:
            frames = await self._replay.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                _LOG.warning("replay request of %d frames ignored; three are needed", len(frames))
                continue
            client, _, start = frames
            first = int.from_bytes(start, "big")
            for number, payload in [entry for entry in self._buffer if entry[0] >= first]:
                answer = (client, b"", self._topic, number.to_bytes(8, "big"), payload)
                await self._replay.send_multipart(answer)
            await self._replay.send_multipart((client, b"", b"", _END_OF_REPLAY, b""))


def _open(socket: zmq.Socket[Any], endpoint: str, *, bind: bool = False) -> str:
    """Returns the endpoint with the port filled in, as others can dial it from this machine."""
    try:
        if bind or "*" in endpoint or "::" in endpoint:
            socket.bind(endpoint)
            resolved: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
            return resolved.replace("//0.0.0.0:", "//127.0.0.1:")
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise OSError(error.errno, f"KV events at {endpoint}: {error.strerror}") from error
    return endpoint
