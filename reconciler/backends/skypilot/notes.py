"""What is kept of each service besides what SkyPilot shows: its request under way, and what ran before.

    skypilot/<name>.json    one service; replaced atomically, and synced before anything is sent

All of it can be lost: ownership and specs are read back from SkyPilot itself. What is lost then is the
text of differences in plans, and which older version ran which spec. No secret's value is in it.
Not here: deciding anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from reconciler.core.skypilot.service import Marks, Service

DRAIN_TIMEOUT_S: Final = 120.0
"""Where nothing else is known; what SkyServe itself gives a replica."""
Verb = Literal["up", "update", "down"]


class Flight(msgspec.Struct, frozen=True):
    """One request for a service, from before it is sent until its result is known.

    `request_id` is None until the server has given one; found so after a crash, nobody knows whether
    the server ever got it. `wanted`: how many replicas.
    """

    verb: Verb
    deployment: str
    spec_digest: str
    wanted: int
    request_id: str | None = None


class Note(msgspec.Struct, frozen=True):
    """What is known of one service besides what SkyPilot shows.

    `marks`: the newest seen of this `incarnation`; `digests`: of templates, by version. `template`: plain
    data, of `template_digest`. `drain_timeout_s`: how long its replicas may finish when it goes.
    """

    incarnation: str = ""
    marks: Marks | None = None
    digests: dict[int, str] = {}
    template: dict[str, Any] = {}
    template_digest: str = ""
    drain_timeout_s: float = DRAIN_TIMEOUT_S
    flight: Flight | None = None


class NoteDir:
    """The folder. Writing raises OSError where the disk does not take it."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "skypilot"

    def read(self) -> Iterator[tuple[str, Note]]:
        """What is there and can be understood, by service name."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        for file in sorted(self.path.glob("*.json")):
            try:
                yield file.stem, msgspec.json.decode(file.read_bytes(), type=Note)
            except (OSError, msgspec.DecodeError):
                # The same as lost; SkyPilot is asked about the rest.
                continue

    def write(self, name: str, note: Note, *, sync: bool = False) -> None:
        """Whole or not at all. `sync`: it survives a power cut once this returns."""
        fresh = self.path / f".{name}.new"
        with fresh.open("wb") as out:
            out.write(msgspec.json.encode(note))
            if sync:
                out.flush()
                os.fsync(out.fileno())
        fresh.replace(self.path / f"{name}.json")
        if sync:
            folder = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def remove(self, name: str) -> None:
        (self.path / f"{name}.json").unlink(missing_ok=True)


class Notes:
    """All notes, in memory and on disk."""

    def __init__(self, state_dir: Path) -> None:
        self.dir = NoteDir(state_dir)
        self._notes: dict[str, Note] = {}

    async def load(self) -> None:
        """Raises: OSError, where the folder cannot be used."""
        self._notes = dict(await asyncio.to_thread(lambda: list(self.dir.read())))

    def __bool__(self) -> bool:
        return bool(self._notes)

    def of(self, name: str) -> Note:
        return self._notes.get(name) or Note()

    def flight(self, name: str) -> Flight | None:
        return self.of(name).flight

    def flights(self) -> dict[str, Flight]:
        return {name: note.flight for name, note in self._notes.items() if note.flight}

    async def write(self, name: str, note: Note, *, sync: bool = False) -> None:
        """Raises: OSError, and then nothing has changed."""
        await asyncio.to_thread(self.dir.write, name, note, sync=sync)
        self._notes[name] = note

    async def landed(self, name: str) -> None:
        """The request for a name is done with, one way or the other."""
        note = self.of(name)
        if note.flight is not None:
            with contextlib.suppress(OSError):
                await self.write(name, msgspec.structs.replace(note, flight=None))

    async def learn(self, ours: Mapping[str, Service], told: Collection[str]) -> None:
        """Which version ran which template; and forgets what is gone, and not told to come."""
        for name, service in ours.items():
            note, marks = self.of(name), service.marks
            same = note.incarnation == service.incarnation
            digests = dict(note.digests) if same else {}
            known = digests.get(service.version) if same else None
            if marks is None or (known == marks.spec_digest and note.marks == marks):
                continue
            digests[service.version] = marks.spec_digest
            fresh = msgspec.structs.replace(
                note, incarnation=service.incarnation, digests=digests, marks=marks
            )
            with contextlib.suppress(OSError):
                await self.write(name, fresh)
        for name in self._notes.keys() - ours.keys() - set(told):
            if not self.flight(name):
                del self._notes[name]
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(self.dir.remove, name)
