"""An agent beside real engines: what it hears, what it makes of restarts and gaps, what it keeps to itself."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from agent.finding import Address
from agent.finding.static import StaticEngines
from agent.kv_source import Publisher
from agent.publishing.to_redis import ToRedis
from schemas.wire import redis_keys
from schemas.wire.events import AgentHeartbeat, EngineReport
from schemas.wire.token_blocks import chain, chain_root
from tests.behaviour.agent.engine_clients import post
from tests.behaviour.agent.engine_process import engine_process
from tests.behaviour.agent.following import (
    EVENT_FLAGS,
    HASH_KEY,
    SMALL,
    Kept,
    Listed,
    running_agent,
    stream_of,
)
from tests.behaviour.publish_fixtures import running_valkey
from tests.support import eventually, free_port

TEXT = "the canary sings of things that nobody may hear " * 8


async def ask(url: str, text: str, **fields: Any) -> None:
    status, _ = await post(
        f"{url}/v1/completions", {"model": "simulated", "prompt": text, "max_tokens": 1} | fields
    )
    assert status == 200


async def names(url: str, text: str, *, salt: str = "") -> list[int]:
    """As a router would name the blocks of a prompt, from the engine's own tokens."""
    _, answer = await post(f"{url}/tokenize", {"model": "simulated", "prompt": text})
    return chain(HASH_KEY, chain_root(HASH_KEY, salt=salt), answer["tokens"], 16)


async def test_load_capacity_and_cache_of_an_engine() -> None:
    sink = Kept()
    flags = (*SMALL, *EVENT_FLAGS, "--num-blocks", "512")
    async with engine_process(*flags) as engine, running_agent(Listed({"r0": engine.url}), sink):
        await eventually(lambda: sink.reports["r0"].events)
        await ask(engine.url, TEXT, cache_salt="tenant-a")
        expected = await names(engine.url, TEXT, salt="tenant-a")
        assert len(expected) > 3
        await eventually(lambda: set(expected) <= sink.held("r0"))
        await eventually(lambda: sink.reports["r0"].stored_tokens == 16 * len(expected))
        report = sink.reports["r0"]
        assert (report.capacity_blocks, report.block_tokens, report.clears) == (512, 16, 0)
        assert (report.running, report.waiting) == (0, 0)
        assert set(await names(engine.url, TEXT)).isdisjoint(sink.held("r0"))  # another salt

        await post(f"{engine.url}/reset_prefix_cache")
        await ask(engine.url, "x" * 64)  # events go out with a step
        await eventually(lambda: sink.reports["r0"].clears == 1)
        await eventually(lambda: not set(expected) & sink.held("r0"))
        await eventually(lambda: sink.snapshots and sink.heartbeat)
        assert sink.heartbeat is not None
        assert sink.heartbeat.replicas == ("r0",)
        assert sink.heartbeat.problems == {}


async def test_events_from_before_the_agent_are_replayed() -> None:
    sink = Kept()
    async with engine_process(*SMALL, *EVENT_FLAGS) as engine:
        await ask(engine.url, TEXT)
        async with running_agent(Listed({"r0": engine.url}), sink):
            expected = await names(engine.url, TEXT)
            await eventually(lambda: set(expected) <= sink.held("r0"))


async def test_the_older_form_and_evictions() -> None:
    sink = Kept()
    flags = (*EVENT_FLAGS, "--kv-events-format", "array", "--num-blocks", "128")
    async with (
        engine_process(*SMALL, *flags) as engine,
        running_agent(Listed({"r0": engine.url}), sink),
    ):
        for letter in "abcdef":
            await ask(engine.url, letter * 4 * 16 * 30)
        first = await names(engine.url, "a" * 4 * 16 * 30)
        last = await names(engine.url, "f" * 4 * 16 * 30)
        await eventually(lambda: set(last) <= sink.held("r0"))
        assert not set(first) <= sink.held("r0")
        await eventually(lambda: sink.reports["r0"].removed_tokens > 0)


async def test_a_killed_engine_is_forgotten_and_its_successor_starts_empty() -> None:
    sink = Kept()
    port, events, replay = (free_port() for _ in range(3))
    flags = (
        *SMALL, "--port", str(port),
        "--kv-events-endpoint", f"tcp://*:{events}",
        "--kv-events-replay-endpoint", f"tcp://*:{replay}",
    )  # fmt: skip
    async with engine_process(*flags) as first, running_agent(Listed({"r0": first.url}), sink):
        await ask(first.url, TEXT)
        expected = await names(first.url, TEXT)
        await eventually(lambda: set(expected) <= sink.held("r0"))
        before = sink.reports["r0"]
        first.process.send_signal(signal.SIGKILL)
        await first.process.wait()
        # Told at once, by the connection that broke and a port where nobody listens.
        await eventually(lambda: sink.reports["r0"].clears > before.clears)
        assert sink.held("r0") == set()

        async with engine_process(*flags) as second:
            await ask(second.url, "another prompt altogether " * 8)
            fresh = await names(second.url, "another prompt altogether " * 8)
            await eventually(lambda: sink.reports["r0"].epoch != before.epoch)
            await eventually(lambda: set(fresh) <= sink.held("r0"))
            assert not set(expected) & sink.held("r0")


class FakePublisher:
    """A publisher whose every word the test chooses, and which keeps for replay what it is told to."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._pub = self._context.socket(zmq.XPUB)
        self._router = self._context.socket(zmq.ROUTER)
        self.kept: list[tuple[int, bytes]] = []
        self.asked: list[int] = []
        ports = [s.bind_to_random_port("tcp://127.0.0.1") for s in (self._pub, self._router)]
        self.publisher = Publisher(*(f"tcp://127.0.0.1:{port}" for port in ports))
        self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            client, _, start = await self._router.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            for number, payload in self.kept:
                if number >= self.asked[-1]:
                    frames = [client, b"", b"", number.to_bytes(8, "big"), payload]
                    await self._router.send_multipart(frames)
            await self._router.send_multipart([client, b"", b"", b"\xff" * 8, b""])

    async def subscribed(self) -> None:
        await asyncio.wait_for(self._pub.recv(), 10)

    async def say(self, number: int, payload: bytes, *, keep: bool = True) -> None:
        if keep:
            self.kept.append((number, payload))
        await self._pub.send_multipart([b"", number.to_bytes(8, "big"), payload])

    async def close(self) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._context.destroy(linger=0)


def a_block(number: int, *, at: float = 1.0) -> bytes:
    event = ["BlockStored", [number], None, [number] * 16, 16, None, "GPU", None]
    return msgspec.msgpack.encode([at, [event], 0])


def name(number: int) -> int:
    return chain(HASH_KEY, chain_root(HASH_KEY), [number] * 16, 16)[0]


async def test_what_was_missed_is_replayed_and_what_cannot_be_is_forgotten() -> None:
    sink, fake = Kept(), FakePublisher()
    async with engine_process(*SMALL) as engine:
        finder = StaticEngines([Address(engine.url, "r0", (fake.publisher,))])
        async with running_agent(Listed({"r0": engine.url}), sink, finder=finder):
            await fake.subscribed()
            await fake.say(0, a_block(0))
            await eventually(lambda: sink.held("r0") == {name(0)})
            fake.kept.append((1, a_block(1)))  # lost on its way
            await fake.say(2, a_block(2))
            await eventually(lambda: sink.held("r0") == {name(0), name(1), name(2)})
            assert 1 in fake.asked
            assert sink.reports["r0"].clears == 0

            fake.kept.clear()
            await fake.say(9, a_block(9))  # 3 to 8 are gone for good
            await eventually(lambda: sink.held("r0") == {name(9)})
            await eventually(lambda: sink.reports["r0"].clears == 1)

            # The same number with other bytes: a process that began anew behind the same address.
            epoch = sink.reports["r0"].epoch
            fake.kept.clear()
            await fake.say(0, a_block(50, at=2.0))
            await eventually(lambda: sink.held("r0") == {name(50)})
            await eventually(lambda: sink.reports["r0"].epoch != epoch)
            await fake.say(0, a_block(50, at=2.0))  # said twice
            await fake.say(1, a_block(51, at=2.0))
            await eventually(lambda: sink.held("r0") == {name(50), name(51)})
    await fake.close()


async def test_events_that_cannot_be_heard_are_not_said_to_be() -> None:
    """Counts that stand still would else look like an engine that stores nothing."""
    sink = Kept()
    nobody = Publisher(f"tcp://127.0.0.1:{free_port()}")
    async with engine_process(*SMALL) as engine:
        finder = StaticEngines([Address(engine.url, "r0", (nobody,))])
        async with running_agent(Listed({"r0": engine.url}), sink, finder=finder):
            await eventually(lambda: sink.reports["r0"].capacity_blocks > 0)
            first = sink.reports["r0"]
            await eventually(lambda: sink.reports["r0"].at > first.at + 0.2)
            assert not sink.reports["r0"].events


async def test_poison_costs_what_is_known_and_no_more() -> None:
    sink, fake = Kept(), FakePublisher()
    async with engine_process(*SMALL) as engine:
        finder = StaticEngines([Address(engine.url, "r0", (fake.publisher,))])
        async with running_agent(Listed({"r0": engine.url}), sink, finder=finder):
            await fake.subscribed()
            await fake.say(0, a_block(0))
            await eventually(lambda: sink.held("r0") == {name(0)})
            await fake.say(1, b"\xc1 not msgpack")
            await eventually(lambda: sink.reports["r0"].clears == 1)
            assert sink.held("r0") == set()
            await fake.say(2, a_block(2))
            await eventually(lambda: sink.held("r0") == {name(2)})
    await fake.close()


async def test_engines_come_and_go_with_the_table() -> None:
    sink, table = Kept(), Listed()
    async with (
        engine_process(*SMALL) as one,
        engine_process(*SMALL) as other,
        running_agent(table, sink) as agent,
    ):
        followed: list[tuple[str, ...]] = []
        agent.on_followed = followed.append
        table.table = {"r0": one.url}
        await eventually(lambda: sink.reports.keys() == {"r0"})
        assert not sink.reports["r0"].events  # it publishes none
        table.table = {"r1": other.url}
        await eventually(lambda: "r1" in sink.reports)
        await eventually(lambda: followed[-1] == ("r1",))


async def test_what_is_wrong_with_an_engine_stands_in_the_heartbeat() -> None:
    sink = Kept()
    async with running_agent(Listed({"r0": f"http://127.0.0.1:{free_port()}"}), sink):
        await eventually(lambda: sink.heartbeat and sink.heartbeat.problems)
        assert sink.heartbeat is not None
        assert sink.heartbeat.problems == {"r0": "nothing listens there"}


async def test_redis_gets_names_and_numbers_but_no_prompt_and_no_salt(tmp_path: Path) -> None:
    async with (
        running_valkey(tmp_path) as (_, redis),
        engine_process(*SMALL, *EVENT_FLAGS) as engine,
    ):
        sink = ToRedis(redis, report_ttl_s=5.0, heartbeat_ttl_s=5.0)
        async with running_agent(Listed({"r0": engine.url}), sink):
            await ask(engine.url, TEXT, cache_salt="salt-of-tenant-a")
            expected = await names(engine.url, TEXT, salt="salt-of-tenant-a")

            async def arrived() -> bool:
                batches = await stream_of(redis, "r0")
                return set(expected) <= {n for b in batches for n in _names(b.stored)}

            await eventually(arrived)
            await eventually(lambda: redis.get(redis_keys.kv_snapshot("r0")))
            data = await redis.get(redis_keys.engine("r0"))
            assert data is not None
            report = msgspec.msgpack.decode(data, type=EngineReport)
            assert (report.replica, report.block_tokens) == ("r0", 16)
            assert 0 < await redis.pttl(redis_keys.engine("r0")) <= 5000
            beat = msgspec.msgpack.decode(
                await redis.get(redis_keys.agent("test")), type=AgentHeartbeat
            )
            assert beat.replicas == ("r0",)
            _, answer = await post(f"{engine.url}/tokenize", {"model": "simulated", "prompt": TEXT})
            tokens = msgspec.msgpack.encode(answer["tokens"][:16])[3:]
            everything = b""
            for key in await redis.keys("*"):
                everything += key
                kind = await redis.type(key)
                if kind == b"string":
                    everything += await redis.get(key)
                elif kind == b"stream":
                    everything += b"".join(
                        value for _, fields in await redis.xrange(key) for value in fields.values()
                    )
            assert b"r0" in everything
            for secret in (b"canary", b"salt-of-tenant-a", tokens, HASH_KEY):
                assert secret not in everything


def _names(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[i : i + 8], "big") for i in range(0, len(packed), 8)]


async def test_words_wait_while_redis_is_away(tmp_path: Path) -> None:
    async with (
        running_valkey(tmp_path) as (valkey, redis),
        engine_process(*SMALL, *EVENT_FLAGS) as engine,
    ):
        sink = ToRedis(redis, report_ttl_s=5.0, heartbeat_ttl_s=5.0)
        async with running_agent(Listed({"r0": engine.url}), sink):
            await eventually(lambda: redis.get(redis_keys.engine("r0")))
            await redis.config_set("maxmemory", "1")  # every write is refused
            await ask(engine.url, TEXT)
            expected = set(await names(engine.url, TEXT))
            await redis.config_set("maxmemory", "0")

            async def arrived() -> bool:
                batches = await stream_of(redis, "r0")
                return expected <= {n for b in batches for n in _names(b.stored)}

            await eventually(arrived)
            assert valkey.url
