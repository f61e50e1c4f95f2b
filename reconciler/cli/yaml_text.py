"""Plain data as YAML for people: block style, in the data's own order. Not here: reading any."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter


class _Plain(SafeRepresenter):
    """Texts of several lines are written as such, not as one line of escapes."""


def _text(representer: SafeRepresenter, text: str) -> ScalarNode:
    style = "|" if "\n" in text else None
    return representer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Plain.add_representer(str, _text)


def yaml_text(documents: Sequence[dict[str, Any]]) -> str:
    """One document after another, set apart by `---` where there are several."""
    yaml = YAML(typ="safe", pure=False)
    yaml.Representer = _Plain
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 4096
    yaml.explicit_start = len(documents) > 1
    out = io.StringIO()
    yaml.dump_all(documents, out)
    return out.getvalue()
