"""Strict YAML: bytes of one file -> plain Python data, and where every field stands.

YAML 1.2's core schema on libyaml's event stream, so that nothing is built before it was counted.
Refused, because a reviewer and a parser could read it differently or because it can grow without
bound: anchors and aliases, tags, merge keys, duplicate keys, keys that are not text, anything but
UTF-8, invisible control and direction marks, files over the caps.
Not here: what the data means (loader), or writing YAML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from _ruamel_yaml import CParser  # type: ignore[import-not-found] # compiled, no stubs
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

FieldPath = tuple[str | int, ...]
Mark = tuple[int, int]

_BOM: Final = b"\xef\xbb\xbf"
_WORDS: Final[dict[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER: Final = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NON_FINITE: Final = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_NUMBER_START: Final = frozenset("+-.0123456789")
_NUMBER_LENGTH: Final = 40
# Control characters; the breaks that only YAML 1.1 knows (a comment would end there unseen); a CR
# without its LF, likewise; marks that turn the direction of what a reviewer sees; noncharacters.
_UNPRINTABLE: Final = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]"
    "|\r(?!\n)"
)
_HINTS: Final = {
    "mapping values are not allowed in this context": (
        "check the indentation, or put the value in quotes if it holds ': '"
    ),
    "did not find expected key": "check the indentation of this line and the ones above",
    "did not find expected '-' indicator": "check the indentation of this line and the ones above",
    "found unexpected ':'": "inside [ ] and { }, put a value that holds ':' in quotes",
    "could not find expected ':'": "write `name: value`, and put text over several lines in quotes",
    "found unexpected end of stream": "close the quote",
    "did not find expected ',' or ']'": "close the list with ]",
    "did not find expected ',' or '}'": "close the mapping with }",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps of one file; far above what people write, far below what hurts."""

    size_bytes: int = 256 * 1024
    depth: int = 32
    nodes: int = 20_000
    documents: int = 100


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document. `marks`: field path -> (line, column) of its key, or of a list's item."""

    data: Any
    marks: Mapping[FieldPath, Mark]


class YamlError(ValueError):
    """The file is no YAML that is accepted here; says where, what is wrong, what would be right."""

    def __init__(self, line: int, column: int, message: str) -> None:
        super().__init__(f"{line}:{column}: {message}")
        self.line = line
        self.column = column
        self.message = message


class _Container:
    """An open mapping or list while its events come in."""

    __slots__ = ("key", "path", "value")

    def __init__(self, value: dict[str, Any] | list[Any], path: FieldPath) -> None:
        self.value = value
        self.path = path
        self.key: str | None = None


def parse_documents(raw: bytes, limits: Limits = Limits()) -> tuple[Document, ...]:
    """All documents of one file, in order; a file of comments alone has none.

    Lines and columns count from 1, columns in characters.

    Raises:
        YamlError: at the first thing that is wrong.
    """
    text = _decode(raw, limits)
    parser = CParser(text)
    documents: list[Document] = []
    try:
        nodes = 0
        while parser.check_event():
            event = parser.get_event()
            if type(event) is DocumentStartEvent:
                _check_directives(event)
                if len(documents) == limits.documents:
                    raise _error(
                        event, f"more than {limits.documents} documents; split the file in several"
                    )
                document, nodes = _compose(parser, limits, nodes)
                documents.append(document)
    except MarkedYAMLError as error:
        raise _syntax_error(error, text) from None
    except YAMLError as error:
        raise YamlError(1, 1, f"this is no YAML: {error}") from None
    return tuple(documents)


def _decode(raw: bytes, limits: Limits) -> str:
    if len(raw) > limits.size_bytes:
        raise YamlError(
            1,
            1,
            f"the file has {len(raw)} bytes; at most {limits.size_bytes} are read, "
            "split it in several",
        )
    if raw.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        raise YamlError(1, 1, "the file is UTF-16 or UTF-32; save it as UTF-8")
    body = raw.removeprefix(_BOM)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        before = body[: error.start].decode("utf-8")
        line, column = position(before, len(before))
        byte = body[error.start]
        raise YamlError(
            line, column, f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    if match := _UNPRINTABLE.search(text):
        line, column = position(text, match.start())
        what = "NUL" if match.group() == "\0" else f"U+{ord(match.group()[0]):04X}"
        raise YamlError(line, column, f"the file holds an invisible character, {what}; remove it")
    return text


def position(text: str, offset: int) -> Mark:
    """(line, column) from 1 of an offset in a text."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def _compose(parser: Any, limits: Limits, nodes: int) -> tuple[Document, int]:
    marks: dict[FieldPath, Mark] = {}
    stack: list[_Container] = []
    root: Any = None
    while True:
        event = parser.get_event()
        kind = type(event)
        if kind is MappingEndEvent or kind is SequenceEndEvent:
            stack.pop()
            continue
        if kind is DocumentEndEvent:
            return Document(root, marks), nodes
        if kind is AliasEvent:
            raise _error(event, "aliases (*name) are not read here; write the value out")
        if event.anchor is not None:
            raise _error(event, "anchors (&name) are not read here; write each value out")
        if event.tag is not None:
            raise _error(
                event, "tags (!type) are not read here; leave it out, and quote what should be text"
            )
        nodes += 1
        if nodes > limits.nodes:
            raise _error(event, f"more than {limits.nodes} values; split the file in several")

        top = stack[-1] if stack else None
        path: FieldPath
        if top is None:
            path = ()
            marks[path] = _mark(event)
        elif type(top.value) is list:
            path = (*top.path, len(top.value))
            marks[path] = _mark(event)
        elif top.key is None:
            top.key = _key(event, top, marks)
            continue
        else:
            path = (*top.path, top.key)

        value: Any
        if kind is ScalarEvent:
            value = _scalar(event)
        else:
            if len(stack) == limits.depth:
                raise _error(event, f"more than {limits.depth} levels deep; flatten it")
            value = {} if kind is MappingStartEvent else []
            stack.append(_Container(value, path))
        if top is None:
            root = value
        elif type(top.value) is list:
            top.value.append(value)
        else:
            assert isinstance(top.value, dict)
            assert top.key is not None
            top.value[top.key] = value
            top.key = None


def _key(event: Any, mapping: _Container, marks: dict[FieldPath, Mark]) -> str:
    """A mapping's key, new in its mapping; its place is the field's mark."""
    if type(event) in (MappingStartEvent, SequenceStartEvent):
        raise _error(
            event,
            "a key must be text, not a list or a mapping; "
            "if this is a template in {{ }}, put it in quotes",
        )
    if event.implicit[0] and event.value == "<<":
        raise _error(event, "merge keys (<<) are not read here; write the fields out")
    key = _scalar(event)
    if not isinstance(key, str):
        shown = event.value[:_NUMBER_LENGTH]
        raise _error(event, f'a key must be text, not {_type_name(key)}; write "{shown}" in quotes')
    path = (*mapping.path, key)
    if first := marks.get(path):
        raise _error(
            event,
            f"{key[:60]!r} stands twice in this mapping, first on line {first[0]}; keep one of them",
        )
    marks[path] = _mark(event)
    return key


def _scalar(event: Any) -> Any:
    text: str = event.value
    if not event.implicit[0]:
        if "\0" in text:
            raise _error(event, "text must not hold NUL (\\0); remove it")
        return text
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in _NUMBER_START:
        return text
    if _NON_FINITE.fullmatch(text):
        raise _error(event, "infinity and NaN are no values here; write a number or leave it out")
    integer = _INTEGER.fullmatch(text)
    if integer is None and not _FLOAT.fullmatch(text):
        return text
    if len(text) > _NUMBER_LENGTH:
        raise _error(
            event, f"a number of {len(text)} characters; if it is meant as text, put it in quotes"
        )
    if integer is not None:
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        number = int(text[2:] if base != 10 else text, base)
        if not -(2**63) <= number < 2**63:
            raise _error(
                event,
                "a whole number beyond 64 bits; if it is meant as text, put it in quotes",
            )
        return number
    real = float(text)
    if math.isinf(real):
        raise _error(event, "a number too large; if it is meant as text, put it in quotes")
    return real


def _type_name(value: object) -> str:
    if value is None:
        return "null"
    return "true or false" if isinstance(value, bool) else "a number"


def _check_directives(event: Any) -> None:
    if event.tags:
        raise _error(event, "%TAG is not read here; leave it out")
    if event.version is not None and event.version != (1, 2):
        raise _error(event, "this is read as YAML 1.2; write %YAML 1.2 or leave the directive out")


def _mark(event: Any) -> Mark:
    mark = event.start_mark
    return mark.line + 1, mark.column + 1


def _error(event: Any, message: str) -> YamlError:
    return YamlError(*_mark(event), message)


def _syntax_error(error: MarkedYAMLError, text: str) -> YamlError:
    """Libyaml's complaint, in its words, with what is most often meant."""
    problem = str(error.problem or "this is no YAML")
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    lines = text.split("\n")
    if line > len(lines) or (line == len(lines) and not lines[-1] and line > 1):
        line = max(1, len(lines) - (not lines[-1]))
        column = len(lines[line - 1]) + 1
    hint = _HINTS.get(problem)
    if problem.startswith("found character that cannot start any token"):
        character = lines[line - 1][column - 1 : column]
        problem = f"nothing can start with {character!r} here"
        hint = (
            "indent with spaces" if character == "\t" else "put text that starts with it in quotes"
        )
    context = f"{error.context}: " if error.context else ""
    return YamlError(line, column, f"{context}{problem}" + (f"; {hint}" if hint else ""))
