"""Engines as supervised processes of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reconciler.backends.local.backend import LocalBackend

__all__ = ["LocalBackend"]


def __getattr__(name: str) -> Any:
    """Imported when first asked for: the reaper lives in this package and must stay small."""
    if name == "LocalBackend":
        from reconciler.backends.local.backend import LocalBackend  # noqa: PLC0415

        return LocalBackend
    raise AttributeError(name)
