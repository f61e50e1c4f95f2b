"""Status documents as YAML that people read in Git, by the C emitter: thousands a second."""

from __future__ import annotations

import io
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

HEADER: Final = b"# Written by the DetoServe reconciler. Edits here have no effect.\n"


def render_document(document: dict[str, Any]) -> bytes:
    """Block style, keys in the document's own order; equal documents give equal bytes."""
    yaml = YAML(typ="safe", pure=False)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 4096
    out = io.BytesIO()
    yaml.dump(document, out)
    return HEADER + out.getvalue()


def parse_document(data: bytes) -> Any:
    """What was rendered; None for anything that is no YAML."""
    try:
        return YAML(typ="safe", pure=False).load(data)
    except YAMLError:
        return None
