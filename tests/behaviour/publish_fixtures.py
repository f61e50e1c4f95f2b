"""A real Valkey and leases for the tests of publishing; and git repositories made by hand."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from redis.asyncio import Redis

from reconciler.publish.lease import Lease, boottime_s
from reconciler.publish.redis_edge import connect
from reconciler.publish.valkey import EmbeddedValkey


@asynccontextmanager
async def running_valkey(directory: Path) -> AsyncIterator[tuple[EmbeddedValkey, Redis]]:
    async with EmbeddedValkey(directory) as valkey:
        redis = connect(valkey.url)
        try:
            yield valkey, redis
        finally:
            await redis.aclose()


def lease(generation: int, *, ttl_s: float = 60.0) -> Lease:
    return Lease(generation, boottime_s() + ttl_s, "test")


def git(where: Path, *args: str, stdin: str | None = None) -> str:
    """Runs git as a person would, with a name and without anybody's settings."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(where),
        "GIT_CONFIG_NOSYSTEM": "1",
        **{f"GIT_{role}_NAME": "Ada" for role in ("AUTHOR", "COMMITTER")},
        **{f"GIT_{role}_EMAIL": "ada@example.org" for role in ("AUTHOR", "COMMITTER")},
    }
    done = subprocess.run(
        ["git", "-C", str(where), *args],
        input=stdin, env=env, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"git {args}: {done.stderr}"
    return done.stdout.strip()
