"""How problems are written: golden lines."""

from __future__ import annotations

from reconciler.cli.problem_lines import (
    excerpt,
    github_line,
    problem_json,
    problem_line,
    summary_line,
)
from reconciler.cli.terminal import plain
from reconciler.core.config import Location, ObjectKey, Problem
from schemas.api_keys import create

ERROR = Problem(
    Location("functions/chat.yaml", 12, 5),
    'replicaz is not a field of scaling; did you mean "replicas"?',
    key=ObjectKey("Function", "chat"),
)
WARNING = Problem(Location("a,b:c.yaml", 3, 1), "100% odd\nreally", "warning")


def test_a_line_for_compilers_readers() -> None:
    assert problem_line(ERROR, plain) == (
        "functions/chat.yaml:12:5: error: replicaz is not a field of scaling; "
        'did you mean "replicas"?'
    )


def test_a_problem_of_a_whole_file_has_no_line() -> None:
    assert problem_line(Problem(Location("x.yaml"), "is bad"), plain) == "x.yaml: error: is bad"


def test_excerpt_points_at_the_column() -> None:
    assert list(excerpt(ERROR, "    replicaz: 3", plain)) == [
        "   12 |     replicaz: 3",
        "      |     ^",
    ]


def test_excerpt_counts_columns_as_a_terminal_does() -> None:
    problem = Problem(Location("x", 1, 4), "m")
    assert list(excerpt(problem, "日本: x\t\x1b[31m", plain)) == [
        "    1 | 日本: x  [31m",
        "      |      ^",
    ]


def test_excerpt_of_a_long_line_is_a_window() -> None:
    problem = Problem(Location("x", 1, 501), "m")
    line, caret = excerpt(problem, "a" * 500 + "b" + "c" * 500, plain)
    assert len(line) < 120
    assert line[caret.index("^")] == "b"


def test_excerpt_never_shows_a_key() -> None:
    key = create().text
    problem = Problem(Location("x", 1, 1), "a DetoServe API key")
    assert list(excerpt(problem, f"  token: {key}", plain)) == []


def test_excerpt_of_nothing() -> None:
    assert list(excerpt(ERROR, None, plain)) == []
    assert list(excerpt(ERROR, "   ", plain)) == []


def test_github_escapes_what_would_end_the_command() -> None:
    assert github_line(ERROR).startswith("::error file=functions/chat.yaml,line=12,col=5::replicaz")
    assert github_line(WARNING) == (
        "::warning file=a%2Cb%3Ac.yaml,line=3,col=1::100%25 odd%0Areally"
    )


def test_json_has_no_false_places() -> None:
    assert problem_json(Problem(Location("x.yaml"), "is bad")) == {
        "path": "x.yaml",
        "line": None,
        "column": None,
        "severity": "error",
        "message": "is bad",
        "object": None,
    }
    assert problem_json(ERROR)["object"] == "Function/chat"


def test_summary() -> None:
    assert summary_line(14, 9, [ERROR, WARNING, WARNING], plain) == (
        "14 objects in 9 files: 1 error, 2 warnings"
    )
    assert summary_line(1, 1, [], plain) == "1 object in 1 file: no problems"
