"""`python -m reconciler.cli` is `detoserve`."""

from __future__ import annotations

from reconciler.cli import main

main()
