"""Status documents as YAML that people read in Git, by libyaml: thousands a second.

Written as events, without a representer between: that alone would take ten times as long.
Not here: what the documents say (core.status), or reading the config (sources.yaml_document).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any, Final

from _ruamel_yaml import CEmitter  # type: ignore[import-not-found] # compiled, no stubs
from ruamel.yaml.cyaml import CSafeLoader
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    DocumentEndEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.resolver import Resolver

HEADER: Final = b"# Written by the DetoServe reconciler. Edits here have no effect.\n"
_TEXT: Final = "tag:yaml.org,2002:str"
_resolver: Final = Resolver()


def render_document(document: dict[str, Any]) -> bytes:
    """Block style, keys in the document's own order; equal documents give equal bytes.

    Raises:
        TypeError: it holds anything but text, whole numbers, booleans, None, lists and dicts.
    """
    out = io.BytesIO()
    emitter = CEmitter(out, width=4096, allow_unicode=True)
    emitter.emit(StreamStartEvent(encoding="utf-8"))
    emitter.emit(DocumentStartEvent(explicit=False))
    _emit(emitter.emit, document)
    emitter.emit(DocumentEndEvent(explicit=False))
    emitter.emit(StreamEndEvent())
    return HEADER + out.getvalue()


def parse_document(data: bytes) -> Any:
    """What was rendered; None for anything that is no YAML."""
    try:
        return CSafeLoader(data).get_single_data()
    except YAMLError:
        return None


def _emit(emit: Callable[[Any], None], value: Any) -> None:
    match value:
        case str():
            emit(ScalarEvent(None, None, (_is_plain(value), True), value))
        case dict():
            emit(MappingStartEvent(None, None, True, flow_style=not value))
            for key, inner in value.items():
                _emit(emit, key)
                _emit(emit, inner)
            emit(MappingEndEvent())
        case list():
            emit(SequenceStartEvent(None, None, True, flow_style=not value))
            for inner in value:
                _emit(emit, inner)
            emit(SequenceEndEvent())
        case bool() | int() | None:
            word = "null" if value is None else str(value).lower()
            emit(ScalarEvent(None, None, (True, False), word))
        case _:
            raise TypeError(f"a status document holds no {type(value).__name__}")


@functools.lru_cache(maxsize=1024)
def _is_plain(text: str) -> bool:
    """Whether text stays text without quotes."""
    return bool(_resolver.resolve(ScalarNode, text, (True, False)) == _TEXT)
