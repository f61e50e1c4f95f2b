"""SkyPilot's status rows to core's records, and the marks out of the task each row carries.

A row's task holds values of secrets: of it only the marks are kept. Not here: what a status means.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from reconciler.core.skypilot.service import (
    DEPLOYMENT,
    NAMESPACE,
    OWNER,
    SPEC,
    Marks,
    Service,
    ServiceReplica,
)
from reconciler.errors import BackendUnreachable

_KEPT: Final = 20_000


class _ReplicaRow(msgspec.Struct, frozen=True):
    replica_id: int
    status: str
    version: int = 1
    endpoint: str | None = None
    status_detail: str | None = None


class _ServiceRow(msgspec.Struct, frozen=True):
    name: str
    status: str
    version: int = 1
    hash: str | None = None
    controller_job_id: int | None = None
    yaml_content: str | None = None
    target_num_replicas: int | None = None
    pool: bool = False
    replica_info: tuple[_ReplicaRow, ...] = ()


_ROWS: Final = msgspec.json.Decoder(list[_ServiceRow])


class RowReader:
    """Reads rows; a task that was read before is not parsed again."""

    def __init__(self) -> None:
        self._marks: dict[bytes, Marks] = {}
        self._yaml = YAML(typ="safe", pure=False)

    def read(self, data: bytes) -> dict[str, Service]:
        """By name.

        Raises:
            BackendUnreachable: these are no rows.
        """
        try:
            rows = _ROWS.decode(data)
        except msgspec.DecodeError as error:
            raise BackendUnreachable(f"SkyPilot's status cannot be read: {error}") from None
        if len(self._marks) > _KEPT:
            self._marks.clear()
        return {row.name: self._service(row) for row in rows if not row.pool}

    def _service(self, row: _ServiceRow) -> Service:
        incarnation = row.hash or f"{row.controller_job_id or 0:x}"
        return Service(
            name=row.name,
            status=row.status,
            version=row.version,
            incarnation=hashlib.blake2b(incarnation.encode(), digest_size=6).hexdigest(),
            marks=self._marks_of(row.yaml_content),
            replicas=tuple(
                ServiceReplica(r.replica_id, r.status, r.version, r.endpoint, r.status_detail or "")
                for r in row.replica_info
            ),
            answering=row.target_num_replicas is not None,
        )

    def _marks_of(self, text: str | None) -> Marks | None:
        if not text:
            return None
        if OWNER not in text:
            return Marks()
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        found = self._marks.get(key)
        if found is None:
            found = self._marks[key] = self._parse(text)
        return found

    def _parse(self, text: str) -> Marks:
        try:
            task = self._yaml.load(text)
        except YAMLError:
            # Not made by us; and the error would quote it.
            return Marks()
        envs, service = _mapping(task, "envs"), _mapping(task, "service")
        policy = _mapping(service, "replica_policy")
        count = policy.get("min_replicas", service.get("replicas", 0))
        return Marks(
            owner=str(envs.get(OWNER, "")),
            deployment=str(envs.get(DEPLOYMENT, "")),
            spec_digest=str(envs.get(SPEC, "")),
            replicas=count if isinstance(count, int) else 0,
            namespace=str(envs.get(NAMESPACE, "")),
        )


def _mapping(value: Any, key: str) -> dict[str, Any]:
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}
