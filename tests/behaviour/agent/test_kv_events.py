"""KV events as a subscriber on a real ZMQ socket gets them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from openai import AsyncOpenAI

from agent.simulated.server import SimulatedEngine, running_engine
from agent.simulated.settings import EngineSettings, KVEventSettings
from tests.behaviour.agent.engine_clients import engine_and_client, get, post
from tests.support import eventually

BIND = "tcp://127.0.0.1:*"
TOPIC = "kv@engine@chat"
END = b"\xff" * 8

Frames = list[bytes]


@asynccontextmanager
async def socket_of(kind: int) -> AsyncIterator[zmq.asyncio.Socket]:
    context = zmq.asyncio.Context()
    socket = context.socket(kind)
    try:
        yield socket
    finally:
        socket.close(linger=0)
        context.term()


@asynccontextmanager
async def publishing_engine(
    **changes: Any,
) -> AsyncIterator[tuple[SimulatedEngine, AsyncOpenAI, dict[str, Any]]]:
    """(engine, client, its entry of /kv_event_sources)"""
    events = {"endpoint": BIND, "replay_endpoint": BIND, "topic": TOPIC}
    event_settings = {key: changes.pop(key) for key in ("buffer_steps", "format") if key in changes}
    kv_events = KVEventSettings(**events | event_settings)
    async with engine_and_client(kv_events=kv_events, **changes) as (engine, client):
        (source,) = (await get(f"{engine.url}/kv_event_sources"))[1]
        yield engine, client, source


async def ask(client: AsyncOpenAI, text: str, **fields: Any) -> None:
    await client.completions.create(model="simulated", prompt=text, **{"max_tokens": 1} | fields)


async def replay(source: dict[str, Any], first: int) -> list[Frames]:
    """[topic, number, payload] of each batch from `first` on."""
    async with socket_of(zmq.DEALER) as dealer:
        dealer.connect(source["replay_endpoint"])
        await dealer.send_multipart([b"", first.to_bytes(8, "big")])
        batches = []
        while True:
            empty, *batch = await asyncio.wait_for(dealer.recv_multipart(), 5)
            assert empty == b""
            if batch == [b"", END, b""]:
                return batches
            batches.append(batch)


def events_of(payload: bytes) -> list[Any]:
    timestamp, events, rank = msgspec.msgpack.decode(payload)
    assert timestamp > 1e9
    assert rank == 0
    return list(events)


async def test_a_subscriber_follows_and_replays_what_it_missed() -> None:
    async with (
        publishing_engine() as (_, client, source),
        socket_of(zmq.SUB) as subscriber,
    ):
        assert source["topic"] == TOPIC
        assert source["data_parallel_rank"] == 0
        await ask(client, "before anybody listens" * 3)

        subscriber.subscribe(TOPIC)
        subscriber.connect(source["endpoint"])
        asked = 0

        async def first_message() -> Frames | None:
            nonlocal asked
            asked += 1
            await ask(client, f"{asked:064}")  # until the subscription has arrived
            received: Frames | None = None
            if await subscriber.poll(50):
                received = await subscriber.recv_multipart()
            return received

        topic, number, payload = await eventually(first_message)
        assert topic == TOPIC.encode()
        missed = int.from_bytes(number, "big")
        assert missed >= 1
        (event,) = events_of(payload)
        assert event["type"] == "BlockStored"
        assert event["block_size"] == 16

        await ask(client, "y" * 256, max_tokens=40, extra_body={"ignore_eos": True})
        topic, number, payload = await asyncio.wait_for(subscriber.recv_multipart(), 5)
        assert int.from_bytes(number, "big") == missed + 1  # no gap
        (prompt,) = events_of(payload)
        assert len(prompt["block_hashes"]) == 4
        assert len(prompt["token_ids"]) == 64

        batches = await replay(source, 0)
        assert [int.from_bytes(number, "big") for _, number, _ in batches] == list(
            range(len(batches))
        )
        assert {topic for topic, _, _ in batches} == {TOPIC.encode()}
        assert batches[missed + 1][2] == payload
        tail = await replay(source, missed)
        assert tail == batches[missed:]
        assert await replay(source, 10_000) == []


async def test_events_carry_the_tokens_salt_and_parents() -> None:
    async with publishing_engine() as (engine, client, source):
        await ask(client, "x" * 192, extra_body={"cache_salt": "tenant-a"})
        await ask(client, "x" * 192 + "y" * 64, extra_body={"cache_salt": "tenant-a"})
        batches = await replay(source, 0)
        (first,), (second,) = (events_of(payload) for _, _, payload in batches)
        assert first["extra_keys"] == [["tenant-a"], None, None]
        assert first["parent_block_hash"] is None
        # of the second request only what the first had not stored
        assert second["parent_block_hash"] == first["block_hashes"][-1]
        assert len(second["block_hashes"]) == 1
        _, tokenized = await post(f"{engine.url}/tokenize", {"prompt": "x" * 192 + "y" * 64})
        assert first["token_ids"] + second["token_ids"] == tokenized["tokens"]


async def test_evictions_are_told_before_what_took_their_place() -> None:
    async with publishing_engine(num_blocks=8, max_model_len=128) as (engine, client, source):
        for letter in "abc":
            await ask(client, letter * 64 * 4)
        batches = [events_of(payload) for _, _, payload in await replay(source, 0)]
        stored = [event for batch in batches for event in batch if event["type"] == "BlockStored"]
        removing = batches[-1]
        assert [event["type"] for event in removing] == ["BlockRemoved", "BlockStored"]
        # the last blocks of the oldest prompt went first
        assert removing[0]["block_hashes"] == stored[0]["block_hashes"][::-1]
        assert engine.stats["blocks_cached"] == 8

        await post(f"{engine.url}/reset_prefix_cache")
        await ask(client, "d" * 256)
        _, _, payload = (await replay(source, 0))[-1]
        assert [event["type"] for event in events_of(payload)] == [
            "AllBlocksCleared",
            "BlockStored",
        ]


async def test_decoded_blocks_are_stored_one_by_one() -> None:
    async with publishing_engine(max_num_batched_tokens=32) as (_, client, source):
        await ask(client, "z" * 4 * 64, max_tokens=40, extra_body={"ignore_eos": True})
        events = [event for _, _, p in await replay(source, 0) for event in events_of(p)]
        assert [len(event["block_hashes"]) for event in events] == [2, 2, 1, 1]
        parents = [event["parent_block_hash"] for event in events]
        assert parents == [None, *(event["block_hashes"][-1] for event in events[:-1])]


async def test_the_format_of_older_engines() -> None:
    async with publishing_engine(format="array") as (_, client, source):
        await ask(client, "x" * 64)
        ((_, _, payload),) = await replay(source, 0)
        ((kind, hashes, parent, tokens, size, *rest),) = events_of(payload)
        assert (kind, parent, size) == ("BlockStored", None, 16)
        assert (len(hashes), len(tokens)) == (1, 16)
        assert rest == [None, "GPU", None]


async def test_only_so_many_batches_are_kept() -> None:
    async with publishing_engine(buffer_steps=2) as (_, client, source):
        for letter in "abcd":
            await ask(client, letter * 64)
        assert [number[-1] for _, number, _ in await replay(source, 0)] == [2, 3]


async def test_replay_survives_nonsense() -> None:
    async with publishing_engine() as (_, client, source):
        await ask(client, "x" * 64)
        async with socket_of(zmq.DEALER) as dealer:
            dealer.connect(source["replay_endpoint"])
            await dealer.send_multipart([b"hello"])
            await dealer.send_multipart([b"", b"\x01"])
        assert len(await replay(source, 0)) == 1


async def test_an_endpoint_without_a_star_is_dialled() -> None:
    async with socket_of(zmq.SUB) as agent:
        port = agent.bind_to_random_port("tcp://127.0.0.1")
        agent.subscribe("")
        dialled = f"tcp://127.0.0.1:{port}"
        kv_events = KVEventSettings(endpoint=dialled)
        async with engine_and_client(kv_events=kv_events) as (engine, client):
            assert engine.kv_event_sources[0]["endpoint"] == dialled
            assert engine.kv_event_sources[0]["replay_endpoint"] is None

            async def arrives() -> bool:
                await ask(client, "x" * 64)
                await post(f"{engine.url}/reset_prefix_cache")
                return bool(await agent.poll(50))

            assert await eventually(arrives)


async def test_each_start_numbers_from_zero() -> None:
    for _ in range(2):
        async with publishing_engine() as (_, client, source):
            await ask(client, "x" * 64)
            ((_, number, _),) = await replay(source, 0)
            assert number == bytes(8)


async def test_an_endpoint_that_is_taken_is_named() -> None:
    async with socket_of(zmq.PUB) as other:
        port = other.bind_to_random_port("tcp://127.0.0.1")
        taken = f"tcp://127.0.0.1:{port}"
        kv_events = KVEventSettings(endpoint=BIND, replay_endpoint=taken)
        with pytest.raises(OSError, match=taken):
            async with running_engine(EngineSettings(kv_events=kv_events)):
                pass
