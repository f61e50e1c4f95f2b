"""What the local backend keeps on disk, and how it is written so that no crash leaves half of it.

    workloads/<name>/workload.json     what it was told to run; there before anything is started
    replicas/<id>/replica.json         one engine: port, template, history; there before its process
    replicas/<id>/process.json         its process; missing only between the start and this write
    logs/engines/<id>.log[.1]          what it printed; those of ended replicas kept, bounded

Workloads are synced to disk, because they are a promise. Replicas are not: a machine that loses power
loses their processes too. No secret's value is in any of it. Not here: deciding anything.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import TypeAdapter, ValidationError

from reconciler.backends.local.processes import ProcessId
from reconciler.core.workload import Template, Workload

KEPT_LOGS: Final = 50
"""Of replicas that have ended; the newest."""


@dataclass(frozen=True, slots=True)
class WorkloadRecord:
    """A workload under its ownership mark; `deleting` is the tombstone."""

    owner: str
    workload: Workload
    deleting: bool = False
    version: Literal[1] = 1


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """One engine. `failures`: starts in a row that came to nothing, up to and without this one.

    `was_ready`: this replica, or the one it replaced after a crash, has been ready once.
    """

    owner: str
    id: str
    workload: str
    deployment: str
    cluster: str
    port: int
    spec_digest: str
    template: Template
    drain_timeout_s: float
    order: int
    """Later ones are younger."""
    failures: int = 0
    restarts: int = 0
    was_ready: bool = False
    ready: bool = False
    """As last seen; a reconciler that adopts it starts from there."""
    draining: bool = False
    version: Literal[1] = 1


@dataclass(frozen=True, slots=True)
class ReplicaProcesses:
    """The engine, and who writes its log (None where it was found by its mark alone)."""

    engine: ProcessId
    log_writer: ProcessId | None = None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that is there and cannot be understood; a human must look."""

    name: str
    reason: str


_WORKLOAD: Final = TypeAdapter(WorkloadRecord)
_REPLICA: Final = TypeAdapter(ReplicaRecord)
_PROCESSES: Final = TypeAdapter(ReplicaProcesses)


class StateDir:
    """The folder. Every method that writes raises OSError where the disk does not take it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workloads = path / "workloads"
        self.replicas = path / "replicas"
        self.logs = path / "logs" / "engines"

    def create(self) -> None:
        for folder in (self.workloads, self.replicas, self.logs):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def check(self) -> None:
        """Raises OSError where the records cannot be reached any more."""
        os.stat(self.workloads)  # noqa: PTH116 - the cheapest question; asked at every observation

    def log_path(self, replica_id: str) -> Path:
        return self.logs / f"{replica_id}.log"

    def write_workload(self, record: WorkloadRecord) -> None:
        folder = self.workloads / record.workload.name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(folder / "workload.json", _dump(_WORKLOAD, record), sync=True)

    def read_workloads(self) -> Iterator[WorkloadRecord | Unreadable]:
        for folder in sorted(self.workloads.iterdir()):
            file = folder / "workload.json"
            # An empty folder is what a crash before the first write leaves: nothing was promised.
            if not folder.is_dir() or not file.exists():
                continue
            try:
                record = _WORKLOAD.validate_json(file.read_bytes())
            except ValidationError as error:
                yield Unreadable(folder.name, f"{file} cannot be understood: {_first(error)}")
                continue
            if record.workload.name == folder.name:
                yield record
            else:
                yield Unreadable(folder.name, f"{file} is about {record.workload.name}")

    def remove_workload(self, name: str) -> None:
        _remove(self.workloads / name, "workload.json")

    def write_replica(self, record: ReplicaRecord) -> None:
        folder = self.replicas / record.id
        folder.mkdir(exist_ok=True, mode=0o700)
        _write(folder / "replica.json", _dump(_REPLICA, record))

    def write_processes(self, replica_id: str, processes: ReplicaProcesses) -> None:
        _write(self.replicas / replica_id / "process.json", _dump(_PROCESSES, processes))

    def read_replicas(self) -> Iterator[tuple[ReplicaRecord, ReplicaProcesses | None]]:
        """Those that can be understood; others were never started, or their process tells."""
        for folder in sorted(self.replicas.glob("*")):
            try:
                record = _REPLICA.validate_json((folder / "replica.json").read_bytes())
            except (OSError, ValidationError):
                continue
            try:
                processes = _PROCESSES.validate_json((folder / "process.json").read_bytes())
            except (OSError, ValidationError):
                processes = None
            yield record, processes

    def remove_replica(self, replica_id: str) -> None:
        _remove(self.replicas / replica_id, "replica.json")

    def remove_old_logs(self, current: Collection[str], keep: int = KEPT_LOGS) -> None:
        """Removes the logs of ended replicas but for the newest `keep`."""
        ended = [f for f in self.logs.glob("*.log") if f.name.removesuffix(".log") not in current]
        ended.sort(key=_modified_at, reverse=True)
        for file in ended[keep:]:
            file.unlink(missing_ok=True)
            file.with_name(f"{file.name}.1").unlink(missing_ok=True)

    def log_tail(self, replica_id: str, *, lines: int, size_bytes: int = 4096) -> str:
        """The last non-empty lines a replica printed; "" where there is nothing to read."""
        try:
            with self.log_path(replica_id).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - size_bytes))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _modified_at(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        # Its writer has just turned it over.
        return 0.0


def _dump(adapter: TypeAdapter[Any], record: object) -> bytes:
    return adapter.dump_json(record, by_alias=True, indent=1) + b"\n"


def _first(error: ValidationError) -> str:
    one = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, one['loc']))}: {one['msg']}" if one["loc"] else one["msg"]


def _write(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("wb") as out:
        out.write(data)
        if sync:
            out.flush()
            os.fsync(out.fileno())
    fresh.replace(path)
    if sync:
        for folder in (path.parent, path.parent.parent):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove(folder: Path, record: str) -> None:
    # The record first: what a crash leaves of the folder means nothing without it.
    (folder / record).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
