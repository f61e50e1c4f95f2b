from __future__ import annotations

import itertools
import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.sources.yaml_document import Limits, YamlError, parse_documents

# 9^9 leaves in 306 bytes.
BILLION_LAUGHS = (
    "a: &a ["
    + ",".join("x" * 9)
    + "]\n"
    + "".join(
        f"{name}: &{name} [" + ",".join([f"*{before}"] * 9) + "]\n"
        for before, name in itertools.pairwise("abcdefghi")
    )
)


def data(text: str) -> object:
    (document,) = parse_documents(text.encode())
    return document.data


def refusal(raw: bytes | str, limits: Limits | None = None) -> YamlError:
    """The error, which must come quickly whatever the input."""
    raw = raw.encode() if isinstance(raw, str) else raw
    began = time.perf_counter()
    with pytest.raises(YamlError) as caught:
        parse_documents(raw, limits or Limits())
    assert time.perf_counter() - began < 1.0
    return caught.value


def test_every_field_has_the_place_of_its_key():
    text = "# first\nkind: A\nspec:\n  list:\n  - x: 1\n  - {y: 2}\n  ünï: é\n"
    (document,) = parse_documents(text.encode())
    assert document.data == {"kind": "A", "spec": {"list": [{"x": 1}, {"y": 2}], "ünï": "é"}}
    assert document.marks == {
        (): (2, 1),
        ("kind",): (2, 1),
        ("spec",): (3, 1),
        ("spec", "list"): (4, 3),
        ("spec", "list", 0): (5, 5),
        ("spec", "list", 0, "x"): (5, 5),
        ("spec", "list", 1): (6, 5),
        ("spec", "list", 1, "y"): (6, 6),
        ("spec", "ünï"): (7, 3),
    }


def test_columns_count_characters_and_a_byte_order_mark_is_none():
    (document,) = parse_documents("\ufeff{é: 1, b: 2}".encode())
    assert document.marks["b",] == (1, 8)


def test_documents_keep_their_lines():
    first, second, third = parse_documents(b"a: 1\n---\n# nothing\n---\nb: 2\n")
    assert (first.data, second.data, third.data) == ({"a": 1}, None, {"b": 2})
    assert third.marks["b",] == (5, 1)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "\n\n", "\ufeff"])
def test_a_file_without_a_document_has_none(text):
    assert parse_documents(text.encode()) == ()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("~", None),
        ("null", None),
        ("", None),
        ("0o17", 15),
        ("017", 17),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1:30:00", "1:30:00"),
        ("+12", 12),
        ("-7", -7),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1.5E-2", -0.015),
        ("2026-01-31", "2026-01-31"),
        ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z"),
        ("-", None),
        ("1.2.3", "1.2.3"),
        ("=", "="),
        ("9223372036854775807", 2**63 - 1),
        ("'1'", "1"),
        ('"true"', "true"),
        ('""', ""),
        ("'~'", "~"),
        ("|\n  1\n", "1\n"),
        (">-\n  true\n", "true"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    if text == "-":  # a list with one empty item, not text
        value = [None]
    found = data(f"v:\n  {text}" if text == "-" else f"v: {text}")
    assert isinstance(found, dict)
    assert found["v"] == value
    assert type(found["v"]) is type(value)


@pytest.mark.parametrize(
    ("raw", "line", "column", "says"),
    [
        (b"a: 1\nb: \xff\n", 2, 4, "UTF-8"),
        ("a: 1".encode("utf-16"), 1, 1, "UTF-16"),
        ("a: 1".encode("utf-16-le"), 1, 2, "NUL"),
        ("a: 1".encode("utf-32"), 1, 1, "UTF-32"),
        (b"a: 1\nb: x\0y\n", 2, 5, "NUL"),
        (b'a: "x\\0y"', 1, 4, "NUL"),
        (b"a: \x1b[31m", 1, 4, "U+001B"),
        (b"# c\rkind: Evil\n", 1, 4, "U+000D"),
        ("# c\u2028kind: Evil".encode(), 1, 4, "U+2028"),
        ("# c\x85kind: Evil".encode(), 1, 4, "U+0085"),
        ("a: \u202etxet".encode(), 1, 4, "U+202E"),
        ("a: 1\n\ufeffb: 2".encode(), 2, 1, "U+FEFF"),
        (b"a: 1\nb:\n  c: 1\n  c: 2\n", 4, 3, "first on line 3"),
        (b'"a": 1\na: 2\n', 2, 1, "'a' stands twice"),
        (b"a: {b: 1, b: 2}", 1, 11, "stands twice"),
        (b"a: &x 1", 1, 4, "anchor"),
        (b"&x a: 1", 1, 1, "anchor"),
        (b"a: [&x]", 1, 5, "anchor"),
        (b"a: *x", 1, 4, "alias"),
        (b"? *x\n: 1", 1, 3, "alias"),
        (b"base: {a: 1}\nd:\n  <<: {b: 1}", 3, 3, "merge key"),
        (b"a: !!str 1", 1, 4, "tags"),
        (b"a: !!python/object/apply:os.system [id]", 1, 4, "tags"),
        (b"a: !env HOME", 1, 4, "tags"),
        (b"%TAG ! tag:x,2000:\n---\na: 1", 1, 1, "%TAG"),
        (b"%YAML 1.1\n---\na: yes", 1, 1, "YAML 1.2"),
        (b"1: a", 1, 1, 'write "1" in quotes'),
        (b"true: a", 1, 1, 'write "true" in quotes'),
        (b"~: a", 1, 1, "must be text, not null"),
        (b"? [a]\n: b", 1, 3, "must be text"),
        (b"replicas: {{ .Values.n }}", 1, 12, "template"),
        (b"a: .inf", 1, 4, "infinity"),
        (b"a: -.INF", 1, 4, "infinity"),
        (b"a: .NaN", 1, 4, "infinity"),
        (b"a: 1e999", 1, 4, "too large"),
        (b"a: 9223372036854775808", 1, 4, "64 bits"),
        (b"a: 0xFFFFFFFFFFFFFFFFFF", 1, 4, "64 bits"),
        (b"a:\n\t- b", 2, 1, "spaces"),
        (b"a: b: c", 1, 5, "quotes"),
        (b"a:\n  - 1\n - 2", 3, 2, "indentation"),
        (b"a: [1, 2\n", 1, 9, "close the list"),
        (b'a: "x\n', 1, 6, "close the quote"),
        (b"a: @b", 1, 4, "quotes"),
        (b"a: {u: http://h}", 1, 12, "quotes"),
    ],
)
def test_what_is_refused_is_refused_at_its_place(raw, line, column, says):
    error = refusal(raw)
    assert (error.line, error.column) == (line, column)
    assert says in error.message
    assert str(error) == f"{line}:{column}: {error.message}"


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(BILLION_LAUGHS, id="alias bomb"),
        pytest.param("[" * 250_000, id="open lists"),
        pytest.param("{a: " * 60_000, id="open mappings"),
        pytest.param("- " * 120_000, id="nested block lists"),
        pytest.param("? " * 120_000, id="nested keys"),
        pytest.param("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 600)), id="nested block"),
        pytest.param("a: " + "9" * 250_000, id="a number of many digits"),
        pytest.param("a: 0." + "1" * 250_000, id="a fraction of many digits"),
        pytest.param("a: 1e" + "9" * 250_000, id="an exponent of many digits"),
        pytest.param("- a\n" * 60_000, id="many items"),
        pytest.param("--- \n" * 50_000, id="many documents"),
        pytest.param("&a " * 80_000, id="many anchors"),
        pytest.param("!a " * 80_000, id="many tags"),
        pytest.param("%A b\n" * 50_000, id="many directives"),
        pytest.param("[a: b, " * 30_000, id="pairs in lists"),
        pytest.param('a: "' + "x" * 250_000, id="an open quote"),
        pytest.param("[?" * 100_000, id="open complex keys"),
        pytest.param("x" * (256 * 1024 + 1), id="a large file"),
        pytest.param("\n".join(f"k{n}: 1" for n in range(20_000)), id="many keys"),
    ],
)
def test_bombs_end_quickly(raw):
    refusal(raw)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param("a: |" + "\n" * 250_000, id="blank lines"),
        pytest.param("a: >\n" + " x\n\n" * 60_000, id="folded lines"),
        pytest.param("#" * 250_000, id="a long comment"),
        pytest.param("# x\n" * 60_000, id="many comments"),
        pytest.param("a: " + "x " * 120_000, id="a long plain text"),
        pytest.param('"' + "\\x41" * 60_000 + '"', id="many escapes"),
    ],
)
def test_large_but_plain_files_are_read_quickly(raw):
    began = time.perf_counter()
    parse_documents(raw.encode())
    assert time.perf_counter() - began < 1.0


def test_an_alias_bomb_ends_at_its_first_anchor():
    assert len(BILLION_LAUGHS) == 306
    error = refusal(BILLION_LAUGHS)
    assert (error.line, error.column) == (1, 4)


def test_limits_are_exact():
    limits = Limits(size_bytes=20, depth=2, nodes=6, documents=2)
    assert parse_documents(b"a: [1, 2]", limits)
    assert parse_documents(b"a: 1\n---\nb: 2", limits)
    assert "20" in refusal(b"a: 'xxxxxxxxxxxxxxxx'", limits).message
    assert "levels" in refusal(b"a: [[1]]", limits).message
    assert "values" in refusal(b"[1, 2, 3, 4, 5, 6]", limits).message
    assert "documents" in refusal(b"a\n---\nb\n---\nc", limits).message


def test_values_of_all_documents_count_together():
    assert "values" in refusal(b"[1, 2]\n---\n[1, 2]", Limits(nodes=5)).message


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", max_codepoint=0xFFFF, exclude_categories=["Cc"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(codec="ascii", categories=["L"])), inner, max_size=4
        )
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_json_reads_as_itself(value):
    # YAML 1.2 holds JSON; escapes keep what may not stand in a file as it is.
    assert data(json.dumps(value)) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_their_value(number):
    found = data(f"v: {number!r}")
    assert isinstance(found, dict)
    assert math.isclose(found["v"], number, rel_tol=0, abs_tol=0)


def outcome(raw: bytes) -> tuple[list[object], list[tuple[int, int]]]:
    """What a file holds, and every place that is named: of its fields, or of its error."""
    try:
        documents = parse_documents(raw)
    except YamlError as error:
        return [], [(error.line, error.column)]
    return [d.data for d in documents], [m for d in documents for m in d.marks.values()]


@given(st.binary(max_size=400))
def test_any_bytes_are_data_or_an_error_within_the_file(raw):
    values, places = outcome(raw)
    json.dumps(values)
    # Where nothing stands at the very end, it stands on the line after it.
    assert all(1 <= line <= raw.count(b"\n") + 2 and column >= 1 for line, column in places)


@given(st.text(alphabet="ab:-?[]{},&*!|>'\"%@`#~.0e<= \n", max_size=80))
def test_any_punctuation_is_data_or_an_error_within_the_file(text):
    values, places = outcome(text.encode())
    json.dumps(values)
    lines = [*text.split("\n"), ""]
    assert all(1 <= line <= len(lines) for line, _ in places)
    assert all(1 <= column <= len(lines[line - 1]) + 1 for line, column in places)
