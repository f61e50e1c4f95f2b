"""docs/kinds.md: a table a kind, written from the JSON Schemas, so that it cannot fall behind them.

`python -m schemas.reference FILE` writes it. Not here: what the fields mean; their docstrings say it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from schemas.json_schema import schemas
from schemas.kinds import MODELS
from schemas.quantities import DURATION_PATTERN, POSITIVE_DURATION_PATTERN, SIZE_PATTERN
from schemas.tenant import INSTANT_PATTERN

Schema = dict[str, Any]
_REF: Final = "#/definitions/"
_BY_PATTERN: Final = {
    DURATION_PATTERN: "duration",
    POSITIVE_DURATION_PATTERN: "duration above 0",
    SIZE_PATTERN: "size",
    INSTANT_PATTERN: "instant",
}
_INTRO: Final = """\
# The kinds

Generated from `schemas/`; edit the models there and run `just schemas`.

Every object is `apiVersion: detoserve.ai/v1alpha1`, a `kind`, `metadata` and a `spec`. Unknown fields are
errors. A field without a default may be written as null, which leaves it unset. Durations are written
`15s`, `250ms`, `1h30m`; sizes `16Gi` or `80GB`; instants `"2027-01-31T00:00:00Z"`. `[]` stands for each
entry of a list, `*` for each of a map. What a release accepts but does not act on yet, an object's status
says.
"""


class Row(NamedTuple):
    field: str
    type: str
    default: str
    meaning: str


class _Reader:
    """Rows of one kind's schema."""

    def __init__(self, schema: Schema) -> None:
        self.definitions: dict[str, Schema] = schema["definitions"]

    def resolved(self, schema: Schema) -> Schema:
        """A field's schema with its `$ref` followed and `null` dropped; its own words win."""
        if "anyOf" in schema:
            inner = next(choice for choice in schema["anyOf"] if choice.get("type") != "null")
            return {**self.resolved(inner), **{k: schema[k] for k in schema if k != "anyOf"}}
        if "$ref" in schema:
            return self.definitions[schema["$ref"].removeprefix(_REF)]
        if [part.keys() for part in schema.get("allOf", ())] == [{"$ref"}]:
            return {
                **self.resolved(schema["allOf"][0]),
                **{k: schema[k] for k in schema if k != "allOf"},
            }
        return schema

    def rows(self, record: Schema, prefix: str) -> Iterator[Row]:
        """One row a field, nested ones after the field that holds them."""
        required = record.get("required", ())
        for name, raw in record["properties"].items():
            yield from self.field(f"{prefix}{name}", self.resolved(raw), name in required)

    def field(self, path: str, schema: Schema, required: bool) -> Iterator[Row]:
        default = "**required**" if required else ""
        if "default" in schema:
            default = f"`{_plain(schema['default'])}`"
        yield Row(f"`{path}`", self.type_of(schema), default, schema.get("description", ""))
        yield from self.inside(path, schema)

    def inside(self, path: str, schema: Schema) -> Iterator[Row]:
        if schema.get("type") == "array":
            yield from self.inside(f"{path}[]", self.resolved(schema["items"]))
        elif "patternProperties" in schema:
            (inner,) = schema["patternProperties"].values()
            yield from self.inside(f"{path}.*", self.resolved(inner))
        elif choices := [
            part for part in schema.get("allOf", ()) if "$ref" in part.get("then", {})
        ]:
            for choice in choices:
                ((tag, value),) = choice["if"]["properties"].items()
                record = self.resolved(choice["then"])
                yield Row(f"`{path}`", f"with `{tag}: {value['const']}`", "", record["description"])
                rest = {k: v for k, v in record["properties"].items() if k != tag}
                yield from self.rows({**record, "properties": rest}, f"{path}.")
        elif "properties" in schema:
            yield from self.rows(schema, f"{path}.")

    def type_of(self, schema: Schema) -> str:
        if "const" in schema:
            return f"`{schema['const']}`"
        if "enum" in schema:
            return ", ".join(f"`{value}`" for value in schema["enum"])
        if schema.get("pattern") in _BY_PATTERN:
            return _BY_PATTERN[schema["pattern"]]
        match schema["type"]:
            case "array":
                return f"list of {self.type_of(self.resolved(schema['items']))}"
            case "object" if "patternProperties" in schema:
                (inner,) = schema["patternProperties"].values()
                return f"map to {self.type_of(self.resolved(inner))}"
            case "integer" | "number" as number:
                return f"{number}{_bounds(schema)}"
            case other:
                return str(other)


def _bounds(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" {_plain(low)} to {_plain(high)}"
    if low is not None:
        return f" from {_plain(low)}"
    if "exclusiveMinimum" in schema:
        upper = f", at most {_plain(high)}" if high is not None else ""
        return f" above {_plain(schema['exclusiveMinimum'])}{upper}"
    return ""


def _plain(value: Any) -> str:
    """As YAML would write it in flow style."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        return value
    return json.dumps(value)


def _table(rows: Iterator[Row]) -> str:
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def render() -> str:
    """The whole page, in Markdown."""
    made = schemas()
    first = _Reader(made["function.json"])
    parts = [
        _INTRO,
        "## metadata\n",
        _table(first.rows(first.definitions["Metadata"], "metadata.")),
    ]
    for kind in MODELS:
        schema = made[f"{kind.lower()}.json"]
        reader = _Reader(schema)
        spec = reader.resolved(schema["properties"]["spec"])
        parts += [f"## {kind}\n", schema["description"] + "\n", _table(reader.rows(spec, "spec."))]
    return "\n".join(parts)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m schemas.reference FILE")
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(), encoding="utf-8")
