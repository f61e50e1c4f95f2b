"""Which build of the router this is.

Not here: making one (deploy/compile_router.py).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from router import relay


def version_name() -> str:
    """Of the package that is installed."""
    try:
        return version("detoserve")
    except PackageNotFoundError:
        return "source"


def is_compiled() -> bool:
    """Whether the hot modules run compiled: requests cost half as much then."""
    return not (relay.__file__ or "").endswith(".py")
