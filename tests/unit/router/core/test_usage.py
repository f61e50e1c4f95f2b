"""Whatever way an answer comes in, its usage is read, and the client gets what it asked for."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.shapes import Usage
from router.core.usage import (
    BodyReader,
    StreamReader,
    cost_nano_usd,
    metering,
)
from router.core.usage_json import running_usage
from schemas.wire.routing import Price

DONE = b"data: [DONE]\n\n"
# What a model may well say.
TEXTS = st.sampled_from(
    ['cat "usage":{"x":1} ', ',"usage":{"prompt_tokens":9}', "\n\n", "a", "ä", "}}"]
)


def _event(body: dict, *, spaced: bool = False) -> bytes:
    separators = (", ", ": ") if spaced else (",", ":")
    return b"data: " + json.dumps(body, separators=separators).encode() + b"\n\n"


def _usage(prompt: int, output: int) -> dict:
    return {"prompt_tokens": prompt, "total_tokens": prompt + output, "completion_tokens": output}


def engine(
    texts: list[str],
    prompt: int,
    *,
    choices: int = 1,
    final: bool,
    running: bool,
    nulls: bool = False,
    spaced: bool = False,
    usage_first: bool = False,
) -> list[bytes]:
    """The events of a stream as vLLM sends them; `nulls`, `spaced`, `usage_first`: as others do."""

    def chunk(said: list, usage: dict | None) -> bytes:
        body: dict = {"id": "x", "choices": said, "model": "m"}
        if usage is not None or (nulls and final):
            body = {"usage": usage} | body if usage_first else body | {"usage": usage}
        return _event(body, spaced=spaced)

    out = []
    for index in range(choices):
        delta = {"role": "assistant", "content": ""}
        out.append(
            chunk([{"index": index, "delta": delta}], _usage(prompt, 0) if running else None)
        )
    for count, text in enumerate(texts, start=1):
        for index in range(choices):
            said = {"index": index, "delta": {"content": text}, "finish_reason": None}
            out.append(chunk([said], _usage(prompt, count) if running else None))
    if final:
        details = {"prompt_tokens_details": {"cached_tokens": prompt // 2}}
        out.append(chunk([], _usage(prompt, len(texts) * choices) | details))
    return [*out, DONE]


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in pairwise(at) if a < b]


streams = st.fixed_dictionaries(
    {
        "texts": st.lists(TEXTS, max_size=6),
        "prompt": st.integers(1, 50),
        "choices": st.integers(1, 3),
        "spaced": st.booleans(),
        "usage_first": st.booleans(),
    }
)


@given(
    stream=streams,
    asked=st.sampled_from([(False, False), (True, False), (True, True)]),
    cuts=st.lists(st.integers(0, 5000), max_size=8),
)
def test_the_client_gets_what_it_asked_for_however_it_is_cut(stream, asked, cuts):
    final, running = asked
    wanted = b"".join(engine(**stream, final=final, running=running))
    sent = b"".join(engine(**stream, final=True, running=True))
    plan = metering(
        "chat",
        "vllm",
        {
            "stream": True,
            "stream_options": {"include_usage": final, "continuous_usage_stats": running},
            "n": stream["choices"],
        },
    )
    reader = StreamReader(
        drop_final=plan.drop_final,
        drop_running=plan.drop_running,
        choices=plan.choices,
        several=plan.several,
    )
    parts = pieces(sent, cuts)
    got = b"".join(reader.feed(part, part is parts[-1]) for part in parts)
    assert got == wanted
    told = Usage(stream["prompt"], stream["prompt"] // 2, len(stream["texts"]) * stream["choices"])
    assert reader.used() == told


@given(stream=streams, upto=st.integers(1, 30), cuts=st.lists(st.integers(0, 5000), max_size=8))
def test_a_stream_that_breaks_off_is_counted_to_its_last_event(stream, upto, cuts):
    events = engine(**stream, final=True, running=True)[:-2][:upto]
    choices = stream["choices"]
    noted: list[bytes] = []
    reader = StreamReader(
        drop_final=True, drop_running=True, choices=choices, several=choices > 1, note=noted.append
    )
    for part in pieces(b"".join(events), cuts):
        reader.feed(part)
    said = len(events) - choices
    assert reader.used() == Usage(stream["prompt"], 0, max(0, said))
    assert running_usage(noted[-1]) == reader.used()


def test_an_event_that_breaks_off_counts_for_nothing():
    opening, first, second, *_ = engine(["a", "b"], 5, final=True, running=True)
    reader = StreamReader(drop_final=True, drop_running=True)
    plain = engine(["a", "b"], 5, final=False, running=False)
    assert reader.feed(opening + first + second[:-1]) == plain[0] + plain[1]
    assert reader.used() == Usage(5, 0, 1)
    assert reader.feed(b"", last=True) == second[:-1].replace(
        b',"usage":{"prompt_tokens":5,"total_tokens":7,"completion_tokens":2}', b""
    )


@pytest.mark.parametrize("nulls", [False, True])
def test_an_engine_without_running_usage_is_counted_by_events(nulls):
    events = engine(["a", "b", "c"], 5, final=True, running=False, nulls=nulls)
    reader = StreamReader(drop_final=True, drop_running=True)
    out = [reader.feed(event) for event in events[:3]]
    assert out == engine(["a", "b"], 5, final=False, running=False)[:3]
    assert reader.used() == Usage(0, 0, 2, estimated=True)
    rest = b"".join(reader.feed(event) for event in events[3:])
    assert rest == b"".join(engine(["a", "b", "c"], 5, final=False, running=False)[3:])
    assert reader.used() == Usage(5, 2, 3)


def test_a_usage_without_a_value_changes_nothing():
    reader = StreamReader("chat", drop_running=True)
    first = b'data: {"choices":[{}],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
    assert reader.feed(first) == b'data: {"choices":[{}]}\n\n'
    for odd in (b'data: {"usage":\n\n', b'"usage":\n\n', b"\n\n"):
        assert reader.feed(odd) == odd
        assert reader.used() == Usage(1, 0, 2)


def test_nothing_seen_is_not_nothing_used():
    reader = StreamReader()
    assert reader.used() is None
    reader.feed(b'data: {"error":{"message":"x"}}\n\n')
    assert reader.used() is None


def test_streams_whose_lines_end_otherwise():
    events = [event.replace(b"\n", b"\r\n") for event in engine(["a"], 5, final=True, running=True)]
    plain = [
        event.replace(b"\n", b"\r\n") for event in engine(["a"], 5, final=False, running=False)
    ]
    reader = StreamReader(drop_final=True, drop_running=True)
    assert b"".join(reader.feed(event) for event in events) == b"".join(plain)
    assert reader.used() == Usage(5, 2, 1)


def test_messages_tell_the_prompt_first_and_the_answer_last():
    start = {
        "type": "message_start",
        "message": {"usage": {"input_tokens": 7, "cache_read_input_tokens": 3, "output_tokens": 0}},
    }
    text = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "hi"}}
    end = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 12}}
    reader = StreamReader("messages")
    for kind, event in (("message_start", start), ("content_block_delta", text)):
        data = f"event: {kind}\n".encode() + _event(event)
        assert reader.feed(data) == data
    assert reader.used() == Usage(10, 3, 0)
    reader.feed(b"event: message_delta\n" + _event(end))
    assert reader.used() == Usage(10, 3, 12)


def test_responses_tell_it_in_their_last_event():
    usage = {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 3}, "output_tokens": 12}
    done = {
        "type": "response.completed",
        "response": {"tools": [{"usage": {"input_tokens": 0}}], "usage": usage},
    }
    reader = StreamReader("responses")
    delta = {"type": "response.output_text.delta", "delta": "hi"}
    reader.feed(b"event: response.output_text.delta\n" + _event(delta))
    assert reader.used() == Usage(0, 0, 1, estimated=True)
    reader.feed(b"event: response.completed\n" + _event(done))
    assert reader.used() == Usage(7, 3, 12)


@given(cuts=st.lists(st.integers(0, 3000), max_size=8), size=st.sampled_from([0, 10, 3_000_000]))
def test_a_body_is_read_at_its_end(cuts, size):
    body = json.dumps(
        {
            "id": "x",
            "metadata": {"usage": {"prompt_tokens": 0}},
            "choices": [{"message": {"content": '"usage":{"prompt_tokens":1}' + "x" * size}}],
            "usage": _usage(5, 9) | {"prompt_tokens_details": {"cached_tokens": 4}},
            "prompt_logprobs": None,
        },
        separators=(",", ":"),
    ).encode()
    reader = BodyReader()
    assert b"".join(reader.feed(part) for part in pieces(body, cuts)) == body
    assert reader.used() == Usage(5, 4, 9)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"usage":{"prompt_tokens":3,"total_tokens":3}}', Usage(3, 0, 0)),
        (b'{"usage":{"total_tokens":3}}', Usage()),
        (b'{"usage":{"prompt_tokens":-3}}', None),
        (b'{"usage":{"prompt_tokens":1,"prompt_tokens_details":{"cached_tokens":9}}}', Usage(1, 1, 0)),
        (b'{"usage":null}', None),
        (b'{"usage":{"type":"duration","seconds":3}}', Usage()),
        (b'{"choices":[{"message":{"content":"four and four"}},{"text":"1234567"}]}', Usage(0, 0, 5, estimated=True)),
        (b"not JSON", None),
        (b"", None),
    ],
)  # fmt: skip
def test_odd_bodies(body, expected):
    reader = BodyReader()
    reader.feed(body)
    assert reader.used() == expected


STREAM = {"stream": True}
BOTH = {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize(
    ("task", "name", "request_", "expected"),
    [
        ("chat", "vllm", {}, None),
        ("embeddings", "vllm", STREAM, None),
        ("chat", "vllm", STREAM, BOTH),
        ("chat", "custom", STREAM | {"stream_options": None}, {"include_usage": True}),
        ("chat", "custom", STREAM | {"stream_options": {"include_usage": True}}, None),
        ("completions", "", STREAM | {"stream_options": {"include_usage": False, "x": 1}}, {"include_usage": True, "x": 1}),
        ("chat", "vllm", STREAM | {"stream_options": BOTH}, None),
        ("chat", "vllm", STREAM | {"stream_options": "what"}, None),
    ],
)  # fmt: skip
def test_what_is_asked_of_the_engine(task, name, request_, expected):
    plan = metering(task, name, request_)
    assert expected == (plan.stream_options and json.loads(plan.stream_options))
    if expected is None:
        assert not plan.drop_final
        assert not plan.drop_running


@pytest.mark.parametrize(
    ("request_", "choices", "several"),
    [
        ({}, 1, False),
        ({"n": 3}, 3, True),
        ({"prompt": ["a", "b"], "n": 2}, 2, True),
        ({"prompt": ["a", "b"]}, 1, True),
        ({"prompt": [1, 2, 3]}, 1, False),
        ({"prompt": ["a"]}, 1, False),
    ],
)
def test_answers_in_one_stream_are_counted_each(request_, choices, several):
    for options in (None, BOTH):
        plan = metering("completions", "vllm", STREAM | request_ | {"stream_options": options})
        assert (plan.choices, plan.several) == (choices, several)


@given(
    price=st.builds(
        Price,
        input=st.integers(0, 10**6).map(lambda n: n / 1000),
        output=st.integers(0, 10**6).map(lambda n: n / 1000),
        cached_input=st.none() | st.integers(0, 10**6).map(lambda n: n / 1000),
    ),
    tokens=st.tuples(*[st.integers(0, 10**7)] * 3),
)
def test_cost_is_exact_for_prices_in_tenths_of_a_cent(price, tokens):
    fresh, cached, output = tokens
    at = price.input if price.cached_input is None else price.cached_input
    mills = [round(p * 1000) for p in (price.input, at, price.output)]
    usage = Usage(fresh + cached, cached, output)
    assert cost_nano_usd(price, usage) == sum(
        m * n for m, n in zip(mills, (fresh, cached, output), strict=True)
    )
