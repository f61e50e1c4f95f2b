"""Values of referenced secrets, read when an engine starts, and kept out of what people read.

Values go into the engine's environment and nowhere else: not to disk, a log, Redis or Git.
Not here: which secrets a function names (schemas.function).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from reconciler.errors import Stalled
from schemas.api_keys import find_keys
from schemas.function import SecretRef

HIDDEN: Final = "[secret]"
_WORD: Final = re.compile(r"\S+")
# Shorter ones would blank out ordinary text, and protect nothing.
_SHORTEST_HIDDEN: Final = 4


def resolve(secrets: Mapping[str, SecretRef], environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variable -> value.

    Raises:
        Stalled: one is not there, or cannot be had on this kind of cluster; never with a value.
    """
    return {name: _value(name, ref, environ) for name, ref in secrets.items()}


def _value(name: str, ref: SecretRef, environ: Mapping[str, str]) -> str:
    if ref.from_env is not None:
        if not environ.get(ref.from_env):
            raise Stalled(
                f"secret {name}: environment variable {ref.from_env} is not set for the "
                "reconciler; set it and restart, or refer to a file with fromFile"
            )
        return environ[ref.from_env]
    if ref.from_file is not None:
        try:
            return Path(ref.from_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise Stalled(f"secret {name}: {ref.from_file} cannot be read: {why}") from None
    raise Stalled(
        f"secret {name}: a local cluster has no Kubernetes Secrets; use fromEnv or fromFile"
    )


def redact(text: str, values: Iterable[str]) -> str:
    """The text without the values and without anything shaped like an API key."""
    for value in sorted(set(values), key=len, reverse=True):
        if len(value) >= _SHORTEST_HIDDEN:
            text = text.replace(value, HIDDEN)
    for offset, _ in reversed(find_keys(text)):
        word = _WORD.match(text, offset)
        if word is not None:
            text = text[:offset] + HIDDEN + text[word.end() :]
    return text
