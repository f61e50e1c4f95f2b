"""The engine as the official client sees it."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from prometheus_client.parser import text_string_to_metric_families

from agent.simulated.server import SimulatedEngine, running_engine
from agent.simulated.settings import EngineSettings
from tests.behaviour.agent.engine_clients import INSTANT, engine_and_client, get, post

ASK: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You are a helpful assistant. Answer with care and in full."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture
async def pair() -> AsyncIterator[tuple[SimulatedEngine, AsyncOpenAI]]:
    async with engine_and_client(
        served_model_names=("chat", "chat-alias"), lora_modules=("chat-tuned",)
    ) as pair:
        yield pair


@pytest.fixture
def engine(pair: tuple[SimulatedEngine, AsyncOpenAI]) -> SimulatedEngine:
    return pair[0]


@pytest.fixture
def client(pair: tuple[SimulatedEngine, AsyncOpenAI]) -> AsyncOpenAI:
    return pair[1]


async def test_a_chat_completion(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="chat", messages=ASK, max_completion_tokens=7
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "chat"
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_a_stream_says_the_same_in_pieces(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="chat", messages=ASK)
    stream = await client.chat.completions.create(
        model="chat", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    first, *middle, last, usage = chunks
    assert len({chunk.id for chunk in chunks}) == 1
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert all(chunk.choices[0].finish_reason is None for chunk in middle)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert usage.choices == []
    assert usage.usage is not None
    assert whole.usage is not None
    assert usage.usage.completion_tokens == whole.usage.completion_tokens == len(chunks) - 2
    assert usage.usage.prompt_tokens_details is not None
    cached = usage.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert 0 < cached < whole.usage.prompt_tokens


async def test_a_stream_without_usage_has_none(engine: SimulatedEngine) -> None:
    body = {"messages": ASK, "stream": True, "max_tokens": 3}
    status, text = await post(f"{engine.url}/v1/chat/completions", body)
    assert status == 200
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert len(events) == 1 + 3 + 1  # the role, three tokens, the end
    assert all("usage" not in json.loads(event) for event in events[:-1])


async def test_usage_can_come_with_every_chunk(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="chat",
        messages=ASK,
        stream=True,
        max_tokens=3,
        extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage]
    assert counts == [0, 1, 2, 3, 3]


async def test_chunks_may_carry_several_tokens() -> None:
    async with engine_and_client(stream_interval=4) as (_, client):
        stream = await client.chat.completions.create(
            model="simulated", messages=ASK, stream=True, max_tokens=10
        )
        texts = [chunk.choices[0].delta.content async for chunk in stream]
    assert [len(text or "") // 4 for text in texts] == [0, 1, 4, 4, 1]


async def test_several_choices_differ_and_come_with_their_index(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="chat", messages=ASK, n=3, max_tokens=5)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 15
    streamed = ["", "", ""]
    stream = await client.chat.completions.create(
        model="chat", messages=ASK, n=3, max_tokens=5, stream=True
    )
    async for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


async def test_the_same_request_gets_the_same_text_on_another_replica(client: AsyncOpenAI) -> None:
    async def text(of: AsyncOpenAI, model: str = "chat", **fields: Any) -> str | None:
        answer = await of.chat.completions.create(
            model=model, messages=ASK, max_tokens=20, **fields
        )
        return answer.choices[0].message.content

    first = await text(client)
    async with engine_and_client(served_model_names=("chat",)) as (_, replica):
        assert await text(replica) == first
        assert await text(replica, extra_body={"cache_salt": "tenant"}) == first
        assert await text(replica, seed=5) != first
        assert await text(replica, seed=5) == await text(client, seed=5)
    async with engine_and_client(served_model_names=("chat",), seed=1) as (_, other):
        assert await text(other) != first


async def test_stop_strings(client: AsyncOpenAI) -> None:
    free = await client.chat.completions.create(
        model="chat", messages=ASK, max_tokens=30, extra_body={"ignore_eos": True}
    )
    text = free.choices[0].message.content
    assert text is not None
    assert free.choices[0].finish_reason == "length"
    stop = text[50:54]
    for stream in (False, True):
        answer = await client.chat.completions.create(
            model="chat",
            messages=ASK,
            max_tokens=30,
            stop=stop,
            stream=stream,
            extra_body={"ignore_eos": True},
        )
        if isinstance(answer, openai.AsyncStream):
            chunks = [chunk async for chunk in answer]
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            said = answer.choices[0].message.content or ""
            reason = answer.choices[0].finish_reason
        assert said == text[: text.find(stop)]
        assert reason == "stop"


async def test_completions_of_text_texts_and_token_ids(
    client: AsyncOpenAI, engine: SimulatedEngine
) -> None:
    one = await client.completions.create(model="chat", prompt="Once upon a time", max_tokens=4)
    assert one.object == "text_completion"
    assert one.choices[0].finish_reason == "length"
    _, tokenized = await post(f"{engine.url}/tokenize", {"prompt": "Once upon a time"})
    ids = await client.completions.create(model="chat", prompt=tokenized["tokens"], max_tokens=4)
    assert ids.choices[0].text == one.choices[0].text
    two = await client.completions.create(
        model="chat", prompt=["Once upon a time", "The end"], n=2, max_tokens=4, echo=True
    )
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == "Once upon a time" + one.choices[0].text
    assert two.choices[2].text.startswith("The end")
    default = await client.completions.create(
        model="chat", prompt="x", extra_body={"ignore_eos": True}
    )
    assert default.usage is not None
    assert default.usage.completion_tokens == 16
    stream = await client.completions.create(
        model="chat", prompt="Once upon a time", max_tokens=4, stream=True
    )
    pieces = [chunk.choices[0].text async for chunk in stream]
    assert "".join(pieces) == one.choices[0].text
    assert len(pieces) == 4


async def test_embeddings_as_floats_and_as_base64(client: AsyncOpenAI) -> None:
    floats = await client.embeddings.create(
        model="chat", input=["red apple", "green apple"], encoding_format="float"
    )
    packed = await client.embeddings.create(
        model="chat", input=["red apple", "green apple"], encoding_format="base64"
    )
    default = await client.embeddings.create(model="chat", input="red apple")  # SDK: base64 inside
    assert len(floats.data) == 2
    assert len(floats.data[0].embedding) == 64
    assert isinstance(packed.data[0].embedding, str)
    assert default.data[0].embedding == pytest.approx(floats.data[0].embedding, abs=1e-6)
    short = await client.embeddings.create(model="chat", input="red apple", dimensions=8)
    assert len(short.data[0].embedding) == 8
    assert floats.usage.prompt_tokens == 3 + 3


async def test_models_with_aliases_and_adapters(client: AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["chat", "chat-alias", "chat-tuned"]
    assert models[0].model_dump()["max_model_len"] == 32_768
    assert models[2].model_dump()["parent"] == "chat"
    alias = await client.chat.completions.create(model="chat-alias", messages=ASK, max_tokens=1)
    assert alias.model == "chat"  # as vLLM: the first name
    tuned = await client.chat.completions.create(model="chat-tuned", messages=ASK, max_tokens=1)
    assert tuned.model == "chat-tuned"


async def test_salts_and_adapters_do_not_share_a_cache(client: AsyncOpenAI) -> None:
    async def cached(model: str = "chat", salt: str | None = None) -> int:
        answer = await client.chat.completions.create(
            model=model,
            messages=ASK,
            max_tokens=1,
            extra_body={"cache_salt": salt} if salt else None,
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert [await cached(), await cached()] == [0, 32]
    assert [await cached(salt="a"), await cached(salt="a")] == [0, 32]
    assert [await cached(salt="b"), await cached("chat-tuned")] == [0, 0]


async def test_tools_are_part_of_the_prompt(client: AsyncOpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    plain = await client.chat.completions.create(model="chat", messages=ASK, max_tokens=1)
    tooled = await client.chat.completions.create(
        model="chat",
        messages=ASK,
        max_tokens=1,
        tools=tools,
        tool_choice="auto",
        logprobs=True,
        response_format={"type": "json_object"},
    )
    assert plain.usage is not None
    assert tooled.usage is not None
    assert tooled.usage.prompt_tokens > plain.usage.prompt_tokens
    assert tooled.choices[0].logprobs is None
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert (await client.chat.completions.create(model="chat", messages=parts)).choices


async def test_errors_are_of_the_api_s_shape(engine: SimulatedEngine, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="The model `nope` does not exist") as missing:
        await client.chat.completions.create(model="nope", messages=ASK)
    assert missing.value.body == {
        "message": "The model `nope` does not exist.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
    with pytest.raises(openai.BadRequestError, match="maximum context length is 32768"):
        await client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "x" * 4 * 32_768}]
        )
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        await client.chat.completions.create(model="chat", messages=ASK, max_tokens=32_768)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("chat/completions", b'{"messages": [', "JSON decode error"),
        ("chat/completions", b"\xff\xfe", "JSON decode error"),
        ("chat/completions", b'{"tools": ' + b"[" * 100_000, "too deeply"),
        ("chat/completions", b"[]", "Expected `object`"),
        ("chat/completions", b"{}", "messages"),
        ("chat/completions", b'{"messages": []}', "'messages'"),
        ("chat/completions", b'{"messages": [{"content": "x"}]}', "role"),
        (
            "chat/completions",
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "multimodal",
        ),
        ("completions", b'{"prompt": "x", "max_tokens": 0}', "'max_tokens'"),
        ("completions", b'{"prompt": "x", "max_tokens": "5"}', "'max_tokens'"),
        ("completions", b'{"prompt": "x", "n": 0}', "'n'"),
        ("completions", b'{"prompt": "x", "n": 1000}', "'n'"),
        ("completions", b'{"prompt": "x", "cache_salt": ""}', "'cache_salt'"),
        ("completions", b'{"prompt": "x", "stop": [""]}', "stop"),
        ("completions", b'{"prompt": "x", "stream_options": {}}', "stream=True"),
        ("completions", b'{"prompt": "x", "min_tokens": 20}', "min_tokens"),
        ("completions", b'{"prompt": ""}', "cannot be empty"),
        ("completions", b'{"prompt": []}', "cannot be empty"),
        ("completions", b'{"prompt": [-1]}', "'prompt' must be"),
        ("completions", b'{"prompt": [1.5]}', "'prompt' must be"),
        ("completions", b'{"prompt": [[true]]}', "'prompt' must be"),
        ("completions", b'{"prompt": ["x", null]}', "'prompt' must be"),
        ("embeddings", b'{"input": "x", "dimensions": 65}', "64 at most"),
        ("embeddings", b'{"input": "x", "encoding_format": "int8"}', "encoding_format"),
    ],
)
async def test_bad_requests_say_what_is_wrong(
    engine: SimulatedEngine, path: str, body: bytes, said: str
) -> None:
    status, answer = await post(f"{engine.url}/v1/{path}", raw=body)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["code"] == 400
    assert said in answer["error"]["message"]
    assert engine.stats["failed"] == 1


async def test_paths_and_methods_that_do_not_exist(engine: SimulatedEngine) -> None:
    status, answer = await get(f"{engine.url}/v1/nothing")
    assert (status, answer["error"]["code"]) == (404, 404)
    status, answer = await get(f"{engine.url}/v1/chat/completions")
    assert (status, answer["error"]["code"]) == (405, 405)


async def test_tokenize_and_detokenize_undo_each_other(engine: SimulatedEngine) -> None:
    text = "Grüße, 世界! 🙂"
    _, tokenized = await post(f"{engine.url}/tokenize", {"prompt": text, "return_token_strs": True})
    assert tokenized["count"] == len(tokenized["tokens"]) == len(tokenized["token_strs"])
    assert tokenized["max_model_len"] == 32_768
    _, back = await post(f"{engine.url}/detokenize", {"tokens": tokenized["tokens"]})
    assert back == {"prompt": text}
    _, chat = await post(f"{engine.url}/tokenize", {"messages": ASK})
    _, answer = await post(f"{engine.url}/v1/chat/completions", {"messages": ASK})
    assert answer["usage"]["prompt_tokens"] == chat["count"]
    assert (await post(f"{engine.url}/tokenize", {}))[0] == 400
    assert (await post(f"{engine.url}/detokenize", {"tokens": [2**32]}))[0] == 400


async def test_the_request_id_is_taken_over(engine: SimulatedEngine) -> None:
    async with (
        aiohttp.ClientSession(headers={"X-Request-Id": "trace-1"}) as session,
        session.post(f"{engine.url}/v1/completions", json={"prompt": "x"}) as response,
    ):
        assert (await response.json())["id"] == "cmpl-trace-1"


async def test_an_engine_with_a_key_asks_for_it() -> None:
    settings = EngineSettings(api_key="right", time=INSTANT)
    async with running_engine(settings) as engine:
        for key, allowed in (("right", True), ("wrong", False), ("", False), ("r\u00efght", False)):
            header = {"Authorization": f"Bearer {key}"}
            async with aiohttp.ClientSession(headers=header) as session:
                for path in ("/v1/models", "/faults"):
                    async with session.get(engine.url + path) as response:
                        assert response.status == (200 if allowed else 401)
                        if not allowed:
                            assert await response.json() == {"error": "Unauthorized"}
        assert (await get(f"{engine.url}/v1/models"))[0] == 401
        assert (await get(f"{engine.url}/health"))[0] == 200  # as vLLM: only the API is guarded
        assert (await get(f"{engine.url}/metrics"))[0] == 200


async def test_metrics_count_what_was_served(engine: SimulatedEngine, client: AsyncOpenAI) -> None:
    for _ in range(2):
        await client.chat.completions.create(model="chat", messages=ASK, max_tokens=3)
    status, page = await get(f"{engine.url}/metrics")
    assert status == 200
    read = {
        (sample.name, sample.labels.get("finished_reason", "")): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert read["vllm:generation_tokens_total", ""] == 6
    assert read["vllm:request_success_total", "length"] == 2
    assert read["vllm:prompt_tokens_cached_total", ""] == 32
    assert read["vllm:prefix_cache_hits_total", ""] == 32
    assert read["vllm:prefix_cache_queries_total", ""] == read["vllm:prompt_tokens_total", ""]
    assert read["vllm:num_requests_running", ""] == 0
    assert read["vllm:time_to_first_token_seconds_count", ""] == 2
    stats = engine.stats
    assert stats["requests"] == stats["succeeded"] == 2
    assert stats["blocks_hit"] == 2
    assert stats["blocks_seen"] == 4
    assert (await get(f"{engine.url}/stats"))[1].keys() == stats.keys()


async def test_the_cache_can_be_reset(engine: SimulatedEngine, client: AsyncOpenAI) -> None:
    for expected in (0, 0):
        answer = await client.chat.completions.create(model="chat", messages=ASK, max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == expected
        assert await post(f"{engine.url}/reset_prefix_cache") == (200, "")


async def test_health_version_and_sources(engine: SimulatedEngine) -> None:
    assert await get(f"{engine.url}/health") == (200, "")
    assert (await get(f"{engine.url}/version"))[1]["version"].endswith("+simulated")
    assert await get(f"{engine.url}/kv_event_sources") == (200, [])


async def test_a_body_that_is_too_large_is_413(engine: SimulatedEngine) -> None:
    body = io.BytesIO(b" " * (64 * 1024 * 1024 + 1))
    status, answer = await post(f"{engine.url}/v1/completions", raw=body)
    assert (status, answer["error"]["code"]) == (413, 413)
