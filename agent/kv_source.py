"""One publisher of KV events over ZMQ: subscribed to, replayed where a number is missing, known again.

A connection that comes back may lead to another process. It is the same if it can replay the last
batch seen, byte for byte; if it cannot, nothing of what was known is kept. Not here: what the events
say (core), or which publishers an engine has (engine_link).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from agent.core.kv_events import Event, PayloadInvalid, decode
from agent.core.sequence import Sequence

_log: Final = logging.getLogger(__name__)

_HIGH_WATER_MARK: Final = 100_000
_HEARTBEAT_MS: Final = 2_000
_RECONNECT_MAX_MS: Final = 2_000
_END_OF_REPLAY: Final = b"\xff" * 8
_MAX_FRAME_BYTES: Final = 64 * 2**20
DEFAULT_REPLAY_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Publisher:
    """Where one process publishes. `replay` is empty where it keeps nothing for replay."""

    endpoint: str
    replay: str = ""
    topic: str = ""


class Listener(Protocol):
    """Who hears of the events."""

    def events(self, events: list[Event]) -> None:
        """The next batch.

        Raises:
            PayloadInvalid: it cannot be; counts as lost.
        """

    async def restarted(self) -> None:
        """Another process publishes there now; its events follow from the first that it still has."""

    def lost(self) -> None:
        """Events are missing for good; what follows stands by itself."""

    def disconnected(self) -> None:
        """Nobody is there at the moment."""


class _ReplayFailed(Exception):
    """The publisher does not answer as it should."""


class KvSource:
    """Follows one publisher until cancelled."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        publisher: Publisher,
        listener: Listener,
        *,
        replay_timeout_s: float = DEFAULT_REPLAY_TIMEOUT_S,
        said: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`said` gets what is wrong, for people; "" when it is right again."""
        self._context = context
        self._publisher = publisher
        self._listener = listener
        self._replay_timeout_s = replay_timeout_s
        self._said = said
        self._sequence = Sequence()
        self._joined = False
        self.connected = False
        """Whether every event arrives."""

    async def run(self) -> None:
        """Raises: zmq.ZMQError: the endpoint is none."""
        subscriber = self._context.socket(zmq.SUB)
        subscriber.set_hwm(_HIGH_WATER_MARK)
        subscriber.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        subscriber.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        subscriber.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * _HEARTBEAT_MS)
        subscriber.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)
        subscriber.setsockopt(zmq.LINGER, 0)
        monitor = subscriber.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        poller = zmq.asyncio.Poller()
        try:
            subscriber.subscribe(self._publisher.topic.encode())
            poller.register(monitor, zmq.POLLIN)
            poller.register(subscriber, zmq.POLLIN)
            subscriber.connect(self._publisher.endpoint)
            while True:
                ready = dict(await poller.poll())
                if monitor in ready:
                    message = parse_monitor_message(await monitor.recv_multipart())
                    await self._monitored(message["event"])
                if subscriber in ready:
                    frames = await subscriber.recv_multipart()
                    if len(frames) == 3 and len(frames[1]) == 8:
                        await self._received(int.from_bytes(frames[1], "big"), frames[2])
                    else:
                        self._said("its KV events are not [topic, number, payload]")
        finally:
            subscriber.disable_monitor()
            subscriber.close(linger=0)

    async def _monitored(self, event: int) -> None:
        if event == zmq.EVENT_DISCONNECTED:
            self.connected = False
            self._listener.disconnected()
            return
        again, self._joined = self._joined, True
        await self._catch_up(again=again)
        self.connected = True

    async def _catch_up(self, *, again: bool) -> None:
        """After a connection: is it the process from before, and what has been missed?"""
        last = self._sequence.last
        if not self._publisher.replay:
            if again:
                self._forget()
            return
        try:
            missed = await self._replay(last or 0)
        except _ReplayFailed as error:
            self._said(str(error))
            if again:
                self._forget()
            return
        self._said("")
        if last is not None:
            first = missed[0] if missed else None
            if first is None or (first[0] == last and self._sequence.judge(*first) != "again"):
                await self._restart()
                return
            if first[0] > last:  # the one by which to know it again is not kept any more
                self._forget()
        for number, payload in missed:
            if number >= self._sequence.expected:
                self._apply(number, payload)

    async def _received(self, number: int, payload: bytes) -> None:
        verdict = self._sequence.judge(number, payload)
        if verdict == "gap":
            await self._fill()
            verdict = self._sequence.judge(number, payload)
        if verdict == "restart":
            await self._restart()
        elif verdict != "again":
            self._apply(number, payload)

    async def _fill(self) -> None:
        """Replays what is missing."""
        if not self._publisher.replay:
            return
        try:
            missed = await self._replay(self._sequence.expected)
        except _ReplayFailed as error:
            self._said(str(error))
            return
        self._said("")
        for number, payload in missed:
            if number >= self._sequence.expected:
                self._apply(number, payload)

    async def _restart(self) -> None:
        """Another process: from its first batch on."""
        self._sequence.restart()
        await self._listener.restarted()
        if not self._publisher.replay:
            return
        try:
            missed = await self._replay(0)
        except _ReplayFailed as error:
            self._said(str(error))
            return
        self._said("")
        for number, payload in missed:
            self._apply(number, payload)

    def _apply(self, number: int, payload: bytes) -> None:
        """The next batch; what is missing before it is lost."""
        if number > self._sequence.expected and self._sequence.last is not None:
            self._listener.lost()
        self._sequence.accept(number, payload)
        try:
            self._listener.events(decode(payload))
        except PayloadInvalid as error:
            self._said(str(error))
            self._listener.lost()

    def _forget(self) -> None:
        if self._sequence.last is not None:
            self._sequence.restart()
            self._listener.lost()

    async def _replay(self, first: int) -> list[tuple[int, bytes]]:
        """(number, payload) of every batch from `first` on that the publisher still has.

        Raises:
            _ReplayFailed: it has not answered in time, or not as vLLM does.
        """
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)
        dealer.set_hwm(_HIGH_WATER_MARK)
        batches: list[tuple[int, bytes]] = []
        try:
            dealer.connect(self._publisher.replay)
            await dealer.send_multipart([b"", first.to_bytes(8, "big")])
            while True:
                async with asyncio.timeout(self._replay_timeout_s):
                    frames = await dealer.recv_multipart()
                if len(frames) != 4 or len(frames[2]) != 8:
                    raise _ReplayFailed("its replay of KV events is not what vLLM sends")
                if frames[2] == _END_OF_REPLAY:
                    return batches
                batches.append((int.from_bytes(frames[2], "big"), frames[3]))
        except TimeoutError:
            raise _ReplayFailed(
                f"it replays no KV events within {self._replay_timeout_s:g} s"
            ) from None
        except zmq.ZMQError as error:
            raise _ReplayFailed(f"its replay endpoint cannot be used: {error.strerror}") from None
        finally:
            dealer.close(linger=0)
