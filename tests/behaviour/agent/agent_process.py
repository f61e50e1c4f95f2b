"""`detoserve-agent run` as a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def agent_program(*flags: str) -> AsyncIterator[Process]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DETOSERVE_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent.cli", "run", *flags), stdout=PIPE, stderr=PIPE, env=environ
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line(process: Process) -> dict[str, Any]:
    assert process.stdout is not None
    return dict(json.loads(await asyncio.wait_for(process.stdout.readline(), 20)))
