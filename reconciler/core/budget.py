"""How much of its budget a tenant has used, as its status says it. Pure.

Steps, not figures: a status must not change with every request. Not here: refusing requests
(routers), or the sums (ledger).
"""

from __future__ import annotations

from schemas.tenant import Budget
from schemas.wire.events import MonthToDate

_NANO = 10**9


def share_used(budget: Budget, used: MonthToDate) -> float | None:
    """Of the ceiling that is nearest, 1 when it is used up; None without a budget."""
    shares = []
    if budget.monthly_usd is not None:
        shares.append(_share(used.cost_nano_usd, budget.monthly_usd * _NANO))
    if budget.monthly_tokens is not None:
        shares.append(_share(used.input_tokens + used.output_tokens, budget.monthly_tokens))
    return max(shares, default=None)


def _share(used: float, ceiling: float) -> float:
    return used / ceiling if ceiling else 1.0


def warning(budget: Budget, used: MonthToDate) -> tuple[str, str] | None:
    """(reason, message) of the condition BudgetLow; None while there is nothing to warn of."""
    share = share_used(budget, used)
    if share is None or 100 * share < min(100.0, budget.soft_percent):
        return None
    if share >= 1:
        return "UsedUp", "this month's budget is used up; requests are refused until it ends"
    return "SoftLimit", f"more than {budget.soft_percent:g} % of this month's budget is used"
