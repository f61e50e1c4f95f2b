"""diff: applying the changes gives what they came from; paths read like the YAML."""

from __future__ import annotations

import copy
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.action import Change
from reconciler.core.diff import diff

leaves = st.one_of(st.text(max_size=3), st.integers(2, 9))
documents = st.dictionaries(
    st.sampled_from("abc"),
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=3,
)


def apply(before: Any, changes: list[Change]) -> Any:
    """What `before` becomes; None takes away, and a list ends where its items are taken away."""
    root = {"": before}
    for change in changes:
        steps: list[Any] = [""]
        for name, index in re.findall(r"\.?([a-z]+)|\[(\d+)\]", change.path):
            steps.append(name or int(index))
        node: Any = root
        for step in steps[:-1]:
            node = node[step]
        last = steps[-1]
        if isinstance(node, list) and last >= len(node):
            node.append(change.after)
        else:
            node[last] = change.after
    return _without_none(root[""])


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value if v is not None]
    return value


@given(before=documents, after=documents)
def test_applying_the_changes_gives_what_is_after(before, after):
    changes = list(diff(before, after))
    assert apply(copy.deepcopy(before), changes) == after
    assert bool(changes) == (before != after)


@given(before=documents, after=documents)
def test_every_change_is_one_and_the_way_back_is_as_long(before, after):
    changes = list(diff(before, after))
    assert all(c.before != c.after for c in changes)
    assert len({c.path for c in changes}) == len(changes)
    assert {c.path for c in diff(after, before)} == {c.path for c in changes}


def test_paths_read_like_the_yaml():
    before = {"runtime": {"args": ["-a", "-b"], "env": {"A": "1"}}}
    after = {"runtime": {"args": ["-a", "-c", "-d"], "env": {"B": "1"}}, "model": "m"}
    assert list(diff(before, after)) == [
        Change("runtime.args[1]", "-b", "-c"),
        Change("runtime.args[2]", None, "-d"),
        Change("runtime.env.A", "1", None),
        Change("runtime.env.B", None, "1"),
        Change("model", None, "m"),
    ]
