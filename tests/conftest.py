"""Settings of every test: none is judged by how fast a busy machine is."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared machine")
