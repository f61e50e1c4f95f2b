"""How often an address may be wrong about its key.

A bucket an address: it empties by a failure, and fills again over a minute. While it is empty, wrong keys are
answered 429, and keys of other gateways, which may be short enough to be guessed, are not looked at. Our own
keys carry 256 random bits and are always checked: an address may be a proxy that many share, and one
client's mistake must not lock out the others. Pure: time is passed in. Not here: the check (auth).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

_MOST_ADDRESSES: Final = 10_000
_MINUTE_S: Final = 60.0


class AuthFailures:
    """Of one process. `per_minute` 0: nothing is limited."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._used: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Address -> (failures not yet forgiven, when that was so), the longest unheard of first."""

    @property
    def known(self) -> bool:
        """Whether any address has failed lately."""
        return bool(self._used)

    def _left(self, address: str, now: float) -> float:
        used, at = self._used.get(address, (0.0, now))
        return max(0.0, used - (now - at) * self._per_minute / _MINUTE_S)

    def failed(self, address: str, now: float) -> None:
        """A wrong key, or none."""
        if self._per_minute:
            used = self._left(address, now) + 1
            self._used[address] = min(used, self._per_minute + 1), now
            self._used.move_to_end(address)
            if len(self._used) > _MOST_ADDRESSES:
                self._used.popitem(last=False)

    def wait_s(self, address: str, now: float) -> float:
        """Until one more failure is allowed; 0: now."""
        if address not in self._used:
            return 0.0
        left = self._left(address, now)
        if not left:
            del self._used[address]
        over = left + 1 - self._per_minute
        if over <= 0:
            return 0.0
        return over * _MINUTE_S / self._per_minute
