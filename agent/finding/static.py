"""Engines from a list: `url`, or `replica=url`, with `#` before options of its KV events.

`http://10.0.0.5:8000#events=tcp://10.0.0.5:5557,replay=tcp://10.0.0.5:5657,topic=kv`. Engines
that answer /kv_event_sources (vLLM from 0.32 on) need no options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from agent.finding import Address
from agent.kv_source import Publisher

_OPTIONS: Final = ("events", "replay", "topic")


def parse_engine(text: str) -> Address:
    """One engine as it is written.

    Raises:
        ValueError: says what would be right.
    """
    place, _, options = text.strip().partition("#")
    replica, separator, url = place.rpartition("=")
    if not separator:
        replica, url = "", place
    if not url.startswith(("http://", "https://")) or "@" in url:
        raise ValueError(
            f"{place!r} is no engine; write http://host:port or replica=http://host:port"
        )
    given = {}
    for option in filter(None, options.split(",")):
        name, _, value = option.partition("=")
        if name not in _OPTIONS or not value:
            raise ValueError(
                f"{option!r} is no option; there are {', '.join(_OPTIONS)}, as name=value"
            )
        given[name] = value
    address = Address(url.rstrip("/"), replica)
    if not given:
        return address
    if "events" not in given:
        raise ValueError(
            f"{text!r} says how events are replayed, but not where they are: events=tcp://..."
        )
    publisher = Publisher(given["events"], given.get("replay", ""), given.get("topic", ""))
    return replace(address, publishers=(publisher,))


class StaticEngines:
    """The same engines always."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = tuple(addresses)

    async def engines(self) -> Sequence[Address]:
        return self._addresses
