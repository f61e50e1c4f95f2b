"""What survives the reconciler itself: the last good objects, and every deployment it has known.

One JSON file, replaced atomically. Losing it costs nothing but caution: a reconciler without it
deletes nothing that it cannot explain from the repo. Not here: what runs (backends keep their own).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from pydantic import TypeAdapter

from reconciler.core.config import ConfigObject, Location, ObjectKey
from reconciler.core.steer import Steering
from schemas.kinds import MODELS, Kind

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class State:
    """`objects` is None where none are known. `generation` is the newest routing table's."""

    objects: Mapping[ObjectKey, ConfigObject] | None = None
    known: frozenset[str] | None = None
    generation: int = 0
    places: Mapping[str, str] = field(default_factory=dict)
    """Deployment -> the cluster it was put in."""
    steering: Steering = field(default_factory=Steering)


_STEERING: Final = TypeAdapter(Steering)


class _Stored(msgspec.Struct):
    kind: str
    name: str
    path: str
    line: int
    column: int
    digest: str
    value: msgspec.Raw


class _File(msgspec.Struct):
    version: int
    objects: list[_Stored]
    known: list[str]
    generation: int = 0
    places: dict[str, str] = {}
    steering: msgspec.Raw = msgspec.Raw(b"{}")


@dataclass(slots=True)
class StateFile:
    """Reads and writes `path`; writes only what differs from the last write."""

    path: Path
    _written: State | None = field(default=None, init=False)
    _encoded: dict[ObjectKey, tuple[str, _Stored]] = field(default_factory=dict, init=False)

    def load(self) -> State:
        """The last state; an absent, unreadable or foreign file is the same as none."""
        try:
            stored = msgspec.json.decode(self.path.read_bytes(), type=_File)
        except (OSError, msgspec.DecodeError):
            return State()
        if stored.version != VERSION:
            return State()
        objects: dict[ObjectKey, ConfigObject] = {}
        for item in stored.objects:
            try:
                kind: Kind = msgspec.convert(item.kind, Kind)
                key = ObjectKey(kind, item.name)
                value = MODELS[kind].model_validate_json(bytes(item.value))
            except ValueError:
                continue  # written by a version with other kinds or fields: not known any more
            location = Location(item.path, item.line, item.column)
            objects[key] = ConfigObject(key, value, location, item.digest)
        try:
            steering = _STEERING.validate_json(bytes(stored.steering))
        except ValueError:
            steering = Steering()  # by another version: taken from what runs
        return State(objects, frozenset(stored.known), stored.generation, stored.places, steering)

    def save(self, state: State) -> None:
        """Replaces the file.

        Raises:
            OSError: the directory cannot be written; the old file is whole.
        """
        if state == self._written:
            return
        objects = [self._store(obj) for _, obj in sorted((state.objects or {}).items())]
        content = _File(
            VERSION,
            objects,
            sorted(state.known or ()),
            state.generation,
            dict(state.places),
            msgspec.Raw(_STEERING.dump_json(state.steering, by_alias=True)),
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        with fresh.open("wb") as file:
            file.write(msgspec.json.encode(content))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)
        self._written = state

    def _store(self, obj: ConfigObject) -> _Stored:
        at = obj.location
        cached = self._encoded.get(obj.key)
        if cached and cached[0] == obj.digest and cached[1].path == at.path:
            stored = cached[1]
            if (stored.line, stored.column) == (at.line, at.column):
                return stored
        text = obj.value.model_dump_json(by_alias=True, exclude_defaults=True)
        # exclude_defaults drops nothing that validation needs: apiVersion, kind and name have none.
        stored = _Stored(
            obj.key.kind,
            obj.key.name,
            at.path,
            at.line,
            at.column,
            obj.digest,
            msgspec.Raw(text.encode()),
        )
        self._encoded[obj.key] = (obj.digest, stored)
        return stored
