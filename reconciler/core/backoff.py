"""How long to wait before the next try: exponential, capped, spread by jitter. Pure.

Not here: clocks, randomness (both are given), or what counts as a failure.
"""

from __future__ import annotations

from typing import Final

# 2 ** 62 times any base is beyond every cap, and still a float.
_MAX_EXPONENT: Final = 62


def delay_s(
    failures: int, *, base_s: float, cap_s: float, jitter_fraction: float, random_value: float
) -> float:
    """Seconds to wait after `failures` failures in a row; 0 after none.

    Doubles from `base_s` up to `cap_s`, less up to `jitter_fraction` of itself, so that what failed
    together does not try again together. `jitter_fraction` and `random_value` are in [0, 1].
    """
    if failures <= 0:
        return 0.0
    full_s = min(cap_s, base_s * 2.0 ** min(failures - 1, _MAX_EXPONENT))
    return full_s * (1.0 - jitter_fraction * random_value)
