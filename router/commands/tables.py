"""Plain tables for terminals and pull requests. Not here: what stands in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

_UNDERSCORE: Final = re.compile(r"_([a-z])")


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart; the first is flush left, numbers flush right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The same for a pull request."""
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)
    ]
    return [lines[0], "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|", *lines[1:]]


def camel(value: Any) -> Any:
    """Plain data with keys as JSON and YAML have them everywhere: policy_since is policySince."""
    if isinstance(value, dict):
        return {_UNDERSCORE.sub(_upper, key): camel(item) for key, item in value.items()}
    return [camel(item) for item in value] if isinstance(value, list | tuple) else value


def _upper(found: re.Match[str]) -> str:
    return found.group(1).upper()


def seconds(value: float) -> str:
    """For people: 0.0421 is 42.1 ms."""
    if abs(value) < 0.0005:
        return "0"
    return f"{value * 1000:.1f} ms" if abs(value) < 1 else f"{value:.2f} s"
