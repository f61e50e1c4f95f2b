"""Two real vLLM engines with a real model behind the real router: what it believes is so.

Run with `just test-vllm`; needs some 3 GB of disk for vLLM and its model, and 6 GB of memory.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from statistics import median

import pytest

from tests.e2e.real.vllm_engine import BLOCK_TOKENS, BLOCKS, SERVED_NAME, VllmEngine
from tests.e2e.real.vllm_install import install
from tests.e2e.real.vllm_site import Conversation, Turn, vllm_site
from tests.support import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VllmEngine]]:
    installed = install()
    folder = tmp_path_factory.mktemp("vllm")
    both = [VllmEngine(installed, folder, name) for name in ("one", "two")]
    try:
        for engine in both:
            engine.start()
        for engine in both:
            print(f"{engine.name} ready {engine.wait_ready():.0f} s after its start")
            warm(engine)
        yield both
    finally:
        for engine in both:
            engine.kill()


def warm(engine: VllmEngine) -> None:
    """An engine's first prompts pay for what it sets up; nobody's conversation does here."""
    for text in ("Hello", "Hello " * 1500):
        body = {"model": SERVED_NAME, "prompt": text, "max_tokens": 2}
        asked = urllib.request.Request(
            f"{engine.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=120) as answer:
            assert answer.status == 200


def in_blocks(tokens: int) -> int:
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


async def test_a_returning_conversation_lands_on_its_engine_and_starts_sooner(
    engines: list[VllmEngine], tmp_path: Path
) -> None:
    async with vllm_site(tmp_path, engines) as site:
        before = await site.both_followed()
        # One after the other, so that what differs is the cache; then four at once, so that they spread.
        users = [Conversation(site, f"user {number} of the router") for number in range(7)]
        told = [[await user.say("Hello! Who are you?")] for user in users[:3]]
        at_once = await asyncio.gather(*(user.say("Hello! Who are you?") for user in users[3:]))
        assert {turn.engine for turn in at_once} == {"one", "two"}
        told += [[turn] for turn in at_once]
        for question in ("What is the capital of France?", "And of Italy?"):
            for user, turns in zip(users, told, strict=True):
                turns.append(await user.say(question))

        for turns in told:
            assert len({turn.engine for turn in turns}) == 1
            returns_find_what_was_left(turns)
        cold = median(turns[0].ttft_s for turns in told[:3])
        again = median(turn.ttft_s for turns in told for turn in turns[1:])
        print(
            f"{told[0][0].prompt_tokens} tokens: first token after {cold * 1e3:.0f} ms cold, "
            f"{again * 1e3:.0f} ms returning, {cold / again:.0f} times sooner"
        )
        assert cold >= 5 * again

        # The router was right about what they held, also where it had to reckon in bytes.
        true = await site.router_says("cache_true_ratio")
        print(f"of what the router took to be cached, engines had {true}")
        assert {name for name, share in true.items() if share > 0.9} == {"one", "two"}

        # What the engines' events say, they say of these conversations and of nothing else.
        async def told_by_events() -> bool:
            reports = await site.reports()
            for name, report in reports.items():
                assert report.block_tokens == BLOCK_TOKENS
                assert report.capacity_blocks == BLOCKS
                assert report.epoch == before[name].epoch
                mine = [turns for turns in told if turns[0].engine == name]
                stored = report.stored_tokens - before[name].stored_tokens
                computed = sum(
                    t.prompt_tokens + t.answer_tokens - t.cached_tokens for ts in mine for t in ts
                )
                # Every block of a conversation once; what ends within a block is computed again.
                longest = sum(in_blocks(ts[-1].prompt_tokens) for ts in mine)
                assert longest <= stored <= computed, (name, longest, stored, computed)
            return True

        await eventually(told_by_events, timeout_s=20)


async def test_a_killed_engine_is_credited_with_nothing_until_it_is_told_otherwise(
    engines: list[VllmEngine], tmp_path: Path
) -> None:
    async with vllm_site(tmp_path, engines) as site:
        user = Conversation(site, "somebody whose engine dies")
        first, second = await user.say("Hello!"), await user.say("Are you well?")
        assert first.engine == second.engine
        assert second.cached_tokens > 1000
        held = await site.router_says("index_blocks")
        assert held[first.engine] > 0
        other = ({"one", "two"} - {first.engine}).pop()
        epoch = (await site.reports())[first.engine].epoch

        dead = site.engines_by_name[first.engine]
        dead.kill()

        async def credited_with_nothing() -> bool:
            return not (await site.router_says("index_blocks")).get(first.engine)

        await eventually(credited_with_nothing, timeout_s=30)
        dead.start()
        print(f"{dead.name} ready again {await asyncio.to_thread(dead.wait_ready):.0f} s after")
        warm(dead)

        async def routed_again() -> bool:
            return set((await site.replicas()).values()) == {"one", "two"}

        await eventually(routed_again, timeout_s=60)
        await eventually(credited_with_nothing, timeout_s=10)
        assert (await site.router_says("index_blocks"))[other] == held.get(other, 0)
        assert (await site.both_followed())[first.engine].epoch > epoch

        # Told otherwise by what it is sent from now on: the conversation settles somewhere again.
        third, fourth = await user.say("Where were we?"), await user.say("And now?")
        assert third.cached_tokens < BLOCK_TOKENS
        assert fourth.engine == third.engine
        assert fourth.cached_tokens > 1000


def returns_find_what_was_left(turns: list[Turn]) -> None:
    first, *later = turns
    assert first.cached_tokens < BLOCK_TOKENS
    known = first.prompt_tokens
    for turn in later:
        # Whole blocks of the turn before; a template may end one otherwise than it goes on.
        assert known - 2 * BLOCK_TOKENS <= turn.cached_tokens <= turn.prompt_tokens
        known = turn.prompt_tokens


async def test_salts_separate_what_the_engines_hold(
    engines: list[VllmEngine], tmp_path: Path
) -> None:
    async with vllm_site(tmp_path, engines) as site:

        async def cached(tenant: str, salt: str | None) -> int:
            body = {} if salt is None else {"cache_salt": salt}
            user = Conversation(site, "whoever asks the same", tenant=tenant, **body)
            return (await user.say("Hello!")).cached_tokens

        await is_kept_apart(cached)


async def test_salts_separate_what_comes_as_messages_too(
    engines: list[VllmEngine], tmp_path: Path
) -> None:
    async with vllm_site(tmp_path, engines) as site:

        async def cached(tenant: str, salt: str | None) -> int:
            body = {} if salt is None else {"cache_salt": salt}
            return await site.message("whoever writes the same", tenant=tenant, **body)

        await is_kept_apart(cached)


async def is_kept_apart(cached: Callable[[str, str | None], Awaitable[int]]) -> None:
    """`cached`: sends the same prompt for a tenant with a salt, and says how much was in a cache."""
    for salt in ("one", None):
        assert await cached("acme", salt) < BLOCK_TOKENS
        assert await cached("acme", salt) > 1000
        # Another tenant never finds out that this was asked, whatever salt it names.
        assert await cached("other", salt) < BLOCK_TOKENS
    assert await cached("acme", "another") < BLOCK_TOKENS
    assert await cached("acme", "one") > 1000
