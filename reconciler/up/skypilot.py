"""A SkyPilot API server on this machine for `detoserve up --skypilot`: the one there is, or an own one.

Not here: what is asked of it (backends.skypilot). Services that it runs are no processes of ours: they
go on after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import psutil

from reconciler.backends.skypilot import ApiSettings, SkyPilotApi
from reconciler.errors import BackendUnreachable, Stalled
from reconciler.up.children import Child

LOCAL_PORT: Final = 46580
"""SkyPilot's own choice; `SKYPILOT_API_SERVER_LOCAL_PORT` moves it."""
STARTED_WITHIN_S: Final = 90.0
STOPPED_WITHIN_S: Final = 3.0
"""Its requests are on disk; executors that ignore SIGTERM would have it wait for ever."""
_ASK_AGAIN_S: Final = 0.5


@asynccontextmanager
async def local_server(
    state_dir: Path,
    environ: Mapping[str, str],
    *,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> AsyncIterator[ApiSettings]:
    """One that answers. An own one ends with this, however this ends.

    Raises:
        Stalled: SkyPilot is not installed, or does not start.
    """
    port = int(environ.get("SKYPILOT_API_SERVER_LOCAL_PORT") or LOCAL_PORT)
    settings = ApiSettings(f"http://127.0.0.1:{port}", call_timeout_s=5.0)
    if await _answers(settings):
        say(f"SkyPilot's API server at {settings.endpoint}, which was there already")
        yield settings
        return
    if importlib.util.find_spec("sky") is None:
        raise Stalled(
            "--skypilot needs SkyPilot in this environment: pip install 'detoserve[skypilot]'; or set "
            "SKYPILOT_API_SERVER_ENDPOINT to a server that runs elsewhere, and leave the flag out"
        )
    child = Child(
        "skypilot",
        [
            *(sys.executable, "-m", "sky.server.server"),
            *("--host=127.0.0.1", f"--port={port}"),
        ],
        state_dir=state_dir,
        env={
            **environ,
            "IS_SKYPILOT_SERVER": "true",
            "SKYPILOT_API_SERVER_LOCAL_PORT": str(port),
            "SKYPILOT_API_SERVER_ENDPOINT": settings.endpoint,
        },
        on_line=lambda _: None,
        on_failure=warn,
        stop_timeout_s=STOPPED_WITHIN_S,
    )
    say("starting SkyPilot's API server; its first start takes a while")
    running = asyncio.create_task(child.run())
    try:
        await _until_it_answers(settings, child, state_dir)
        say(f"SkyPilot's API server at {settings.endpoint}")
        yield settings
    finally:
        sessions = child.sessions
        await child.stop()
        running.cancel()
        await asyncio.wait({running})
        # Its executors do not end with it.
        await asyncio.to_thread(_end_sessions, sessions)


async def _until_it_answers(settings: ApiSettings, child: Child, state_dir: Path) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STARTED_WITHIN_S):
            while not await _answers(settings):
                if child.restarts >= 2:
                    break
                await asyncio.sleep(_ASK_AGAIN_S)
            else:
                return
    raise Stalled(
        f"SkyPilot's API server does not start; see {state_dir / 'logs' / 'skypilot.log'}"
    )


async def _answers(settings: ApiSettings) -> bool:
    api = SkyPilotApi(settings, "up")
    try:
        return (await api.health()).status == "healthy"
    except BackendUnreachable:
        return False
    finally:
        await api.close()


def _end_sessions(leaders: frozenset[int]) -> None:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) in leaders and process.pid not in (0, os.getpid()):
                os.kill(process.pid, signal.SIGKILL)
