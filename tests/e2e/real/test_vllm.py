"""Two real vLLM engines with a real model behind the real router: what it believes is so.

Run with `just test-vllm`; needs some 3 GB of disk for vLLM and its model, and 6 GB of memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from openai import OpenAI

from tests.e2e.ready_process import ready_process
from tests.e2e.real.vllm_engine import BLOCK_TOKENS, SERVED_NAME, VllmEngine
from tests.e2e.real.vllm_install import install

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(900)]

KEY = "a key of the team"
RULES = "\n".join(
    f"Rule {number}: answer questions about topic {number} in plain words, and never guess."
    for number in range(1, 71)
)


@dataclass
class Turn:
    replica: str
    ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    text: str


class Conversation:
    """One user's messages, sent through the router turn by turn."""

    def __init__(self, client: OpenAI, name: str, **body: Any) -> None:
        self._client = client
        self._body = body
        # What differs stands first, so that conversations share no cache.
        self._messages = [{"role": "system", "content": f"You serve {name}.\n{RULES}"}]

    def say(self, text: str) -> Turn:
        self._messages.append({"role": "user", "content": text})
        began = time.monotonic()
        with self._client.chat.completions.with_streaming_response.create(
            model=SERVED_NAME,
            messages=self._messages,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=self._body,
        ) as answer:
            ttft_s, words, usage = None, [], None
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    if choice["delta"].get("content"):
                        ttft_s = ttft_s or time.monotonic() - began
                        words.append(choice["delta"]["content"])
            replica = answer.headers["x-detoserve-route"].partition(";")[0]
        assert ttft_s is not None
        assert usage is not None
        self._messages.append({"role": "assistant", "content": "".join(words)})
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Turn(replica, ttft_s, usage["prompt_tokens"], cached, "".join(words))


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
    client = OpenAI(base_url=f"{engine.url}/v1", api_key="-", max_retries=0, timeout=120)
    for text in ("Hello", "Hello " * 1500):
        client.completions.create(model=SERVED_NAME, prompt=text, max_tokens=2)
    client.close()


@pytest.fixture
def router(engines: list[VllmEngine], tmp_path: Path) -> Iterator[OpenAI]:
    replicas = [{"id": engine.name, "url": engine.url} for engine in engines]
    arm = {"deployment": "smollm2", "cluster": "here", "replicas": replicas}
    function = {
        "name": SERVED_NAME,
        "served_name": SERVED_NAME,
        "tasks": ["chat"],
        "policy": {"name": "expected-latency"},
        "arms": [arm],
    }
    keys = [{"id": "team", "sha256": sha256(KEY.encode()).hexdigest()}]
    table = {
        "functions": [function],
        "tenants": [{"name": "team", "models": ["*"], "keys": keys}],
    }
    routes = tmp_path / "routes.json"
    routes.write_text(json.dumps(table))
    with ready_process("router", "--port", 0, "--admin-port", 0, "--routes", routes) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)
        yield client
        client.close()


def test_a_returning_conversation_lands_on_its_engine_and_starts_sooner(
    router: OpenAI,
) -> None:
    conversations = [Conversation(router, f"user {number} of the router") for number in range(4)]
    turns = [[conversation.say("Hello! Who are you?")] for conversation in conversations]
    for question in ("What is the capital of France?", "And of Italy?"):
        for conversation, before in zip(conversations, turns, strict=True):
            before.append(conversation.say(question))

    assert all(len({turn.replica for turn in told}) == 1 for told in turns)
    assert {told[0].replica for told in turns} == {"one", "two"}
    for first, *later in turns:
        assert first.cached_tokens < BLOCK_TOKENS
        known = first.prompt_tokens
        for turn in later:
            # Whole blocks of the turn before; the template may end a turn otherwise than it began it.
            assert known - 2 * BLOCK_TOKENS <= turn.cached_tokens <= turn.prompt_tokens
            known = turn.prompt_tokens
    cold = median(told[0].ttft_s for told in turns)
    warm_s = median(turn.ttft_s for told in turns for turn in told[1:])
    print(
        f"{turns[0][0].prompt_tokens} tokens: first token after {cold * 1e3:.0f} ms cold, "
        f"{warm_s * 1e3:.0f} ms returning, {cold / warm_s:.0f} times sooner"
    )
    assert cold >= 5 * warm_s


def test_salts_separate_what_the_engine_holds(router: OpenAI) -> None:
    def again(salt: str | None) -> int:
        body = {} if salt is None else {"cache_salt": salt}
        return Conversation(router, "whoever has the salt", **body).say("Hello!").cached_tokens

    assert again("one tenant") < BLOCK_TOKENS
    assert again("one tenant") > 1000
    assert again("another tenant") < BLOCK_TOKENS
    assert again(None) < BLOCK_TOKENS
    assert again("one tenant") > 1000
