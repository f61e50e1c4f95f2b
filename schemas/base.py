"""What all kinds share: strictness, names, metadata.

Not here: reading YAML (reconciler.sources) or any one kind's fields.

Patterns stand for pydantic (Rust's regex) and for JSON Schema (ECMA 262) alike, so they name ASCII
classes instead of the word class, whose meaning differs, and use no lookaround.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic_core import core_schema

API_VERSION: Final = "detoserve.ai/v1alpha1"
NAME_PATTERN: Final = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"


class StrictModel(BaseModel):
    """A frozen record that refuses unknown fields and silent conversions; camelCase outside."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        alias_generator=to_camel,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        validate_default=False,
        ser_json_inf_nan="null",
    )


def also(extra: dict[str, Any]) -> ConfigDict:
    """JSON Schema's way of saying what a model's validator checks across fields."""
    return ConfigDict(json_schema_extra=extra)


def given(field: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON Schema that holds where `field` is there and matches."""
    return {"required": [field], "properties": {field: schema}}


def _no_duplicates(items: list[Any]) -> list[Any]:
    seen = set()
    for item in items:
        if item in seen:
            raise ValueError(f"{item!r} stands twice; once is enough")
        seen.add(item)
    return items


class Unique:
    """Marks a list that holds nothing twice, for pydantic and for JSON Schema."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(_no_duplicates, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "uniqueItems": True}


Name = Annotated[str, Field(min_length=1, max_length=63, pattern=NAME_PATTERN)]
"""Lower-case letters, digits and '-', at most 63: a DNS label."""

Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=64)]
"""A region, a residency label: compared as it stands."""
GpuType = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
"""As SkyPilot names it: H100, A100-80GB, L4."""
LabelKey = Annotated[
    str,
    Field(
        pattern=r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$",
        max_length=317,
    ),
]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$")]


class Metadata(StrictModel):
    """Who an object is. Only `name` has an effect; labels and annotations are yours."""

    name: Name
    """Unique among the objects of its kind: lower-case letters, digits and '-', at most 63."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Short facts for people and tools to select by; keys and values as Kubernetes has them."""
    annotations: dict[LabelKey, str] = Field(default_factory=dict)
    """Longer facts that nothing selects by."""


class ObjectModel(StrictModel):
    """The envelope of every kind: apiVersion, kind, metadata; spec is added by each."""

    api_version: Literal["detoserve.ai/v1alpha1"]
    """The version of this format."""
    metadata: Metadata
    """Who the object is."""
