"""Status documents as YAML: what is written is read back, by us and by any other parser."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from reconciler.publish.status_yaml import parse_document, render_document

scalars = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)
ODD = ["yes", "null", "~", "", "1_0", "0o17", "1:30", "2001-01-01", "=", "<<", "a: b", "- x", "#a"]


@given(st.dictionaries(st.text(), values))
def test_what_is_written_is_read_back(document):
    rendered = render_document(document)
    assert parse_document(rendered) == document
    assert YAML(typ="safe", pure=True).load(rendered) == document


@pytest.mark.parametrize("text", ODD)
def test_text_that_looks_like_something_else_stays_text(text):
    document = {text: [text]}
    rendered = render_document(document)
    assert parse_document(rendered) == document
    assert YAML(typ="safe", pure=True).load(rendered) == document


def test_people_can_read_it():
    document = {
        "kind": "Deployment",
        "status": {"ready": True, "replicas": {"wanted": 2}, "none": None, "empty": [], "no": {}},
        "conditions": [{"type": "Ready", "status": "True"}, {"type": "Stalled"}],
    }
    assert render_document(document).decode().split("\n", 1)[1] == (
        "kind: Deployment\n"
        "status:\n"
        "  ready: true\n"
        "  replicas:\n"
        "    wanted: 2\n"
        "  none: null\n"
        "  empty: []\n"
        "  no: {}\n"
        "conditions:\n"
        "- type: Ready\n"
        "  status: 'True'\n"
        "- type: Stalled\n"
    )


def test_a_long_line_is_not_folded():
    assert len(render_document({"message": "word " * 700}).splitlines()) == 2


def test_only_plain_data_is_written():
    with pytest.raises(TypeError, match="float"):
        render_document({"rate": 0.5})


@pytest.mark.parametrize("data", [b"a: [", b"\xff\xfe\x00", b"a: b: c", b"a: 1\na: 2\n", b"%YAML"])
def test_what_is_no_yaml_is_none(data):
    assert parse_document(data) is None
