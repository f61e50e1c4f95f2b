from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.blocks import BLOCK_BYTES, chain_seed, hash_blocks, read_prompt, render

TEXT = st.text(max_size=600)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}
    ),
    max_size=8,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=12,
)
SEED = chain_seed("m")


def blocks(*messages, seed=SEED, **fields):
    return read_prompt({"messages": list(messages), **fields}, seed).blocks


def said(role, content):
    return {"role": role, "content": content}


def shared(one, other):
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


@given(MESSAGES, MESSAGES)
def test_the_next_turn_begins_with_the_turn_before(turn, more):
    before, after = blocks(*turn), blocks(*turn, *more)
    assert after[: len(before)] == before


@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_as_many_blocks_are_shared_as_whole_blocks_of_bytes(one, other):
    common = shared(one, other)
    a, b = hash_blocks(one, SEED), hash_blocks(other, SEED)
    assert len(a) == len(one) // BLOCK_BYTES
    assert shared(a, b) == min(common // BLOCK_BYTES, len(a), len(b))
    assert all(0 <= block < 1 << 60 for block in a)


def test_a_block_is_known_by_all_that_came_before_it():
    same = b"x" * BLOCK_BYTES
    assert len(set(hash_blocks(same * 50, SEED))) == 50


def test_every_message_counts_and_not_the_first_alone():
    # sglang#26263: one system prompt, and every conversation is one key.
    system = said("system", "s" * 1024)
    one, other = (blocks(system, said("user", letter * 1024)) for letter in "ab")
    assert shared(one, other) == 4
    assert len(one) == len(other) == 8


@given(
    st.tuples(TEXT, TEXT, TEXT, st.binary(max_size=9)),
    st.tuples(TEXT, TEXT, TEXT, st.binary(max_size=9)),
)
def test_model_salt_adapter_and_key_part_chains(one, other):
    assert (chain_seed(*one) == chain_seed(*other)) == (one == other)
    text = said("user", "x" * 600)
    seeds = chain_seed(*one), chain_seed(*other)
    mine, theirs = (blocks(text, seed=seed) for seed in seeds)
    assert bool(set(mine) & set(theirs)) == (one == other)


def test_parts_do_not_run_into_one_another():
    assert chain_seed("ab", "c") != chain_seed("a", "bc")
    assert chain_seed("a", "", "b") != chain_seed("a", "b", "")


def test_text_parts_are_the_text():
    parts = [{"type": "text", "text": "x" * 300}, {"type": "text", "text": "y" * 300}]
    assert blocks(said("user", parts)) == blocks(said("user", "x" * 300 + "y" * 300))


def image(url, **more):
    return {"type": "image_url", "image_url": {"url": url}, **more}


def test_images_count_by_what_they_are():
    def asked(one):
        return blocks(said("user", [one, {"type": "text", "text": "what is it? " * 60}]))

    cat, dog = "data:image/png;base64," + "A" * 5000, "data:image/png;base64," + "A" * 4999 + "B"
    assert asked(image(cat)) == asked(image(cat, cache_control={"type": "ephemeral"}))
    assert not set(asked(image(cat))) & set(asked(image(dog)))


def test_tools_and_calls_are_part_of_the_prompt():
    ask = said("user", "x" * 600)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"a": 1, "b": 2}}}
    turned = {"function": {"parameters": {"b": 2, "a": 1}, "name": "f"}, "type": "function"}
    assert blocks(ask, tools=[tool]) == blocks(ask, tools=[turned])
    assert not set(blocks(ask, tools=[tool])) & set(blocks(ask))

    def calling(arguments):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return [said("user", "hello"), {"role": "assistant", "content": None, "tool_calls": [call]}]

    assert render({"messages": calling('{"a":1}')}) != render({"messages": calling('{"a":2}')})
    assert b'{"a":1}' in render({"messages": calling('{"a":1}')})


def test_results_of_tools_count_in_full():
    result = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [{"type": "text", "text": "y" * 999}],
    }
    again = {**result, "tool_use_id": "t2"}
    assert len(blocks(said("user", [result]))) == 3
    assert blocks(said("user", [result])) == blocks(said("user", [again]))


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"prompt": "x" * 600}, {"prompt": "x" * 600 + "more" * 99}),
        ({"prompt": list(range(900))}, {"prompt": list(range(1200))}),
        ({"input": "x" * 600}, {"input": "x" * 600 + "y" * 300}),
        (
            {"instructions": "i" * 300, "input": [said("user", "x" * 600)]},
            {
                "instructions": "i" * 300,
                "input": [said("user", "x" * 600), said("assistant", "y" * 600)],
            },
        ),
        (
            {"system": "s" * 600, "messages": []},
            {
                "system": [{"type": "text", "text": "s" * 600}],
                "messages": [said("user", "x" * 600)],
            },
        ),
    ],
)
def test_every_api_has_prefixes(short, long):
    before, after = read_prompt(short, SEED).blocks, read_prompt(long, SEED).blocks
    assert len(before) >= 2
    assert after[: len(before)] == before
    assert len(after) > len(before)


def test_what_has_no_prompt_has_no_blocks():
    assert read_prompt({"model": "m"}, SEED).blocks == []


@given(
    st.dictionaries(
        st.sampled_from(["messages", "prompt", "input", "system", "tools", "instructions"]), JSON
    )
)
def test_any_json_renders_and_always_to_the_same(request):
    assert render(request) == render(dict(request))


@given(st.lists(st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "name"]), JSON)))
def test_any_message_renders(messages):
    assert render({"messages": messages}).startswith(b"\x01" if messages else b"")


WEIRD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "function", "name"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["messages", "prompt", "input", "system", "tools", "documents"]),
        WEIRD,
        max_size=4,
    )
)
def test_whatever_json_a_client_sends_has_a_prompt(request_):
    assert read_prompt(request_, 1).tokens >= 0
