from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import headers
from router.core.errors import Refusal
from router.core.request import BodyInvalid, read_form, read_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.just("model"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.just("model"), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.text(), JSON, max_size=4), st.text(max_size=20), st.sampled_from([None, 1])
)
def test_a_body_is_read_whole_with_its_model(rest, name, indent):
    rest = {k: v for k, v in rest.items() if k not in ("n", "best_of")}
    before = {**rest, "model": name}
    assert read_json(json.dumps(before, indent=indent).encode()) == (name, before)


@pytest.mark.parametrize(
    ("body", "says", "param"),
    [
        (b"", "byte 0", None),
        (b'{"model":"a"', "byte 12", None),
        (b'{"model":"a",}', "byte 13", None),
        (b"[]", "array", None),
        (b'{"model":["a"]}', "array", "model"),
        (b'{"model":"a","n":129}', "128", "n"),
        (b'{"model":"a","best_of":500}', "128", "best_of"),
        (b'{"model":"\xff"}', "UTF-8", None),
        (b'{"model":"a","x":"' + b"a" * 70_000 + b'\xff"}', "byte 70018", None),
        (b'{"model":"a","x":"\xe4\xb8"}', "UTF-8", None),
        (b'{"a":' + b"[" * 100_000, "deep", None),
    ],
)
def test_a_body_that_cannot_be_acted_on_says_where(body, says, param):
    with pytest.raises(BodyInvalid, match=says) as refused:
        read_json(body)
    assert refused.value.param == param


def form(*parts: tuple[str, bytes]) -> bytes:
    lines = b"".join(
        b"--BB\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (name.encode(), value)
        for name, value in parts
    )
    return lines + b"--BB--\r\n"


FORM = "multipart/form-data; boundary=BB"


def test_a_form_names_its_model_wherever_it_stands():
    body = form(
        ('name="file"; filename="model"', b"\r\n\r\nname=model--B\r\n-"),
        ('name="model"', b"whisper"),
        ('name="prompt"', b'name="model"'),
    )
    name, (start, end) = read_form(body, FORM)
    assert name == "whisper"
    assert body[start:end] == b"whisper"
    assert read_form(b"preamble\r\n" + body, 'multipart/form-data; boundary="BB"')[0] == "whisper"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (form(('name="file"', b"x")), FORM),
        (form(('name="model"', b"a"), ('name="model"', b"b")), FORM),
        (form(('name="model"', b"\xff")), FORM),
        (form(('name="model"', b"a"))[:-12], FORM),
        (form(('name="model"', b"a")), "multipart/form-data"),
        (form(('name="model"', b"a")), "application/json"),
        (b"", FORM),
    ],
)
def test_a_form_that_names_no_one_model_is_refused(body, content_type):
    with pytest.raises(BodyInvalid):
        read_form(body, content_type)


@given(st.binary(max_size=300))
def test_no_form_raises_anything_else(body):
    with contextlib.suppress(BodyInvalid):
        read_form(b"--BB" + body, FORM)


def test_what_of_a_clients_headers_passes():
    read = headers.read(
        [
            (b"Host", b"x"),
            (b"Authorization", b"bearer  secret"),
            (b"X-Stainless-Lang", b"python"),
            (b"X-Detoserve-Route", b"forged"),
            (b"x-tenant", b"root"),
            (b"X-Team-Id", b"root"),
            (b"Connection", b"keep-alive, X-Hop"),
            (b"X-Hop", b"1"),
            (b"Content-Type", b"application/json"),
            (b"X-Request-Id", b"bad id with spaces"),
        ]
    )
    assert not isinstance(read, Refusal)
    assert read.token == b"secret"
    assert read.request_id is None
    assert read.passed == b"X-Stainless-Lang: python\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "credentials",
    [
        [(b"Authorization", b"Bearer a"), (b"Authorization", b"Bearer a")],
        [(b"Authorization", b"Bearer a"), (b"X-Api-Key", b"a")],
    ],
)
def test_credentials_given_twice_are_refused(credentials):
    assert isinstance(headers.read(credentials), Refusal)


def test_other_schemes_are_no_key():
    read = headers.read([(b"Authorization", b"Basic dXNlcg==")])
    assert not isinstance(read, Refusal)
    assert read.token == b""
