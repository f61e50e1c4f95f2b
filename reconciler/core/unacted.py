"""Which fields that a user set have no effect in this version. Pure; shrinks as they gain one.

Validation accepts them, so that a repo is written once; status says so, so that nobody is misled.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from pydantic import BaseModel

from schemas.kinds import ConfigSpec

NOT_YET: Final[dict[str, tuple[str, ...]]] = {
    "Function": (),
    "Tenant": ("gpus.overQuotaWeight",),
    "Cluster": ("kai.parentQueue",),
    "Deployment": (),
    "Platform": (),
}

_PATHS: Final = {
    kind: [tuple(path.split(".")) for path in paths] for kind, paths in NOT_YET.items()
}


def not_acted_on_yet(value: ConfigSpec) -> list[str]:
    """Paths under `spec` that the user wrote and nothing acts on, in the order of NOT_YET."""
    return [f"spec.{'.'.join(path)}" for path in _PATHS[value.kind] if _is_set(value.spec, path)]


def _is_set(model: Any, path: tuple[str, ...]) -> bool:
    if not path:
        return True
    head, rest = path[0], path[1:]
    if isinstance(model, list):
        return any(_is_set(item, path) for item in model)
    if not isinstance(model, BaseModel):
        return False
    field = _fields(type(model)).get(head.removesuffix("[]"))
    if field is None or field not in model.model_fields_set:
        return False
    inner = getattr(model, field)
    return inner is not None and _is_set(inner, rest)


@functools.cache
def _fields(model: type[BaseModel]) -> dict[str, str]:
    """As YAML names them -> as Python does."""
    return {info.alias or name: name for name, info in model.model_fields.items()}
