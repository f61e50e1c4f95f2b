"""The simulated engine as a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple


class EngineProcess(NamedTuple):
    """`ready` is the line it printed when it listened; `url` is in it."""

    process: Process
    ready: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.ready["url"])

    async def ended(self, *, timeout_s: float = 8.0) -> int:
        """The exit code."""
        return await asyncio.wait_for(self.process.wait(), timeout_s)


async def start(*flags: str, environ: dict[str, str] | None = None) -> Process:
    """Only started: it may not listen yet, or never."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DETOSERVE_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "agent.simulated",
        *flags,
        stdout=PIPE,
        stderr=PIPE,
        env=inherited | (environ or {}),
    )


async def ready_line(process: Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 30)
    assert line, "the engine ended without listening"
    return dict(json.loads(line))


@asynccontextmanager
async def engine_process(
    *flags: str, environ: dict[str, str] | None = None
) -> AsyncIterator[EngineProcess]:
    """A listening engine; killed at the end if it is still there."""
    process = await start(*flags, environ=environ)
    try:
        yield EngineProcess(process, await ready_line(process))
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
