"""What pydantic says of a document -> sentences for the person who wrote it, each at its field.

Values are not repeated, as a wrong field may hold a secret; only where it looks like a mistyped
allowed word is the right one named. Not here: problems of YAML itself, or between objects.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from reconciler.core.suggest import closest, suggestion
from reconciler.git_command import redact
from reconciler.sources.yaml_document import Document, FieldPath, Mark

_TIME = "a time with its zone, like 2026-01-31T12:00:00Z"
_TIMES = ("datetime_type", "datetime_parsing", "datetime_from_date_parsing", "timezone_aware")
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    **dict.fromkeys(_TIMES, _TIME),
}
_READS_AS_DATA = re.compile(r"[-+]?[0-9.]{1,30}|true|false")
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def field_errors(
    error: ValidationError, model: type[BaseModel], document: Document
) -> Iterator[tuple[Mark, str]]:
    """Each error as (line, column) of the field, or the nearest around it, and a sentence."""
    for detail in error.errors(include_url=False):
        path = field_path(detail["loc"], document.data)
        name = _dotted(path) or "the document"
        yield _mark(document.marks, path), _sentence(detail, name, path, model)


def field_path(loc: tuple[int | str, ...], data: Any) -> FieldPath:
    """Where in the data an error stands: pydantic's location without the union tags in it."""
    steps = tuple(step for step in loc if step != "[key]")
    candidates = [steps, *(steps[:i] + steps[i + 1 :] for i in range(1, len(steps) - 1))]
    return min(candidates, key=lambda path: len(path) - _depth(path, data))


def _depth(path: FieldPath, data: Any) -> int:
    """How many steps of the path exist in the data."""
    for depth, step in enumerate(path):
        if isinstance(data, list):
            data = dict(enumerate(data))
        if not isinstance(data, dict) or step not in data:
            return depth
        data = data[step]
    return len(path)


def _mark(marks: Mapping[FieldPath, Mark], path: FieldPath) -> Mark:
    return next((marks[path[:n]] for n in range(len(path), -1, -1) if path[:n] in marks), (0, 0))


def _dotted(path: FieldPath) -> str:
    """`spec.keys[0].id`; a key that is no plain word stands in brackets."""
    out = ""
    for step in path:
        if isinstance(step, int):
            out += f"[{step}]"
        elif re.fullmatch(r"[\w-]+", step):
            out += f".{step}" if out else step
        else:
            out += f"[{step[:60]!r}]"
    return out


def _sentence(detail: ErrorDetails, name: str, path: FieldPath, model: type[BaseModel]) -> str:
    kind = detail["type"]
    context = detail.get("ctx", {})
    value = detail["input"]
    if kind == "missing":
        return f"{name} is missing; {_expected_field(model, path)}"
    if kind == "extra_forbidden":
        options = _fields(model, path[:-1])
        return f"{name} is not a field of {_dotted(path[:-1]) or 'the document'}; {suggestion(str(path[-1]), options)}"
    if kind in ("literal_error", "enum"):
        return f"{name} is none of the allowed values; {_choice(value, context['expected'])}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = context["discriminator"].strip("'")
        given = value.get(tag) if isinstance(value, dict) else None
        tags = context.get("expected_tags") or ", ".join(_tags(model, path))
        if given is None:
            return f"{name}.{tag} is missing; write one of {tags}"
        return f"{name}.{tag} is none of the allowed values; {_choice(given, tags)}"
    if kind in _EXPECTED:
        if kind in _TIMES and isinstance(value, str):
            return f"{name} must be {_TIME}"
        return f"{name} must be {_EXPECTED[kind]}, not {_type_name(value)}{_type_hint(kind, value)}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"{name} must be {words} {context[bound]}"
    if kind == "string_pattern_mismatch":
        description = _description(model, path)
        meaning = f" ({description})" if description else ""
        return f"{name} must match {context['pattern']}{meaning}"
    if kind in ("string_too_long", "too_long"):
        unit = "characters" if kind == "string_too_long" else "items"
        return f"{name} is too long; at most {context['max_length']} {unit}"
    if kind in ("string_too_short", "too_short"):
        unit = "character" if kind == "string_too_short" else "item"
        return f"{name} is too short; at least {context['min_length']} {unit}"
    if kind == "value_error":
        return f"{name}: {redact(str(context['error']))}"
    return f"{name}: {detail['msg']}"


def _choice(value: object, expected: str) -> str:
    """`did you mean "vllm"?` for a near miss, else everything that is allowed."""
    options = re.findall(r"'([^']*)'", expected) or [expected]
    if isinstance(value, str) and (match := closest(value, options)):
        return f'did you mean "{match}"? Allowed: {", ".join(options)}'
    return f"write one of {', '.join(options)}"


def _type_hint(kind: str, value: object) -> str:
    if kind == "string_type" and isinstance(value, int | float):
        return "; if it is meant as text, put it in quotes"
    if not isinstance(value, str):
        return ""
    if kind == "bool_type" and value.lower() in ("yes", "on", "y", "no", "off", "n"):
        return "; in YAML 1.2 yes, no, on and off are text"
    if kind in ("int_type", "float_type", "bool_type"):
        return "; leave the quotes out" if _READS_AS_DATA.fullmatch(value) else ""
    return ""


def _type_name(value: object) -> str:
    if value is None:
        return "empty"
    for types_, name in (
        (bool, "true or false"),
        (int, "a whole number"),
        (float, "a number with a fraction"),
        (str, "text"),
        (list, "a list"),
        (dict, "a mapping"),
    ):
        if isinstance(value, types_):
            return name
    return "that"


def _expected_field(model: type[BaseModel], path: FieldPath) -> str:
    """What to write for a field that is missing: its own description where it has one."""
    example = f"add `{path[-1]}:`" if path else "add it"
    description = _description(model, path)
    return f"{example} ({description})" if description else example


def _description(model: type[BaseModel], path: FieldPath) -> str:
    """The first sentence of a field's docstring."""
    for owner in _owners(model, path[:-1]):
        for field_name, info in owner.model_fields.items():
            if path and (info.alias or field_name) == path[-1] and info.description:
                return info.description.split("\n")[0].rstrip(".")
    return ""


def _fields(model: type[BaseModel], path: FieldPath) -> set[str]:
    """Names a mapping at this path may hold."""
    return {
        info.alias or field_name
        for owner in _owners(model, path)
        for field_name, info in owner.model_fields.items()
    }


def _tags(model: type[BaseModel], path: FieldPath) -> list[str]:
    return sorted(
        tag
        for owner in _owners(model, path)
        if "type" in owner.model_fields
        for tag in get_args(owner.model_fields["type"].annotation)
    )


def _owners(model: type[BaseModel], path: FieldPath) -> list[type[BaseModel]]:
    """The models that may stand at a path; several below a union."""
    owners: list[type[BaseModel]] = [model]
    for step in path:
        if isinstance(step, int):
            continue
        owners = [
            found
            for owner in owners
            for field_name, info in owner.model_fields.items()
            if (info.alias or field_name) == step
            for found in _models_in(info.annotation)
        ]
    return owners


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, types.UnionType, list, dict):
        for argument in get_args(annotation):
            yield from _models_in(argument)
