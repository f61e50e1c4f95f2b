"""Whether requests are traced, and where to: the router's settings and the standard OTEL_* ones.

OpenTelemetry is imported only when something switches tracing on. Not here: the spans (tracing).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from router.settings import Settings, SettingsInvalid, check_otlp_endpoint

if TYPE_CHECKING:
    from router.telemetry.tracing import Tracing

_log: Final = logging.getLogger(__name__)
_PATH: Final = "/v1/traces"


def traces_endpoint(settings: Settings, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """What switches tracing on, and the URL that spans are posted to; None when it is off.

    Raises:
        SettingsInvalid: a variable asks for what the router does not do.
    """

    def env(name: str) -> str:
        return environment.get(name, "").strip()

    if env("OTEL_SDK_DISABLED").lower() == "true":
        return None
    if settings.otlp_endpoint:
        return "otlp_endpoint", settings.otlp_endpoint.rstrip("/") + _PATH
    for name, path in (
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", ""),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", _PATH),
    ):
        if not env(name):
            continue
        exporter = env("OTEL_TRACES_EXPORTER")
        if exporter == "none":
            return None
        if exporter not in ("", "otlp"):
            raise SettingsInvalid("OTEL_TRACES_EXPORTER: the router knows otlp and none")
        protocol = env("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or env("OTEL_EXPORTER_OTLP_PROTOCOL")
        if protocol not in ("", "http/protobuf"):
            raise SettingsInvalid(
                "OTEL_EXPORTER_OTLP_PROTOCOL: the router exports by http/protobuf only; name such "
                "an endpoint (collectors have it on port 4318) in otlp_endpoint"
            )
        try:
            endpoint = check_otlp_endpoint(env(name))
        except ValueError as error:
            raise SettingsInvalid(f"{name}: {error}") from None
        return name, endpoint.rstrip("/") + path if path else endpoint
    return None


def start_tracing(
    settings: Settings, environment: Mapping[str, str], *, version: str
) -> Tracing | None:
    """Tracing as it is set; None when it is off.

    Raises:
        SettingsInvalid: it is switched on and cannot be: packages are missing, or a value is wrong.
    """
    target = traces_endpoint(settings, environment)
    if target is None:
        if settings.otlp_endpoint:
            _log.warning("no traces in spite of otlp_endpoint: OTEL_SDK_DISABLED is true")
        return None
    switch, endpoint = target
    try:
        from router.telemetry.tracing import Tracing  # noqa: PLC0415 - costs nothing while it is off
    except ModuleNotFoundError as error:
        raise SettingsInvalid(
            f"{switch}: traces need OpenTelemetry ({error.name} is missing): install the extra "
            "`otel` as in `uv pip install 'detoserve[router,otel]'`, or set OTEL_SDK_DISABLED=true"
        ) from None
    try:
        return Tracing(settings, version=version, endpoint=endpoint)
    except ValueError as error:
        raise SettingsInvalid(f"OTEL_BSP_* of the environment: {error}") from None
