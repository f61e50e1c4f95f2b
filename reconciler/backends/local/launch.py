"""What one start needs from this machine: a program that is there, values of secrets, a free port.

Not here: which flags an engine takes (engine_command), or starting it (replica).
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from reconciler.backends.secret_values import resolve
from reconciler.core.engine_command import Place, engine_argv, engine_environ
from reconciler.core.workload import Template
from reconciler.errors import Stalled


@dataclass(frozen=True, slots=True)
class Launch:
    """`program` is a path. `environ` holds values of secrets: it is for the engine alone."""

    program: str
    argv: list[str]
    environ: dict[str, str] = field(repr=False)


def prepare(
    template: Template, *, host: str, port: int, replica: str, inherited: Mapping[str, str]
) -> Launch:
    """Everything to start one replica with.

    Raises:
        Stalled: it can never start as written here: no such program, a secret missing.
    """
    place = Place(host, port, replica, sys.executable)
    argv = engine_argv(template, place)
    values = resolve(template.runtime.secrets, inherited)
    environ = engine_environ(template, place, inherited, values)
    return Launch(_find(argv[0], environ), argv, environ)


def free_port(host: str) -> int:
    """A port that the kernel says is free now; another process may still be faster."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _find(word: str, environ: Mapping[str, str]) -> str:
    found = shutil.which(word, path=environ.get("PATH", os.defpath))
    if found is None:
        where = "is no program" if "/" in word else "is not on the reconciler's PATH"
        raise Stalled(f"{word} {where}; install it, or give its path in runtime.command")
    return found
