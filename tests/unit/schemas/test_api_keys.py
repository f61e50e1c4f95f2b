"""API keys: every typo is caught, key-shaped text is found, and nothing else is taken for one."""

from __future__ import annotations

import hashlib
import re
import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import api_keys

ALPHABET = string.ascii_letters + string.digits + "_-"
# Shaped like keys of others, and made up here.
RUN = "aB3" * 20
FOREIGN = [
    f"sk-proj-{RUN}",
    f"sk-ant-api03-{RUN}",
    f"sk-{RUN}",
    f"sk-{'0123456789abcdef' * 2}",
    f"hf_{RUN[:34]}",
    f"sky_eyJ{RUN}.{RUN}",
    f"nvapi-{RUN}",
    f"ghp_{RUN[:36]}",
    f"github_pat_{RUN}",
    f"glpat-{RUN[:20]}",
    "AKIA" + "A1B2C3D4E5F6G7H8",
    "-----BEGIN " + "PRIVATE KEY-----",
    "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
]


def test_a_new_key_has_its_form_and_its_hash() -> None:
    key = api_keys.create()
    assert re.fullmatch(r"ds_[0-9A-Za-z]{10}_[0-9A-Za-z]{49}", key.text)
    assert api_keys.key_id(key.text) == key.id
    assert key.text.startswith(f"ds_{key.id}_")
    assert key.sha256 == hashlib.sha256(key.text.encode()).hexdigest()
    assert api_keys.digest(key.text).hex() == key.sha256
    assert api_keys.create().text != key.text


@given(place=st.integers(0, 62), step=st.integers(1, len(ALPHABET) - 1))
@settings(max_examples=200)
def test_every_single_character_error_is_caught(place: int, step: int) -> None:
    text = api_keys.create().text  # differs each time, so nothing that is drawn may depend on it
    wrong = ALPHABET[(ALPHABET.index(text[place]) + step) % len(ALPHABET)]
    assert api_keys.key_id(text[:place] + wrong + text[place + 1 :]) is None


def test_every_character_of_one_key_is_covered_by_the_checksum() -> None:
    text = api_keys.create().text
    for place, right in enumerate(text):
        for wrong in ALPHABET:
            if wrong != right:
                assert api_keys.key_id(text[:place] + wrong + text[place + 1 :]) is None


@given(st.text(max_size=80))
def test_other_text_is_no_key(text: str) -> None:
    assert api_keys.key_id(text) is None
    assert api_keys.digest(text) == hashlib.sha256(text.encode()).digest()


def test_lost_and_added_characters_are_caught() -> None:
    text = api_keys.create().text
    for damaged in (text[:-1], text[1:], text + "0", text + "\n", " " + text, text.upper(), ""):
        assert api_keys.key_id(damaged) is None


def test_keys_are_found_where_they_stand_and_never_repeated() -> None:
    key = api_keys.create().text
    text = f"token: {key}\nother: {FOREIGN[0]}\n"
    found = api_keys.find_keys(text)
    assert [offset for offset, _ in found] == [text.index(key), text.index(FOREIGN[0])]
    for _, words in found:
        assert key not in words
        assert FOREIGN[0] not in words


def test_a_mistyped_key_is_found_too() -> None:
    key = api_keys.create().text
    assert api_keys.find_keys(key[:-1] + ("a" if key[-1] != "a" else "b"))


@pytest.mark.parametrize("secret", FOREIGN)
@pytest.mark.parametrize("around", ["{}", 'key: "{}"', "KEY={};", "Bearer {}"])
def test_secrets_of_others_are_found(secret: str, around: str) -> None:
    assert len(api_keys.find_keys(around.format(secret))) == 1


@given(
    st.one_of(
        st.uuids().map(str),
        st.binary(min_size=32, max_size=32).map(bytes.hex),
        st.binary(min_size=32, max_size=32).map(lambda b: f"image@sha256:{b.hex()}"),
        st.binary(min_size=20, max_size=20).map(bytes.hex),
        st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True),
    )
)
def test_hashes_ids_digests_and_names_are_no_keys(text: str) -> None:
    assert api_keys.find_keys(f"value: {text}\n") == []


@pytest.mark.parametrize(
    "text",
    [
        "task-runner-of-the-management-platform-2",
        "sk-hynix-production-cluster-2026",
        "disk-0123456789abcdef0123456789abcdef",
        "sky_serve_replica_id_of_the_service",
        "meta-llama/Llama-3.3-70B-Instruct-FP8-dynamic",
        "hf://mistralai/Mixtral-8x7B-Instruct-v0.1",
        "s3://bucket/records_0123456789_of_a_long_path_with_more_than_fifty_characters",
        "-----BEGIN CERTIFICATE-----",
        "-----BEGIN PUBLIC KEY-----",
        '--kv-transfer-config={"kv_connector":"NixlConnector"}',
        "AKIAHABARA",
    ],
)
def test_ordinary_config_is_no_key(text: str) -> None:
    assert api_keys.find_keys(text) == []


@pytest.mark.parametrize("run", ["sk-", "ds_", "sk-a", "aB3-", "sk-proj-"])
def test_a_large_hostile_file_is_searched_quickly(run: str) -> None:
    text = run * (2**18 // len(run))
    began = time.process_time()
    api_keys.find_keys(text)
    assert time.process_time() - began < 1
