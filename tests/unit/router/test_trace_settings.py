from __future__ import annotations

import pytest

from router.settings import Settings, SettingsInvalid, load
from router.telemetry.trace_settings import start_tracing, traces_endpoint

SECRET = "hunter2"


def settings(**more):
    return Settings(routes="a", **more)


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, None),
        ({"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://c/otlp/"}, "https://c/otlp/v1/traces"),
        (
            {
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t:1/as/it/is",
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "OTEL_TRACES_EXPORTER": "otlp",
            },
            "http://t:1/as/it/is",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "True"}, None),
    ],
)
def test_the_standard_variables_switch_traces_on_and_off(environment, url):
    target = traces_endpoint(settings(), environment)
    assert (target and target[1]) == url


def test_the_setting_wins_over_the_variables_but_not_over_the_main_switch():
    chosen = settings(otlp_endpoint="http://flag:4318/")
    environment = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://other:1",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
    }
    assert traces_endpoint(chosen, environment) == (
        "otlp_endpoint",
        "http://flag:4318/v1/traces",
    )
    assert start_tracing(chosen, {"OTEL_SDK_DISABLED": "true"}, version="1") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://user:{SECRET}@c:4318"),
    ],
)
def test_what_the_router_cannot_do_is_said_by_the_variables_name(name, value):
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", name: value}
    with pytest.raises(
        SettingsInvalid, match=name.replace("_TRACES_PROTOCOL", "_PROTOCOL")
    ) as said:
        traces_endpoint(settings(), environment)
    assert SECRET not in str(said.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--otlp-endpoint", "collector:4318"], r"--otlp-endpoint: give the collector as"),
        (["--otlp-endpoint", f"http://u:{SECRET}@c"], "--otlp-endpoint: .*OTLP_HEADERS"),
        (["--otlp-endpoint", "http://[c"], "--otlp-endpoint"),
        (["--otlp-endpoint", "http://c:port"], "--otlp-endpoint"),
        (["--trace-sample-ratio", "1.1"], "--trace-sample-ratio"),
        (["--trace-sample-ratio", "nan"], "--trace-sample-ratio"),
    ],
)
def test_wrong_flags_are_said_without_their_secrets(flags, says):
    with pytest.raises(SettingsInvalid, match=says) as said:
        load(["--routes", "a", *flags], {})
    assert SECRET not in str(said.value)


def test_a_variable_of_the_sdk_out_of_range_is_said(monkeypatch):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with pytest.raises(SettingsInvalid, match="OTEL_BSP_"):
        start_tracing(settings(otlp_endpoint="http://127.0.0.1:4318"), {}, version="1")
