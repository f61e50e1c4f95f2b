"""Prices of GPUs in clouds, as SkyPilot's catalogue has them. Not here: what is asked for (core)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from typing import Any, Final

from reconciler.backends.skypilot.api import Refusal, RequestUnknown, SkyPilotApi
from reconciler.core.placement import Catalogue
from reconciler.core.price_questions import Question, Row, catalogue_of
from reconciler.errors import BackendUnreachable

_TIMEOUT_S: Final = 120.0
"""The server may have to fetch the catalogue first."""
_FIELDS: Final = 10


class SkyPilotPrices:
    """Asks one API server."""

    def __init__(self, api: SkyPilotApi) -> None:
        self._api = api

    async def prices(self, questions: Collection[Question]) -> Catalogue:
        """What the catalogue knows of what is asked; the rest is left out.

        Raises:
            BackendUnreachable: nothing is known.
        """
        if not questions:
            return {}
        types = "|".join(sorted({re.escape(q.gpu_type) for q in questions}))
        try:
            request_id = await self._api.submit(
                "/list_accelerators",
                {
                    "gpus_only": True,
                    "name_filter": f"^({types})$",
                    "clouds": sorted({q.cloud for q in questions}),
                    "all_regions": True,
                    "require_price": True,
                    "case_sensitive": False,
                },
            )
            answer = await self._api.result(request_id, _TIMEOUT_S)
        except Refusal as refusal:
            raise BackendUnreachable(f"SkyPilot's catalogue: {refusal}") from None
        except (RequestUnknown, TimeoutError):
            raise BackendUnreachable(
                f"SkyPilot's catalogue did not answer within {_TIMEOUT_S:g} s"
            ) from None
        return catalogue_of(questions, _rows(answer))


def _rows(answer: bytes) -> list[Row]:
    """Instance types as lists, in the order of SkyPilot's InstanceTypeInfo; unsold ones are NaN."""
    try:
        # msgspec knows no NaN.
        data = json.loads(answer)
        return [
            Row(str(i[0]), str(i[2]), float(i[3]), _usd(i[7]), _usd(i[8]), str(i[9]))
            for instances in data.values()
            for i in instances
            if len(i) >= _FIELDS
        ]
    except (ValueError, TypeError, AttributeError) as error:
        raise BackendUnreachable(f"SkyPilot's catalogue cannot be read: {error}") from None


def _usd(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
