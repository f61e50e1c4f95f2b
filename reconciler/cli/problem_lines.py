"""Problems of a config repo as lines: for compilers' readers, for eyes, and for GitHub's checks.

Pure. Not here: finding them (sources, core.references).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator
from typing import Any, Final

from reconciler.cli.terminal import Paint
from reconciler.core.config import Problem
from schemas.api_keys import find_keys

_WIDTH: Final = 100
_GITHUB_ESCAPES: Final = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_GITHUB_PROPERTY_ESCAPES: Final = {**_GITHUB_ESCAPES, ":": "%3A", ",": "%2C"}


def problem_line(problem: Problem, paint: Paint) -> str:
    """`path:line:column: error: what is wrong; what would be right`."""
    where = problem.location
    place = f"{where.path}:{where.line}:{where.column}" if where.line else where.path
    return f"{paint(place, 'strong')}: {paint(problem.severity + ':', problem.severity)} {problem.message}"


def excerpt(problem: Problem, line: str | None, paint: Paint) -> Iterator[str]:
    """The line that a problem is in and a caret under its column; nothing where a key might show."""
    if line is None or not line.strip() or find_keys(line):
        return
    column = max(problem.location.column - 1, 0)
    start = max(0, column - _WIDTH + 20)
    shown = "".join(c if c.isprintable() else " " for c in line[start : start + _WIDTH])
    gutter = f"{problem.location.line:>5} | "
    blank = " " * (len(gutter) - 2) + "| "
    yield f"{paint(gutter, 'faint')}{shown}"
    offset = sum(
        2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown[: column - start]
    )
    yield f"{paint(blank, 'faint')}{' ' * offset}{paint('^', problem.severity)}"


def github_line(problem: Problem) -> str:
    """A workflow command that GitHub shows at the line in the pull request."""
    where = problem.location
    place = f"file={_escape(where.path, _GITHUB_PROPERTY_ESCAPES)}"
    if where.line:
        place += f",line={where.line},col={where.column}"
    return f"::{problem.severity} {place}::{_escape(problem.message, _GITHUB_ESCAPES)}"


def problem_json(problem: Problem) -> dict[str, Any]:
    where = problem.location
    return {
        "path": where.path,
        "line": where.line or None,
        "column": where.column or None,
        "severity": problem.severity,
        "message": problem.message,
        "object": str(problem.key) if problem.key else None,
    }


def counted(number: int, noun: str) -> str:
    """`1 error`, `2 errors`, `no errors`."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def summary_line(objects: int, files: int, problems: Collection[Problem], paint: Paint) -> str:
    """`14 objects in 9 files: 1 error, 2 warnings`."""
    errors = sum(p.severity == "error" for p in problems)
    warnings = len(problems) - errors
    parts = []
    if errors:
        parts.append(paint(counted(errors, "error"), "error"))
    if warnings:
        parts.append(paint(counted(warnings, "warning"), "warning"))
    verdict = ", ".join(parts) or paint("no problems", "good")
    return f"{counted(objects, 'object')} in {counted(files, 'file')}: {verdict}"


def _escape(text: str, escapes: dict[str, str]) -> str:
    return "".join(escapes.get(c, c) for c in text)
