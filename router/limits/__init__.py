"""Whether a request may enter now: limits and budgets over all routers, and the queue for room."""
