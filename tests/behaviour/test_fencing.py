"""Two reconcilers, whatever happens between them: routers are never taken back."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from reconciler.errors import Fenced, Transient
from reconciler.publish import signing_key
from reconciler.publish.lease import Leaser
from reconciler.publish.routes import RoutesPublisher
from schemas.wire import redis_keys
from schemas.wire.envelope import unseal
from schemas.wire.routing import Function, RoutingTable, content_digest
from tests.behaviour.publish_fixtures import lease, running_valkey
from tests.support import eventually

KEY = Ed25519PrivateKey.generate()


def table(name: str) -> RoutingTable:
    functions = (Function(name=name, served_name=name),)
    return RoutingTable(generation=0, revision="r", published_at=0.0, functions=functions)


WRITER = """
import asyncio, sys
from pathlib import Path
from reconciler.publish import signing_key
from reconciler.publish.lease import Leaser
from reconciler.publish.redis_edge import connect
from reconciler.publish.routes import RoutesPublisher
from schemas.wire.routing import Function, RoutingTable

async def main():
    redis = connect(sys.argv[1])
    folder = Path(sys.argv[2])
    routes = RoutesPublisher(redis, signing_key.load_or_create(folder / "key"), folder / "old")
    held = await Leaser(redis, "old", ttl_s=0.5, timeout_s=0.4).acquire()
    if sys.argv[3] == "believes":
        # As if it had asked its clock right before it was stopped.
        object.__setattr__(held, "expires_at", float("inf"))
    n = 0
    while True:
        n += 1
        functions = (Function(name=f"old{n}", served_name="x"),)
        content = RoutingTable(
            generation=0, revision="r", published_at=0.0, functions=functions
        )
        try:
            generation = await routes.publish(content, lease=held)
        except Exception as error:
            print(type(error).__name__, flush=True)
            return
        if n == 3:
            print("publishing", flush=True)

asyncio.run(main())
"""


async def stopped_past_its_lease(tmp_path: Path, how: str) -> str:
    async with running_valkey(tmp_path / "valkey") as (server, redis):
        key = signing_key.load_or_create(tmp_path / "key")
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, server.url, str(tmp_path), how],
            stdout=subprocess.PIPE,
            text=True,
        ) as old:
            assert old.stdout is not None
            assert await asyncio.to_thread(old.stdout.readline) == "publishing\n"
            old.send_signal(signal.SIGSTOP)
            held = await eventually(Leaser(redis, "new").acquire)
            routes = RoutesPublisher(redis, key, tmp_path / "new")
            generation = await routes.publish(table("new"), lease=held)
            old.send_signal(signal.SIGCONT)
            out, _ = await asyncio.to_thread(old.communicate)
        data = await redis.get(redis_keys.ROUTES_CURRENT)
        assert data is not None
        current = unseal(data, RoutingTable, key.public_key())
        assert (current.generation, current.functions[0].name) == (generation, "new")
        return out.strip()


async def test_a_holder_stopped_past_its_lease_stops_by_itself(tmp_path: Path) -> None:
    assert await stopped_past_its_lease(tmp_path, "asks") in {"LeaseLost", "Fenced"}


async def test_one_that_still_believes_in_its_lease_is_refused(tmp_path: Path) -> None:
    assert await stopped_past_its_lease(tmp_path, "believes") == "Fenced"


steps = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(0, 1), st.integers(0, 3)),
        st.tuples(st.just("refresh"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("restart"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("take the lease"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("empty redis"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


class Router:
    """What a router does with tables: never an older generation, never two with one number."""

    def __init__(self) -> None:
        self.seen: dict[int, str] = {}
        self.generation = 0

    async def look(self, redis: Redis) -> None:
        data = await redis.get(redis_keys.ROUTES_CURRENT)
        if data is None:
            return
        current = unseal(data, RoutingTable, KEY.public_key())
        number = await redis.get(redis_keys.ROUTES_GENERATION)
        assert number == b"%d" % current.generation
        digest = content_digest(current)
        assert self.seen.setdefault(current.generation, digest) == digest
        self.generation = max(self.generation, current.generation)


async def play(script: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with running_valkey(Path(folder)) as (_, redis):
            files = [Path(folder) / f"routes{n}" for n in range(2)]
            publishers = [RoutesPublisher(redis, KEY, file) for file in files]
            router = Router()
            newest, leases = 1, [1, 0]
            await redis.set(redis_keys.LEASE_GENERATION, newest)
            for what, who, content in script:
                before = await redis.get(redis_keys.ROUTES_CURRENT)
                mine, fenced = lease(leases[who]), False
                try:
                    match what:
                        case "publish":
                            # The floor is what the loop knows from heartbeats.
                            generation = await publishers[who].publish(
                                table(str(content)), lease=mine, floor=router.generation
                            )
                            assert generation >= router.generation
                        case "refresh":
                            if await publishers[who].refresh(mine) is None:
                                continue
                        case "restart":
                            publishers[who] = RoutesPublisher(redis, KEY, files[who])
                        case "take the lease":
                            newest += 1
                            leases[who] = newest
                            await redis.set(redis_keys.LEASE_GENERATION, newest)
                        case _:
                            await redis.flushall()
                            # The newest holder is the first to be back.
                            await redis.set(redis_keys.LEASE_GENERATION, newest)
                except Fenced:
                    fenced = True
                except Transient:
                    # Never more than once in a row.
                    again = table(str(content))
                    await publishers[who].publish(again, lease=mine, floor=router.generation)
                if what in {"publish", "refresh"}:
                    assert fenced == (leases[who] < newest)
                if fenced:
                    assert await redis.get(redis_keys.ROUTES_CURRENT) == before
                await router.look(redis)


@settings(max_examples=25, deadline=None)
@given(script=steps)
def test_no_order_of_events_takes_routers_back(script: list[tuple[str, int, int]]) -> None:
    asyncio.run(play(script))
