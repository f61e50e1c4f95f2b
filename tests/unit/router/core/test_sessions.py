from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.sessions import (
    KEY_BYTES,
    Pins,
    conversation_start,
    session_key,
    session_name,
    session_number,
)

NAMES = st.binary(min_size=1, max_size=20)


def key(name: str) -> bytes:
    return session_key(b"secret", "team", "chat", name.encode())


@pytest.mark.parametrize(
    ("header", "request_", "name"),
    [
        (b"s1", {"prompt_cache_key": "p", "user": "u"}, b"s1"),
        (None, {"user": "u", "safety_identifier": "s", "prompt_cache_key": "p"}, b"p"),
        (None, {"user": "u", "safety_identifier": "s"}, b"s"),
        (None, {"user": "u", "metadata": {"user_id": "m"}}, b"u"),
        (None, {"user": "", "metadata": {"user_id": "m"}}, b"m"),
        (b"", {"prompt_cache_key": 7, "user": None, "metadata": "x"}, None),
        (None, {"user": "\ud800"}, b"\xed\xa0\x80"),
        (None, {"metadata": {"user_id": 5}}, None),
    ],
)
def test_who_names_the_session(header, request_, name):
    assert session_name(header, request_) == name


@given(NAMES, NAMES)
def test_keys_separate_tenants_functions_and_secrets(one, other):
    base = session_key(b"k", "team", "chat", one)
    assert len(base) == KEY_BYTES
    assert base == session_key(b"k", "team", "chat", one)
    assert base != session_key(b"l", "team", "chat", one)
    assert base != session_key(b"k", "teamc", "hat", one)
    assert base != session_key(b"k", "other", "chat", one)
    assert (base == session_key(b"k", "team", "chat", other)) == (one == other)
    assert 0 <= session_number(base) < 2**64


def chat(*texts, system="You are kind."):
    roles = ("user", "assistant")
    return {
        "messages": [{"role": "system", "content": system}]
        + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    }


def test_a_conversation_begins_the_same_at_every_turn():
    assert conversation_start(chat("hi")) == conversation_start(chat("hi", "hello", "and?"))
    assert conversation_start(chat("hi")) != conversation_start(chat("ho"))
    assert conversation_start(chat("hi")) != conversation_start(chat("hi", system="You are rude."))
    anthropic = {"system": "s", "messages": [{"role": "user", "content": "a"}]}
    assert conversation_start(anthropic) != conversation_start({**anthropic, "system": "t"})
    long = "x" * 2000
    assert conversation_start({"prompt": long}) == conversation_start({"prompt": long + "y"})
    assert conversation_start({"input": "a"}) != conversation_start({"input": "b"})
    assert conversation_start({"prompt": [1, 2]}) != conversation_start({"prompt": [1, 3]})
    assert conversation_start({}) is None


def test_a_pin_lasts_its_time_after_the_last_request_and_moves():
    pins = Pins(10)
    assert pins.replica(key("a"), 0.0) is None
    assert pins.served(key("a"), "r0", 0.0, 100.0)
    assert pins.replica(key("a"), 99.9) == "r0"
    assert pins.replica(key("a"), 100.0) is None
    assert not pins.served(key("a"), "r0", 40.0, 100.0)
    assert pins.replica(key("a"), 139.0) == "r0"
    assert pins.served(key("a"), "r1", 41.0, 100.0)
    assert pins.replica(key("a"), 42.0) == "r1"
    assert pins.moved == 1
    assert pins.release(key("a"))
    assert not pins.release(key("a"))
    assert pins.replica(key("a"), 42.0) is None


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("rst"), st.floats(0, 50))))
def test_pins_are_bounded_and_the_longest_unused_give_way(steps):
    pins, now, used = Pins(3), 0.0, []
    for name, replica, wait in steps:
        now += wait
        pins.served(key(name), replica, now, 1e9)
        used = [n for n in used if n != name] + [name]
        assert len(pins) <= 3
        assert pins.replica(key(name), now) == replica
        for old in used[:-3]:
            assert pins.replica(key(old), now) is None
        for kept in used[-3:]:
            assert pins.replica(key(kept), now) is not None


@given(st.lists(st.tuples(st.sampled_from("rst"), st.floats(0, 60)), min_size=1), st.floats(1, 100))
def test_what_others_know_never_ends_while_the_pin_is_in_use(steps, ttl):
    """Told only now and then, another process still holds a live pin for half its life at least."""
    mine, theirs, now = Pins(3), Pins(3), 0.0
    for replica, wait in steps:
        now += wait
        if mine.served(key("a"), replica, now, ttl):
            theirs.heard(key("a"), replica, now + ttl)
        assert theirs.replica(key("a"), now + ttl * 0.49) == replica


@given(st.permutations([("r0", 10.0), ("r1", 20.0), ("r2", 30.0)]))
def test_the_latest_word_counts_in_whatever_order_it_comes(words):
    pins = Pins(3)
    for replica, expires_at in words:
        pins.heard(key("a"), replica, expires_at)
    assert pins.replica(key("a"), 0.0) == "r2"


def test_what_has_expired_is_swept():
    pins = Pins(1000)
    names = [f"s{i}" for i in range(100)]
    random.Random(1).shuffle(names)
    for at, name in enumerate(names):
        pins.served(key(name), "r", float(at), 10.0)
    pins.sweep(60.0)
    assert len(pins) == 49
    pins.sweep(1e9)
    assert len(pins) == 0
