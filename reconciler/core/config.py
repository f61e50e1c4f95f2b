"""What a config repo says, as frozen records: objects, where each stands, and what is wrong.

Not here: reading YAML or Git (sources), or what should run because of it (compile).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from schemas.kinds import ConfigSpec, Kind


class ObjectKey(NamedTuple):
    """`Deployment/chat`: one object of the repo; unique over all its files."""

    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class Location:
    """A place in a file of the repo; line and column count from 1, 0 where unknown."""

    path: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}" if self.line else self.path


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing wrong with the repo: where, what is wrong, and what would be right.

    `key` names the object it concerns, where that could be told.
    """

    location: Location
    message: str
    severity: Literal["error", "warning"] = "error"
    key: ObjectKey | None = None

    def __str__(self) -> str:
        prefix = "warning: " if self.severity == "warning" else ""
        return f"{self.location}: {prefix}{self.message}"


@dataclass(frozen=True, slots=True)
class ConfigObject:
    """One object as loaded. `digest` is of its canonical content (spec and metadata), not its text."""

    key: ObjectKey
    value: ConfigSpec
    location: Location
    digest: str
    marks: Mapping[tuple[str | int, ...], tuple[int, int]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Field path in the document -> (line, column), so that later checks can point at it."""

    def at(self, *path: str | int) -> Location:
        """Where a field stands; the nearest enclosing field that has a mark."""
        for end in range(len(path), -1, -1):
            mark = self.marks.get(path[:end])
            if mark is not None:
                return Location(self.location.path, *mark)
        return self.location


@dataclass(frozen=True, slots=True)
class Loaded:
    """One reading of the repo's desired paths, valid and invalid alike.

    `failed_paths` are files that did not load (wholly or in part): the objects last seen in them are
    shielded. `digest` covers the desired paths only, so that status commits cannot change it.
    """

    revision: str
    digest: str
    objects: Mapping[ObjectKey, ConfigObject]
    problems: tuple[Problem, ...] = ()
    failed_paths: frozenset[str] = frozenset()
