"""Recorded decisions read back from Redis. Not here: what they mean (core.rescore, core.replay)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, NoReturn, cast

import msgspec
import typer
from redis import Redis
from redis.exceptions import RedisError

from schemas.wire import redis_keys
from schemas.wire.decisions import Decision
from schemas.wire.events import VERSION

RedisUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="DETOSERVE_REDIS_URL",
        help="Redis or Valkey of the routers. [default: that of `detoserve up` in the state directory]",
        show_default=False,
    ),
]
StateDir = Annotated[
    Path,
    typer.Option(metavar="DIR", envvar="DETOSERVE_STATE_DIR", help="Of `detoserve up`."),
]
_PAGE: Final = 500
_TIMEOUT_S: Final = 5.0
_SAID: Final = re.compile(r"[0-9a-f]{1,32}")
_decode: Final = msgspec.msgpack.Decoder(Decision).decode


def fail(message: str) -> NoReturn:
    """Says what is wrong and ends the command.

    Raises:
        typer.Exit: with 2, always.
    """
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


@contextmanager
def connected(url: str | None, state_dir: Path) -> Iterator[Redis]:
    """The routers' Redis. Whatever goes wrong with it ends the command with one line."""
    if url is None:
        told = state_dir / "up" / "redis-url"
        try:
            url = told.read_text(encoding="utf-8").strip()
        except OSError:
            fail(f"no `detoserve up` runs in {state_dir}; give --redis-url or --state-dir")
    try:
        redis = Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
    except ValueError as error:
        fail(f"--redis-url: {error}")
    try:
        yield redis
    except (RedisError, OSError) as error:
        fail(f"Redis: {error}")
    finally:
        redis.close()


def decision_id(said: str) -> str:
    """The id in what a person pasted: the id itself, or a whole `x-detoserve-route`."""
    found = said.strip().rpartition("d=")[2].removeprefix("req_").lower()
    if not _SAID.fullmatch(found):
        fail(f"{said!r} is no decision: give the hex after d= in x-detoserve-route")
    return found


def _streams(redis: Redis, tenant: str | None) -> list[bytes]:
    if tenant is not None:
        return [redis_keys.decisions(tenant).encode()]
    return sorted(redis.scan_iter(match=redis_keys.DECISIONS_PATTERN, count=_PAGE))


def _read(fields: dict[bytes, bytes]) -> Decision | None:
    try:
        decision = _decode(fields[b"d"])
    except (KeyError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return decision if decision.version == VERSION else None


def _newest_first(redis: Redis, stream: bytes) -> Iterator[dict[bytes, bytes]]:
    end = "+"
    while True:
        # redis-py's own types leave out what a client without decode_responses returns.
        page = cast(
            "list[tuple[bytes, dict[bytes, bytes]]]", redis.xrevrange(stream, end, count=_PAGE)
        )
        for _, fields in page:
            yield fields
        if len(page) < _PAGE:
            return
        end = f"({page[-1][0].decode()}"


def find(redis: Redis, wanted: str, tenant: str | None) -> list[Decision]:
    """Every attempt that was recorded of one request, in order; with its outcome where it has one."""
    for stream in _streams(redis, tenant):
        found: dict[int, Decision] = {}
        for fields in _newest_first(redis, stream):
            if fields.get(b"i") == wanted.encode():
                decision = _read(fields)
                if decision is not None:
                    found.setdefault(decision.attempt, decision)
                if 1 in found:
                    break
        if found:
            return [found[attempt] for attempt in sorted(found)]
    return []


def last(redis: Redis, count: int, tenant: str | None, function: str | None) -> list[Decision]:
    """The newest records of each tenant, at most so many in all, oldest first."""
    out: list[Decision] = []
    for stream in _streams(redis, tenant):
        kept: list[Decision] = []
        for fields in _newest_first(redis, stream):
            decision = _read(fields)
            if decision is not None and function in (None, decision.function):
                kept.append(decision)
            if len(kept) >= count:
                break
        out += kept[::-1]
    return sorted(out, key=lambda d: d.at)[-count:]
