"""How long to wait before the next try, drawn: the one place where backoff meets chance.

Not here: the rule (core.backoff), or what counts as a failure.
"""

from __future__ import annotations

import random

from reconciler.core.backoff import delay_s


def backoff_s(failures: int, *, base_s: float, cap_s: float, jitter_fraction: float = 0.2) -> float:
    """Seconds to wait after `failures` failures in a row; 0 after none."""
    return delay_s(
        failures,
        base_s=base_s,
        cap_s=cap_s,
        jitter_fraction=jitter_fraction,
        random_value=random.random(),
    )
