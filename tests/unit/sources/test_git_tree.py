from __future__ import annotations

import pytest

from reconciler.sources.base import FileEntry
from reconciler.sources.entry_names import name_problem, printable
from reconciler.sources.git_tree import parse_history, parse_tree

A, B, C, NONE = "a" * 40, "b" * 40, "c" * 40, "0" * 40


def line(mode: str, path: bytes, kind: str = "blob", size: str = "12") -> bytes:
    return f"{mode} {kind} {A} {size:>7}\t".encode() + path + b"\0"


def test_regular_files_are_entries_in_order_of_path():
    raw = (
        line("100644", b"b/x.yaml") + line("100755", b"a b.yaml") + line("100644", "é.md".encode())
    )
    entries, problems = parse_tree(raw)
    assert entries == (
        FileEntry("a b.yaml", A, 12),
        FileEntry("b/x.yaml", A, 12),
        FileEntry("é.md", A, 12),
    )
    assert problems == ()
    assert parse_tree(b"") == ((), ())


@pytest.mark.parametrize(
    ("raw", "path", "says"),
    [
        (line("120000", "lé.yaml".encode()), "lé.yaml", "symlinks"),
        (line("160000", b"sub", "commit", "-"), "sub", "submodules"),
        (line("040755", b"odd"), "odd", "040755"),
        (line("100644", b"a/../b.yaml"), "a/../b.yaml", ".."),
        (line("100644", b"../b.yaml"), "../b.yaml", ".."),
        (line("100644", b"./b.yaml"), "./b.yaml", "."),
        (line("100644", b"/b.yaml"), "/b.yaml", "empty part"),
        (line("100644", b"a//b.yaml"), "a//b.yaml", "empty part"),
        (line("100644", b"a\\b.yaml"), "a\\b.yaml", "backslash"),
        (line("100644", b"a\nb.yaml"), "a\\nb.yaml", "control"),
        (line("100644", b"a\x1b[2Jb"), "a\\x1b[2Jb", "control"),
        (line("100644", "a\u202eb".encode()), "a\\u202eb", "control"),
        (line("100644", b"a\xffb.yaml"), "a\\xffb.yaml", "UTF-8"),
    ],
)
def test_what_is_refused_is_named_and_does_not_stop_the_rest(raw, path, says):
    entries, (problem,) = parse_tree(raw + line("100644", b"ok.yaml"))
    assert [entry.path for entry in entries] == ["ok.yaml"]
    assert problem.location.path == path
    assert problem.severity == "error"
    assert says in problem.message


@pytest.mark.parametrize(
    "path", ["a.yaml", "a/b c/d.yaml", "ünïcode.yaml", "..a/b..yaml", "日本.yml"]
)
def test_ordinary_names_are_accepted(path):
    assert name_problem(path) is None
    assert printable(path) == path


def test_history_follows_renames_and_lists_each_content_once():
    raw = (
        f":100644 100644 {B} {C} M\0new.yaml\0"
        f":100644 100644 {B} {B} R100\0old.yaml\0new.yaml\0"
        f":100644 100644 {A} {B} M\0old.yaml\0"
        f":100644 100644 {C} {A} M\0old.yaml\0"
        f":000000 100644 {NONE} {C} A\0old.yaml\0"
    ).encode()
    assert parse_history(raw, "new.yaml") == (C, B, A)


def test_history_leaves_out_deletions_symlinks_and_other_files():
    raw = (
        f":100644 000000 {A} {NONE} D\0d\0"
        f":120000 100644 {B} {A} T\0d\0"
        f":000000 120000 {NONE} {B} A\0d\0"
        f":000000 100644 {NONE} {C} A\0d/inside.yaml\0"
    ).encode()
    assert parse_history(raw, "d") == (A,)
    assert parse_history(b"", "d") == ()
