"""Settings of every test: none is judged by how fast a busy machine is, or runs what is not there any more."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile(
    "long", hypothesis.settings.get_profile("shared machine"), max_examples=2000
)
hypothesis.settings.load_profile("shared machine")

ROUTER = Path(__file__).resolve().parents[1] / "router"


def pytest_configure() -> None:
    """Python prefers a compiled module to its source, however old it is."""
    for compiled in ROUTER.rglob("*.so"):
        source = compiled.with_name(compiled.name.partition(".")[0] + ".py")
        if not source.exists() or source.stat().st_mtime > compiled.stat().st_mtime:
            raise pytest.UsageError(
                f"{source.relative_to(ROUTER.parent)} has changed since it was compiled: "
                "`just compile` does so again, `just uncompile` goes back to the sources"
            )
