"""What all kinds share: strictness, names, metadata.

Not here: reading YAML (reconciler.sources) or any one kind's fields.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

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


Name = Annotated[
    str,
    Field(
        min_length=1,
        max_length=63,
        pattern=NAME_PATTERN,
        description="Lower-case letters, digits and '-', at most 63, as a DNS label.",
    ),
]

LabelValue = Annotated[str, Field(max_length=253)]


class Metadata(StrictModel):
    """Who an object is. Only `name` has an effect; labels and annotations are yours."""

    name: Name
    labels: dict[str, LabelValue] = Field(default_factory=dict)
    """Short facts for people and tools to select by."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Longer facts that nothing selects by."""


class ObjectModel(StrictModel):
    """The envelope of every kind: apiVersion, kind, metadata; spec is added by each."""

    api_version: Literal["detoserve.ai/v1alpha1"]
    metadata: Metadata
