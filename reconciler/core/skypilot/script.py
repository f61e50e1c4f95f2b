"""A replica's start as a script for bash: words quoted, a flag a line. Pure.

What only the replica's own shell knows is written as a mark until then. Not here: which words (engines).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from reconciler.core.engine_command import Place, filled_env
from reconciler.core.workload import Template

REPLICA: Final = "@replica@"
"""The replica's number."""
HOME: Final = "@home@"
"""The home directory of its user."""
_SHELL: Final[Mapping[str, str]] = {REPLICA: '"$SKYPILOT_SERVE_REPLICA_ID"', HOME: '"$HOME"'}
_MARK: Final = re.compile(f"({'|'.join(_SHELL)})")
_NUMBER: Final = re.compile(r"-\d+(\.\d+)?")


@dataclass(frozen=True, slots=True)
class Start:
    """`env` comes besides the function's own."""

    script: str
    env: Mapping[str, str] = field(default_factory=dict)


def for_shell(text: str) -> bool:
    return _MARK.search(text) is not None


def quote(word: str) -> str:
    """One word for bash; what only its shell knows is put in there."""
    if not for_shell(word):
        return shlex.quote(word)
    parts = filter(None, _MARK.split(word))
    return "".join(_SHELL.get(part) or shlex.quote(part) for part in parts)


def command(argv: Sequence[str]) -> str:
    """A command with a flag and its values on each line; without an end of line."""
    lines: list[list[str]] = [[]]
    for word in argv:
        # `python -m module` is one thing.
        flag = word.startswith("-") and word != "-m" and not _NUMBER.fullmatch(word)
        if flag and lines[-1]:
            lines.append([])
        lines[-1].append(quote(word))
    return " \\\n  ".join(" ".join(line) for line in lines)


def exports(template: Template, place: Place) -> str:
    """What of the function's environment only the replica's shell can fill in."""
    filled = filled_env(template, place)
    return "".join(f"export {k}={quote(v)}\n" for k, v in filled.items() if for_shell(v))
