"""The plain score of many candidates: the same sum as score's, over whole columns at once.

Imported where a function has many replicas and only there: numpy takes 15 MB. Not here: what the sum
means, other weights than the default, or a few candidates, where plain lists are as fast (score).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from router.core.score import Chance, Fleet


def backlog_s(fleet: Fleet) -> np.ndarray:
    """Seconds of prefill that stand before a new request, of each."""
    behind: np.ndarray = np.asarray(fleet.ready_at) - fleet.now
    np.maximum(behind, np.asarray(fleet.floor_s), out=behind)
    return behind


def busy_share(backlog: np.ndarray, cost_s: float) -> float:
    """rho, of what is queued and what the prompt would cost."""
    return float(np.minimum(backlog, cost_s).sum()) / (cost_s * len(backlog)) if cost_s else 0.0


def costs_s(
    fleet: Fleet, backlog: np.ndarray, cold_s: float, held: Sequence[tuple[float, Sequence[int]]]
) -> np.ndarray:
    """Of each: rtt, wait and prefill. `cold_s` and `held` are priced seconds, of nothing and of what is cached."""
    count = len(backlog)
    if sum([len(positions) for _, positions in held]) == count:
        # All hold something, as where all prompts begin alike: begin with what most hold.
        base = max(held, key=_size)
        costs = np.full(count, base[0])
        held = [group for group in held if group is not base]
    else:
        costs = np.full(count, cold_s)
    for seconds, positions in held:
        # A tuple would be one place in several dimensions; a single number is set at once.
        costs[[*positions] if len(positions) > 1 else positions[0]] = seconds
    costs *= np.asarray(fleet.factor)
    costs += np.asarray(fleet.rtt_s) + backlog + np.asarray(fleet.kv_used)
    return costs


def least(costs: np.ndarray, chance: Chance) -> int:
    """Position of the least; among equals at random."""
    ties = np.flatnonzero(costs == costs.min())
    return int(ties[int(chance.random() * len(ties))] if len(ties) > 1 else ties[0])


def _size(group: tuple[float, Sequence[int]]) -> int:
    return len(group[1])
