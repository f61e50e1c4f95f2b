"""JSON Schema of the kinds, for editors and for checks without DetoServe.

`python -m schemas.json_schema DIR` writes `function.json` ... `platform.json`, and `all.json`, which
tells the kinds apart by `kind`. They say the same under draft-07, which yaml-language-server reads,
and under 2020-12: shared parts stand in `definitions`, no `$ref` has siblings, unions are if-then.

Not here: what JSON Schema cannot say (expires after notBefore, a GPU count that suffices); pydantic
checks that when a file is loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, NoDefault
from pydantic_core import core_schema

from schemas.kinds import MODELS, ConfigSpec
from schemas.quantities import (
    DURATION_PATTERN,
    POSITIVE_DURATION_PATTERN,
    SIZE_PATTERN,
    format_duration,
    format_size,
)

DIALECT: Final = "http://json-schema.org/draft-07/schema#"
_FORMATTERS: Final = {
    DURATION_PATTERN: format_duration,
    POSITIVE_DURATION_PATTERN: format_duration,
    SIZE_PATTERN: format_size,
}


class _Generator(GenerateJsonSchema):
    """pydantic's generator, held to what both drafts understand alike."""

    schema_dialect = DIALECT

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - the name says it
        return False

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:
        if factory := schema.get("default_factory"):
            return factory()  # type: ignore[call-arg]  # none of ours takes the validated data
        return super().get_default_value(schema)

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """Defaults as YAML writes them; a model's are those of its fields."""
        inner = self.generate_inner(schema["schema"])
        default = self.get_default_value(schema)
        if default is NoDefault or default is None or isinstance(default, BaseModel):
            return inner
        if isinstance(default, float) and default.is_integer():
            default = int(default)
        if formatter := _FORMATTERS.get(inner.get("pattern", "")):
            default = formatter(default)
        return {**inner, "default": self.encode_default(default)}

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        """A key that does not fit the pattern is refused, not ignored."""
        made = super().dict_schema(schema)
        return {**made, "additionalProperties": False} if "patternProperties" in made else made

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        """if-then for each tag: an editor then complains about the one meant, not about all."""
        key = str(schema["discriminator"])
        choices = {str(tag): self.generate_inner(inner) for tag, inner in schema["choices"].items()}
        return {
            "type": "object",
            "required": [key],
            "properties": {key: {"enum": list(choices)}},
            "allOf": [
                {"if": {"properties": {key: {"const": tag}}, "required": [key]}, "then": choice}
                for tag, choice in choices.items()
            ],
        }


def _portable(node: Any) -> Any:
    """No keyword beside a `$ref`: draft-07 ignores it there, 2020-12 does not."""
    if isinstance(node, list):
        return [_portable(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _portable(value) for key, value in node.items()}
    if isinstance(node.get("$ref"), str) and len(node) > 1:
        return {"allOf": [{"$ref": node.pop("$ref")}], **node}
    return node


def _schema(of: Any, title: str) -> dict[str, Any]:
    made = TypeAdapter(of).json_schema(
        ref_template="#/definitions/{model}", schema_generator=_Generator
    )
    definitions = made.pop("$defs", {})
    for part in definitions.values():
        part.pop("title", None)
    return {
        "$schema": DIALECT,
        **_portable(made),
        "title": title,
        "definitions": _portable(definitions),
    }


def schemas() -> dict[str, dict[str, Any]]:
    """File name -> JSON Schema: one a kind, and one for them all."""
    found = {f"{kind.lower()}.json": _schema(model, kind) for kind, model in MODELS.items()}
    found["all.json"] = _schema(
        Annotated[ConfigSpec, Field(discriminator="kind")], "Any DetoServe object"
    )
    return found


def render() -> dict[str, str]:
    """File name -> the text of the file."""
    return {name: json.dumps(schema, indent=2) + "\n" for name, schema in schemas().items()}


def write(directory: Path) -> list[Path]:
    """Writes every schema into a folder, made where it is missing; the files written."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in render().items():
        path = directory / name
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m schemas.json_schema DIR")
    write(Path(sys.argv[1]))
