"""Keys in a tenant's file: what is edited, and that nothing else is."""

from __future__ import annotations

import difflib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from reconciler.edit.tenant_file import (
    EditRefused,
    add_key,
    expire_key,
    key_entries,
    remove_key,
    render_entry,
)

EMPTY = """\
# yaml-language-server: $schema=../.schemas/tenant.json
# Who may ask.
apiVersion: detoserve.ai/v1alpha1
kind: Tenant
metadata:
  name: acme
spec:
  models: ["*"]   # all of them
  keys: []
"""
FULL = """\
# yaml-language-server: $schema=../.schemas/tenant.json
apiVersion: detoserve.ai/v1alpha1
kind: Tenant
metadata:
  name: acme
spec:
  keys:
    # the website's
    - id: web
      sha256: aa   # made in May
      expires: 2027-01-31T00:00:00Z
    # the batch job's
    - id: batch
      sha256: "bb"
      scopes: [inference, usage]
    # the last one
    - id: old
      sha256: cc
  # who may use what
  models: ["chat", 'embed']
"""
ENTRY = {"id": "new", "sha256": "dd"}


def changed(before: str, after: str) -> list[str]:
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return [line for line in lines if line[0] in "+-"]


def test_first_key_of_an_empty_list() -> None:
    assert changed(EMPTY, add_key(EMPTY, "acme", ENTRY)) == [
        "-   keys: []",
        "+   keys:",
        "+   - id: new",
        "+     sha256: dd",
    ]


def test_a_tenant_without_keys_gets_the_list() -> None:
    bare = EMPTY.replace("  keys: []\n", "")
    assert changed(bare, add_key(bare, "acme", ENTRY)) == [
        "+   keys:",
        "+   - id: new",
        "+     sha256: dd",
    ]


def test_a_further_key_keeps_comments_quotes_and_indentation() -> None:
    made = add_key(FULL, "acme", ENTRY | {"expires": "2027-02-01T00:00:00Z"})
    assert changed(FULL, made) == [
        "+     - id: new",
        "+       sha256: dd",
        "+       expires: '2027-02-01T00:00:00Z'",
    ]


def test_an_id_is_used_once() -> None:
    with pytest.raises(EditRefused, match=r"has a key with id 'web'; give another --id"):
        add_key(FULL, "acme", {"id": "web", "sha256": "dd"})


def test_removing_takes_the_comment_above_and_leaves_the_next_key_its_own() -> None:
    assert changed(FULL, remove_key(FULL, "acme", "web")) == [
        "-     # the website's",
        "-     - id: web",
        "-       sha256: aa   # made in May",
        "-       expires: 2027-01-31T00:00:00Z",
    ]
    assert changed(FULL, remove_key(FULL, "acme", "old")) == [
        "-     # the last one",
        "-     - id: old",
        "-       sha256: cc",
    ]


def test_removing_the_only_key_leaves_an_empty_list() -> None:
    one = add_key(EMPTY, "acme", ENTRY)
    assert remove_key(one, "acme", "new") == EMPTY


def test_an_unknown_key_is_named_with_those_there_are() -> None:
    with pytest.raises(EditRefused, match=r"no key with id 'x'; it has web, batch, old"):
        remove_key(FULL, "acme", "x")


def test_expiry_is_set_or_replaced() -> None:
    assert changed(FULL, expire_key(FULL, "acme", "old", "2026-12-01T00:00:00Z")) == [
        "+       expires: '2026-12-01T00:00:00Z'",
    ]
    assert changed(FULL, expire_key(FULL, "acme", "web", "2026-12-01T00:00:00Z")) == [
        "-       expires: 2027-01-31T00:00:00Z",
        "+       expires: '2026-12-01T00:00:00Z'",
    ]


def test_keys_in_flow_style() -> None:
    flow = EMPTY.replace("keys: []", "keys: [{id: web, sha256: aa}, {id: old, sha256: cc}]")
    assert [k["id"] for k in key_entries(add_key(flow, "acme", ENTRY), "acme")] == [
        "web",
        "old",
        "new",
    ]
    assert [k["id"] for k in key_entries(remove_key(flow, "acme", "web"), "acme")] == ["old"]


def test_only_the_named_tenant_of_several_in_one_file() -> None:
    other = EMPTY.replace("name: acme", "name: other").replace("keys: []", "keys:   []  # none")
    file = f"---\n{other}---\n{EMPTY}---\n# the end\n{other.replace('other', 'third')}"
    made = add_key(file, "acme", ENTRY)
    assert changed(file, made) == [
        "-   keys: []",
        "+   keys:",
        "+   - id: new",
        "+     sha256: dd",
    ]


def test_no_such_tenant() -> None:
    with pytest.raises(EditRefused, match="Tenant/nobody does not stand in this file"):
        add_key(EMPTY, "nobody", ENTRY)


def test_a_file_that_is_no_yaml() -> None:
    with pytest.raises(EditRefused, match="run detoserve validate"):
        add_key("kind: [", "acme", ENTRY)


def test_windows_line_ends_stay() -> None:
    crlf = FULL.replace("\n", "\r\n")
    for made in (
        add_key(crlf, "acme", ENTRY),
        remove_key(crlf, "acme", "batch"),
        expire_key(crlf, "acme", "old", "2026-12-01T00:00:00Z"),
    ):
        assert made.count("\n") == made.count("\r\n")
    assert add_key(crlf, "acme", ENTRY).replace("\r\n", "\n") == add_key(FULL, "acme", ENTRY)


ids = st.text("abcdefghij", min_size=1, max_size=6)


@given(st.lists(ids, unique=True, max_size=5), ids, st.booleans(), st.integers(0, 2))
def test_adding_then_removing_changes_nothing(
    there: list[str], name: str, block: bool, offset: int
) -> None:
    entries = [{"id": i, "sha256": "ee"} for i in there if i != name]
    yaml = YAML()
    yaml.indent(mapping=2, sequence=2 + offset, offset=offset)
    yaml.default_flow_style = not block
    out = io.StringIO()
    yaml.dump({"kind": "Tenant", "metadata": {"name": "t"}, "spec": {"keys": entries}}, out)
    text = out.getvalue()
    more = add_key(text, "t", {"id": name, "sha256": "ff"})
    assert [k["id"] for k in key_entries(more, "t")] == [e["id"] for e in entries] + [name]
    assert key_entries(remove_key(more, "t", name), "t") == entries


def test_the_entry_to_paste() -> None:
    assert render_entry({"id": "a", "sha256": "bb", "scopes": ["inference", "debug"]}) == (
        "    - id: a\n      sha256: bb\n      scopes:\n      - inference\n      - debug\n"
    )
