"""What a person most likely meant: the end of a message about an unknown name. Nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_SHOWN = 12


def closest(word: str, options: Iterable[str]) -> str | None:
    """The option that looks most like the word, were it mistyped; None where none does."""
    by_fold = {option.casefold(): option for option in sorted(options, reverse=True)}
    # The word may be anything that stood in a file; a name is never so long.
    found = get_close_matches(word[:100].casefold(), by_fold, n=1, cutoff=0.6)
    return by_fold[found[0]] if found else None


def suggestion(word: str, options: Iterable[str]) -> str:
    """`did you mean "chat"?`, or what there is to choose from."""
    options = sorted(set(options))
    if match := closest(word, options):
        return f'did you mean "{match}"?'
    if not options:
        return "there is none"
    more = f" and {len(options) - _SHOWN} more" if len(options) > _SHOWN else ""
    return f"there is {', '.join(options[:_SHOWN])}{more}"
