"""Splicing a body says what parsing, changing and writing it would, and touches nothing else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.splice import preceded, spans, spliced

KEYS = ("model", "stream_options", "cache_salt")
VALUES = {
    "model": b'"served"',
    "stream_options": b'{"include_usage":true}',
    "cache_salt": b'"\\u00e4"',
}
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8),
    st.sampled_from(['"model"', '"cache_salt":"x"', "\\", '"', "{", "model"]),
)  # fmt: skip
names = st.one_of(
    st.sampled_from(KEYS), st.text(max_size=6), st.sampled_from(["stream", '"model"'])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=12,
)


def written(pairs, data) -> bytes:
    """An object with keys in this order, twice where they stand twice, in some way of writing."""
    ascii_only = data.draw(st.booleans())
    gap = data.draw(st.sampled_from(["", " ", "\n\t"]))
    parts = []
    for name, value in pairs:
        key = json.dumps(name, ensure_ascii=ascii_only)
        if name in KEYS and data.draw(st.booleans()):
            key = '"' + "".join(f"\\u{ord(c):04x}" for c in name) + '"'
        parts.append(f"{key}{gap}:{gap}{json.dumps(value, ensure_ascii=ascii_only)}")
    return (gap + "{" + gap + f"{gap},{gap}".join(parts) + gap + "}" + gap).encode(
        "utf-8", "surrogatepass"
    )


@given(pairs=st.lists(st.tuples(names, values), max_size=6), data=st.data())
def test_it_says_what_a_parser_and_a_writer_would(pairs, data):
    body = written(pairs, data)
    chosen = {k: v for k, v in VALUES.items() if data.draw(st.booleans())}
    before = json.loads(body)
    out = spliced(body, chosen, set(before))

    def all_pairs(text: bytes) -> list:
        found: list = []
        json.loads(text, object_pairs_hook=lambda each: found.append(each) or each)
        return found[-1]

    assert json.loads(out) == before | {k: json.loads(v) for k, v in chosen.items()}
    # Also for a parser that takes the first of two.
    for name, value in all_pairs(out):
        if name in chosen:
            assert value == json.loads(chosen[name]) or isinstance(value, list)
    kept = [(n, v) for n, v in all_pairs(body) if n not in chosen]
    assert [(n, v) for n, v in all_pairs(out) if n not in chosen] == kept


@given(pairs=st.lists(st.tuples(names, values), max_size=6), data=st.data())
def test_members_may_stand_before_its_own(pairs, data):
    body = written(pairs, data)
    out = preceded(body, b'"a":1,"b":{"c":2},')
    if body.startswith(b'{"'):
        assert json.loads(out) == {"a": 1, "b": {"c": 2}} | json.loads(body)
        assert out.endswith(body[1:])
    else:
        assert out is None


def test_members_stand_before_a_large_body_too():
    body = b'{"x":"%b"}' % (b"y" * 20_000)
    assert preceded(body, b'"a":1,') == b'{"a":1,"x":"%b"}' % (b"y" * 20_000)


@given(pairs=st.lists(st.tuples(names, values), min_size=1, max_size=6), data=st.data())
def test_spans_are_exactly_the_values(pairs, data):
    body = written(pairs, data)
    found = [(key, json.loads(body[start:end])) for start, end, key in spans(body, KEYS)]
    assert found == [(name, value) for name, value in pairs if name in KEYS]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"a","x":1}', b'{"model":"b","x":1}'),
        (b'{"x":"\\"model\\"","model" : "a"}', b'{"x":"\\"model\\"","model" : "b"}'),
        (b'{"model":"a","x":{"model":"c"}}', b'{"model":"b","x":{"model":"c"}}'),
        (b'{"model":"a","model":"c"}', b'{"model":"b","model":"b"}'),
        (b'{"m\\u006fdel":"a"}', b'{"m\\u006fdel":"b"}'),
        (b'{"model":["a",{"b":"}"}],"y":[]}', b'{"model":"b","y":[]}'),
    ],
)
def test_every_other_byte_stays(body, expected):
    assert spliced(body, {"model": b'"b"'}, {"model"}) == expected


def test_what_is_missing_is_added():
    out = spliced(b' {"model":"a"}', {"model": b'"b"', "cache_salt": b'"s"'}, {"model"})
    assert out == b' {"cache_salt":"s","model":"b"}'
    assert spliced(b"{ }", {"cache_salt": b'"s"'}, ()) == b'{"cache_salt":"s" }'
    assert spliced(b"{}", {}, ()) == b"{}"
