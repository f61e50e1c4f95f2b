"""What every inference request passes: counting, draining, and the faults that are due.

Not here: which faults are due (faults), and what a request is answered with (openai_api).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from agent.simulated.answers import ApiError
from agent.simulated.engine import Engine
from agent.simulated.faults import Fault
from agent.simulated.state import ServerState


class Died(asyncio.CancelledError):
    """The connection was reset on purpose.

    A cancellation, as it is when the client resets it: the server then closes without an answer.
    """


@dataclass(slots=True)
class Cut:
    """Where an answer breaks off: after so many more chunks, by a reset or by silence."""

    chunks: int
    fault: Fault

    async def write(
        self, request: web.Request, response: web.StreamResponse, chunks: list[bytes]
    ) -> None:
        """Writes chunks as far as the cut, and does not return from there.

        Raises:
            Died: when the connection was reset.
        """
        await response.write(b"".join(chunks[: self.chunks]))
        if len(chunks) < self.chunks:
            self.chunks -= len(chunks)
            return
        if self.fault is Fault.STALL_MID_STREAM:
            await asyncio.Event().wait()
        _reset(request)
        raise Died("connection reset on purpose")


Handler = Callable[[web.Request, Cut | None], Awaitable[web.StreamResponse]]


class Gate:
    """Wraps the handlers of inference endpoints."""

    def __init__(self, engine: Engine, state: ServerState) -> None:
        self._engine = engine
        self._state = state

    def inference(self, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """A handler that is counted and struck by faults; `handler` gets the cut that is due."""
        state = self._state

        async def counted(request: web.Request) -> web.StreamResponse:
            state.enter()
            try:
                response = await self._struck(request, handler)
            except Died:
                state.failed += 1
                raise
            except asyncio.CancelledError:  # the client has left
                state.aborted += 1
                raise
            except ConnectionError:  # the same, met while writing
                state.aborted += 1
                raise asyncio.CancelledError from None
            except Exception:
                state.failed += 1
                raise
            finally:
                state.leave()
            if self._engine.failed:
                state.failed += 1
            else:
                state.succeeded += 1
            return response

        return counted

    async def _struck(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._state.draining:
            raise ApiError(
                500, "cannot schedule new futures after shutdown", kind="InternalServerError"
            )
        if self._engine.failed:
            raise engine_dead()
        faults = self._state.faults
        match self._state.strike():
            case Fault.HANG:
                await asyncio.Event().wait()
            case Fault.FAIL:
                raise ApiError(
                    faults.status,
                    faults.message,
                    kind="InternalServerError",
                    retry_after_s=faults.retry_after_s,
                )
            case Fault.DIE_MID_STREAM | Fault.STALL_MID_STREAM as fault:
                return await handler(request, Cut(faults.after_chunks, fault))
        return await handler(request, None)


def engine_dead() -> ApiError:
    """What requests get when the engine loop has died, in vLLM's words."""
    return ApiError(
        500,
        "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        kind="InternalServerError",
    )


def _reset(request: web.Request) -> None:
    """Closes the connection with RST: to a client this is a crash, not an end."""
    transport = request.transport
    if transport is None:
        return
    raw = transport.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
