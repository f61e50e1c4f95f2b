"""Ceilings on requests and tokens: of a tenant, of one of its keys, of a function.

Not here: counting against them (router).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import StrictModel


class Limits(StrictModel):
    """Ceilings over all routers together; unset means no ceiling, 0 lets nothing through."""

    requests_per_minute: Annotated[int, Field(ge=0)] | None = None
    """Requests admitted in any minute."""
    tokens_per_minute: Annotated[int, Field(ge=0)] | None = None
    """Prompt and answer tokens in any minute."""
    concurrent: Annotated[int, Field(ge=0)] | None = None
    """Requests in flight at once."""
