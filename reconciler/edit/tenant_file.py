"""Edits of a Tenant's `spec.keys` in its file's own text: comments, modelines and order stay.

Pure: text in, text out. What comes out is parsed again and compared with what was meant, so that an
edit that YAML would read differently is refused rather than written.
Not here: finding the file, writing it, or committing it (work_tree).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode

KeyEntry = dict[str, Any]
"""One item of `spec.keys` as plain data: id, sha256, and what else was set."""

_DOCUMENT_START: Final = re.compile(r"^---(?=\s|$)", re.MULTILINE)
_CRLF: Final = "\r\n"
_DASH: Final = re.compile(r"^( *)keys:[^\n]*\n(?:[ \t\r]*(?:#[^\n]*)?\n)*( *)- ", re.MULTILINE)


class EditRefused(ValueError):
    """The text cannot be edited as asked; the message says why and what would be right."""


def key_entries(text: str, tenant: str) -> list[KeyEntry]:
    """The tenant's keys as the file has them, as plain data.

    Raises:
        EditRefused: the text holds no such tenant.
    """
    _, _, document = _find(text, tenant)
    return [dict(entry) for entry in document["spec"].get("keys") or []]


def add_key(text: str, tenant: str, entry: KeyEntry) -> str:
    """The text with one key more, at the end of the tenant's list.

    Raises:
        EditRefused: no such tenant, or the id is taken.
    """

    def add(keys: list[KeyEntry]) -> None:
        if any(key.get("id") == entry["id"] for key in keys):
            raise EditRefused(
                f"Tenant/{tenant} has a key with id {entry['id']!r}; give another --id, or rotate it"
            )
        if not keys and isinstance(keys, CommentedSeq):
            keys.fa.set_block_style()
        keys.append(CommentedMap(entry))

    return _edit(text, tenant, add)


def expire_key(text: str, tenant: str, key_id: str, expires: str) -> str:
    """The text with the key's `expires` set (RFC 3339).

    Raises:
        EditRefused: no such tenant or key.
    """

    def expire(keys: list[KeyEntry]) -> None:
        key = keys[_index(keys, tenant, key_id)]
        last = next(reversed(key))
        if "expires" in key or not isinstance(key, CommentedMap) or last not in key.ca.items:
            key["expires"] = expires
        else:
            # A comment after the entry hangs on its last field, which therefore stays the last.
            key.insert(len(key) - 1, "expires", expires)

    return _edit(text, tenant, expire)


def remove_key(text: str, tenant: str, key_id: str) -> str:
    """The text without the key and the comment directly above it.

    Raises:
        EditRefused: no such tenant or key.
    """

    def remove(keys: list[KeyEntry]) -> None:
        del keys[_index(keys, tenant, key_id)]
        if not keys and isinstance(keys, CommentedSeq):
            keys.fa.set_flow_style()

    start, end, document = _find(text, tenant)
    keys = document["spec"].get("keys") or []
    index = _index(keys, tenant, key_id)
    lines = _lines_of_key(text[start:end], index) if len(keys) > 1 else None
    if lines is None:
        return _edit(text, tenant, remove)
    # Line by line, as the round trip would take the next key's comment away with this one.
    kept = text[start:end].splitlines(keepends=True)
    del kept[lines]
    edited = text[:start] + "".join(kept) + text[end:]
    _check(text, edited, tenant, remove)
    return edited


def render_entry(entry: KeyEntry, indent: int = 4) -> str:
    """The YAML to paste under `spec.keys`."""
    out = io.StringIO()
    _yaml().dump([entry], out)
    return "".join(f"{' ' * indent}{line}\n" for line in out.getvalue().splitlines())


def _index(keys: list[KeyEntry], tenant: str, key_id: str) -> int:
    for index, key in enumerate(keys):
        if key.get("id") == key_id:
            return index
    known = ", ".join(str(key.get("id")) for key in keys) or "none"
    raise EditRefused(f"Tenant/{tenant} has no key with id {key_id!r}; it has {known}")


def _yaml(text: str = "") -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1 << 16
    # Sequences stay indented as the file has them: `- ` under the key's own column, or further in.
    if match := _DASH.search(text):
        offset = len(match[2]) - len(match[1])
        yaml.indent(mapping=2, sequence=offset + 2, offset=offset)
    return yaml


def _find(text: str, tenant: str) -> tuple[int, int, Any]:
    """Where the tenant's document stands in the text, and the document for a round trip."""
    starts = [0, *(m.start() for m in _DOCUMENT_START.finditer(text) if m.start())]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        part = text[start:end]
        try:
            document = _yaml(part).load(part.replace(_CRLF, "\n"))
        except YAMLError as error:
            raise EditRefused(
                f"the file is no valid YAML; run detoserve validate: {error}"
            ) from None
        match document:
            case {"kind": "Tenant", "metadata": {"name": name}, "spec": dict()} if name == tenant:
                return start, end, document
    raise EditRefused(f"Tenant/{tenant} does not stand in this file with a spec")


def _edit(text: str, tenant: str, change: Callable[[list[KeyEntry]], None]) -> str:
    start, end, document = _find(text, tenant)
    part = text[start:end]
    spec = document["spec"]
    if spec.get("keys") is None:
        spec["keys"] = CommentedSeq()
    change(spec["keys"])
    yaml = _yaml(part)
    yaml.explicit_start = part.startswith("---")
    out = io.StringIO()
    yaml.dump(document, out)
    made = out.getvalue().removesuffix("...\n")
    if _CRLF in part:
        made = made.replace("\n", _CRLF)
    edited = text[:start] + made + text[end:]
    _check(text, edited, tenant, change)
    return edited


def _check(before: str, after: str, tenant: str, change: Callable[[list[KeyEntry]], None]) -> None:
    """That nothing but the keys changed, and they as meant."""

    def documents(text: str) -> list[Any]:
        return list(YAML(typ="safe", pure=True).load_all(text))

    expected = documents(before)
    for document in expected:
        match document:
            case {"kind": "Tenant", "metadata": {"name": name}, "spec": dict() as spec} if (
                name == tenant
            ):
                keys = deepcopy(spec.get("keys") or [])
                change(keys)
                spec["keys"] = keys
    try:
        same = _plain(documents(after)) == _plain(expected)
    except YAMLError:
        same = False
    if not same:
        raise EditRefused(
            f"Tenant/{tenant} is written in a way that cannot be edited safely; edit spec.keys by hand"
        )


def _plain(value: Any) -> Any:
    """Times as text: whether a scalar is quoted decides which of both YAML makes of it."""
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            return value.isoformat()


def _lines_of_key(part: str, index: int) -> slice | None:
    """Lines of one block-style item of `spec.keys`, counted from 0; None where it is no such item."""
    node: Any = YAML().compose(part)
    for name in ("spec", "keys"):
        if not isinstance(node, MappingNode):
            return None
        node = next((value for key, value in node.value if key.value == name), None)
    if not isinstance(node, SequenceNode) or node.flow_style:
        return None
    item = node.value[index]
    if not isinstance(item, MappingNode) or item.flow_style:
        return None
    lines = part.splitlines()
    first = item.start_mark.line
    last = max(value.end_mark.line - (value.end_mark.column == 0) for _, value in item.value)
    column = node.start_mark.column
    while first and lines[first - 1].startswith(f"{' ' * column}#"):
        first -= 1
    return slice(first, last + 1)
