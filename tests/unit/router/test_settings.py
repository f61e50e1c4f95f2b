from __future__ import annotations

import hashlib
import json

import msgspec
import pytest

from router.core.api import PASSED
from router.openapi import document
from router.settings import ENV_PREFIX, Settings, SettingsInvalid, load, parser
from router.tables.static_table import TableInvalid, read


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path):
    config = tmp_path / "router.toml"
    config.write_text('routes = "from-file"\nport = 1\nadmin_port = 1\nhost = "::1"\n')
    settings = load(
        ["--config", str(config), "--port", "3"],
        {"DETOSERVE_ROUTER_PORT": "2", "DETOSERVE_ROUTER_ADMIN_PORT": "2"},
    )
    assert (settings.port, settings.admin_port, settings.host) == (3, 2, "::1")
    assert str(settings.routes) == "from-file"


def test_every_setting_has_a_flag_a_variable_and_a_description():
    text = parser().format_help()
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert ENV_PREFIX + name.upper() in text
        assert field.description


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "exactly one"),
        (["--routes", "a", "--redis-url", "redis://x"], "exactly one"),
        (["--redis-url", "redis://x"], "routes_public_key"),
        (["--routes", "a", "--port", "70000"], "--port"),
        (["--routes", "a", "--body-timeout-s", "nan"], "--body-timeout-s"),
        (["--routes", "a", "--config", "/nonexistent.toml"], "nonexistent"),
    ],
)
def test_wrong_settings_name_their_source(flags, says):
    with pytest.raises(SettingsInvalid, match=says):
        load(flags, {})


def test_an_unknown_name_in_the_file_is_said(tmp_path):
    config = tmp_path / "router.toml"
    config.write_text('routes = "a"\nprot = 1\n')
    with pytest.raises(SettingsInvalid, match="prot"):
        load(["--config", str(config)], {})


def file_table(**changes):
    digest = hashlib.sha256(b"key").hexdigest()
    table = {"tenants": [{"name": "t", "keys": [{"id": "k", "sha256": digest}]}], **changes}
    return json.dumps(table).encode()


def test_a_table_file_fills_in_what_it_leaves_out():
    table = read(file_table(), name="f", written_at=5.0, generation=7)
    assert (table.generation, table.published_at, table.revision) == (7, 5.0, "file")
    assert table.tenants[0].keys[0].sha256 == hashlib.sha256(b"key").digest()
    packed = msgspec.msgpack.encode(table)
    assert read(packed, name="f", written_at=0.0, generation=1) == table


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\x93",
        b"\xc1",
        file_table(version=99),
        file_table(functions=[{"name": "f"}]),
        file_table(tenants=[{"name": "t", "keys": [{"id": "k", "sha256": "zz"}]}]),
        file_table(tenants=[{"name": "t", "keys": [{"id": "k", "sha256": "g" * 64}]}]),
        file_table(tenants=["t"]),
        file_table(tenants=5),
    ],
)
def test_what_is_no_table_is_said_with_the_files_name(data):
    with pytest.raises(TableInvalid, match=r"routes\.json"):
        read(data, name="routes.json", written_at=0.0, generation=1)


def test_the_openapi_document_has_every_path():
    paths = document()["paths"]
    assert set(PASSED) < set(paths)
    assert {"/v1/models", "/health", "/ready"} < set(paths)
