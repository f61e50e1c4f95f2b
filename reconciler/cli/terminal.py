"""How every command speaks: answers on stdout, complaints on stderr, colour only for eyes.

Not here: what any command says.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, Final, Literal, NoReturn

import typer

Style = Literal["error", "warning", "good", "add", "change", "remove", "strong", "faint"]
Paint = Callable[[str, Style], str]
"""Puts a style on a text; rendering functions are given one and stay pure."""

_ESCAPES: Final[dict[Style, str]] = {
    "error": "1;31",
    "warning": "33",
    "good": "32",
    "add": "32",
    "change": "33",
    "remove": "31",
    "strong": "1",
    "faint": "2",
}

ANSWER_IS_NO: Final = 1
"""Exit code: asked and answered, and the answer is not what a script hopes for."""
UNASKABLE: Final = 2
"""Exit code: wrong usage, or what the command needs cannot be read."""


def command_app(**options: Any) -> typer.Typer:
    """A command's typer app, plain in its help and silent about values in tracebacks."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **options,
    )


def complain(message: str) -> None:
    """One error, for people: what is wrong, and what would be right."""
    with suppress(OSError):  # a full disk behind stderr: the exit code still says it
        sys.stderr.write(f"{painter(sys.stderr)('error:', 'error')} {message}\n")


def fail(message: str, code: int = UNASKABLE) -> NoReturn:
    """Says what is wrong and ends the command.

    Raises:
        typer.Exit: always.
    """
    complain(message)
    raise typer.Exit(code)


def note(message: str = "") -> None:
    """What a person wants to know and a script does not: on stderr."""
    with suppress(OSError):
        sys.stderr.write(f"{message}\n")


def answer(text: str) -> None:
    """What was asked for, on stdout; a final newline is added where there is none."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()


def answer_json(value: Any) -> None:
    """Plain data as JSON with two spaces, keys in the order given, on stdout."""
    answer(json.dumps(value, indent=2, ensure_ascii=False))


def painter(stream: IO[str]) -> Paint:
    """Styles for this stream: escapes on a terminal, unless NO_COLOR or TERM=dumb; else the bare text."""
    if stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        return lambda text, style: f"\033[{_ESCAPES[style]}m{text}\033[0m"
    return plain


def plain(text: str, style: Style) -> str:
    """The bare text."""
    del style
    return text
