"""Secrets are found by reference and do not come out again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.backends.secret_values import redact, resolve
from reconciler.errors import Stalled
from schemas import api_keys
from schemas.function import SecretRef


def ref(**where: str) -> SecretRef:
    return SecretRef.model_validate(where)


def test_from_the_environment_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("  from-file\n")
    found = resolve({"A": ref(fromEnv="SOURCE"), "B": ref(fromFile=str(file))}, {"SOURCE": "x"})
    assert found == {"A": "x", "B": "from-file"}


def test_what_is_missing_is_named_without_any_value(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"secret\xff")
    for reference, words in (
        (ref(fromEnv="SOURCE"), "SOURCE is not set"),
        (ref(fromFile=str(tmp_path / "none")), "No such file"),
        (ref(fromFile=str(binary)), "not UTF-8"),
        (ref(kubernetesSecret="a/b"), "use fromEnv or fromFile"),
    ):
        with pytest.raises(Stalled, match=words) as caught:
            resolve({"TOKEN": reference}, {"SOURCE": ""})
        assert "secret\xff" not in str(caught.value)


@given(st.text(min_size=4), st.text(), st.text())
def test_no_value_survives_redaction(value: str, before: str, after: str) -> None:
    if value not in "[secret]":
        assert value not in redact(f"{before}{value}{after}", [value]).replace("[secret]", "\0")


def test_keys_are_hidden_whoever_issued_them() -> None:
    key = api_keys.create().text
    foreign = "hf_" + "a" * 34
    text = redact(f"start {key} and --token={foreign} end", [])
    assert key not in text
    assert foreign not in text
    assert text.startswith("start [secret] and")


def test_a_value_inside_another_goes_with_it() -> None:
    assert redact("token-long and token", ["token", "token-long"]) == "[secret] and [secret]"
