"""What must outlive this process about services: requests under way, and which version ran what.

    skypilot/<name>.json    one service; replaced atomically, and synced before anything is sent

All of it can be lost: ownership and specs are read back from SkyPilot itself. What is lost then is the
text of differences in plans, and which older version ran which spec. No secret's value is in it.
Not here: deciding anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from reconciler.core.skypilot.service import Marks

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

    `marks`: the newest seen of this `incarnation`; `digests`: of templates, by version. `template`: plain data,
    of `template_digest`. `drain_timeout_s`: how long its replicas may finish when it goes.
    """

    incarnation: str = ""
    marks: Marks | None = None
    digests: dict[int, str] = {}
    template: dict[str, Any] = {}
    template_digest: str = ""
    drain_timeout_s: float = DRAIN_TIMEOUT_S
    flight: Flight | None = None


class RequestDir:
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
