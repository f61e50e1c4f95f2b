"""How every command speaks: answers on stdout, complaints on stderr, colour only for eyes.

Not here: what any command says.
"""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any, Final, NoReturn

import typer

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
    sys.stderr.write(f"{_red('error:', sys.stderr)} {message}\n")


def fail(message: str, code: int = UNASKABLE) -> NoReturn:
    """Says what is wrong and ends the command.

    Raises:
        typer.Exit: always.
    """
    complain(message)
    raise typer.Exit(code)


def note(message: str = "") -> None:
    """What a person wants to know and a script does not: on stderr."""
    sys.stderr.write(f"{message}\n")


def answer(text: str) -> None:
    """What was asked for, on stdout; a final newline is added where there is none."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()


def answer_json(value: Any) -> None:
    """Plain data as JSON with two spaces, keys in the order given, on stdout."""
    answer(json.dumps(value, indent=2, ensure_ascii=False))


def colourful(stream: IO[str]) -> bool:
    """Whether escapes belong on this stream: a terminal, and neither NO_COLOR nor TERM=dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _red(text: str, stream: IO[str]) -> str:
    return f"\033[1;31m{text}\033[0m" if colourful(stream) else text
