"""Engines as people write them, and how they meet the names of the routing table."""

from __future__ import annotations

import pytest

from agent.finding import Address, joined
from agent.finding.static import parse_engine
from agent.kv_source import Publisher
from agent.scrape import dialled


def test_engines_as_they_are_written() -> None:
    assert parse_engine("http://10.0.0.5:8000/") == Address("http://10.0.0.5:8000")
    assert parse_engine("chat-1=https://host/base") == Address("https://host/base", "chat-1")
    assert parse_engine("http://h:1#events=tcp://h:5557,replay=tcp://h:5657,topic=kv") == Address(
        "http://h:1", "", (Publisher("tcp://h:5557", "tcp://h:5657", "kv"),)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10.0.0.5:8000", "write http://host:port"),
        ("http://user:pass@host", "is no engine"),
        ("http://h#topic=kv", "not where they are"),
        ("http://h#speed=1", "there are events, replay, topic"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_engine(text)


def test_only_what_is_routed_to_is_followed() -> None:
    table = {"a": "http://one:1/", "b": "http://two:2"}
    found = [
        Address("http://one:1"),
        Address("http://inside:9", "b"),
        Address("http://three:3"),
        Address("http://four:4", "unknown"),
    ]
    assert joined(found, table) == {"a": found[0], "b": found[1]}


def test_wildcards_are_dialled_at_the_engine_s_host() -> None:
    assert dialled("tcp://*:5557", "http://10.0.0.5:8000") == "tcp://10.0.0.5:5557"
    assert dialled("tcp://[::]:5557", "http://[fd00::1]:8000") == "tcp://[fd00::1]:5557"
    assert dialled("tcp://10.0.0.9:5557", "http://10.0.0.5:8000") == "tcp://10.0.0.9:5557"
    assert dialled("ipc://@kv", "http://127.0.0.1:1") == "ipc://@kv"
