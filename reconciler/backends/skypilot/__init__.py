"""The skypilot backend: workloads as SkyServe services of a SkyPilot API server.

    backend   told, observed, and the loop between
    api       the server's REST API: what is sent and how answers and errors are read
    rows      status rows to core's records
    prices    what GPUs cost in clouds
    sight     the services, looked at once a round
    outbox    what is due, sent
    notes     what is under way, on disk, so that a restart takes it up

The REST API and not SkyPilot's SDK: importing that costs 2 s and 158 MB, its calls block, and it
unpickles what the server sends.
"""

from __future__ import annotations

from reconciler.backends.skypilot.api import ApiSettings, SkyPilotApi, api_settings
from reconciler.backends.skypilot.backend import SkyPilotBackend
from reconciler.backends.skypilot.jobs import SkyPilotJobs
from reconciler.backends.skypilot.prices import SkyPilotPrices

__all__ = [
    "ApiSettings",
    "SkyPilotApi",
    "SkyPilotBackend",
    "SkyPilotJobs",
    "SkyPilotPrices",
    "api_settings",
]
