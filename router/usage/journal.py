"""What requests use, in a file that outlives the process: written before anything is billed.

One file for each router process. A stream takes a slot with its first word of usage, notes in it what
it has used so far, and leaves its record there until the ledger has it; a request that ends in one
piece leaves its record alone. Whoever finds the journal of a process that died finishes it. Not here:
room in the file (slots), sending (stream).

    header:      magic, journal's name, greatest number that the ledger has
    wide slot:   state, lengths | what is known at the start | usage so far | the finished record
    narrow slot: state, lengths | the finished record
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
from collections import deque
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final, Self

import msgspec

from router.core.shapes import NOTHING, Usage
from router.core.usage import cost_nano_usd
from router.core.usage_json import running_usage
from router.usage.opened import Opened, read_opened
from router.usage.slots import MOST_SEGMENTS, NARROW_BYTES, WIDE_BYTES, Slots
from schemas.wire.events import UsageRecord, usage_record

SUFFIX: Final = ".journal"
_MAGIC: Final = b"detoserve-usage-3"
_READ: Final = frozenset({_MAGIC, b"detoserve-usage-2", b"detoserve-usage-1"})
"""Journals that were made before records went without names, and before there were narrow slots."""
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError)
_NAME_AT: Final = 32
_NAME_BYTES: Final = 16
_ACKED_AT: Final = 64

_NONE: Final = -1
"""No slot."""
_MOST_FRESH_BYTES: Final = 1024 * 1024
_MOST_MISSING: Final = 2_000_000
"""Records in a row; no file has room for so many."""

_FREE: Final = 0
_OPEN: Final = 1
_FINISHED: Final = 2

# A slot: state, the lengths of its three parts, the parts.
_SLOT_HEAD: Final = struct.Struct("<BxHHH")
_OPENED_AT: Final = 8
_RUNNING_AT: Final = 512
_RECORD_AT: Final = 768
_NARROW_RECORD_AT: Final = 8
_NARROW_RECORD_BYTES: Final = NARROW_BYTES - _NARROW_RECORD_AT
_RUNNING_LENGTH_AT: Final = 4
_head_into: Final = _SLOT_HEAD.pack_into
_length_into: Final = struct.Struct("<H").pack_into
_number: Final = struct.Struct("<Q")
_encode: Final = msgspec.msgpack.Encoder().encode


class JournalBusy(Exception):
    """Another process has it open, or only another can read it."""


class Journal:
    """An open journal. Make one with `create`, take over a dead process's with `adopt`.

    Args:
        max_segments: for requests in flight and records that the ledger does not have. Beyond it the
            oldest record that Redis has is forgotten; where there is none, the newest is lost.
    """

    def __init__(self, file: int, path: Path | None, *, max_segments: int) -> None:
        self._file = file
        self._path = path
        self._slots = Slots(file, max_segments=max_segments)
        self._map = self._slots.map
        self._sent: deque[int] = deque()
        self._unsent: deque[int] = deque()
        """Slots of finished records in the order of their numbers, which follow one another: `_NONE`
        for one that could not be read again, and the last is `seq`'s."""
        self._fresh: bytearray | None = bytearray()
        self._fresh_sizes: list[int] = []
        """A copy of all that is unsent, while that is little: it need not be read from the file again."""
        self.name = ""
        self.seq = 0
        """The greatest number given out."""
        self.acked = 0
        """The greatest number that the ledger has."""
        self.lost = 0
        """Requests for which there was no room."""

    @classmethod
    def create(cls, folder: Path | None, *, max_segments: int = MOST_SEGMENTS) -> Self:
        """A new journal, in memory alone where there is no folder.

        Raises:
            OSError: as the disk says.
        """
        name = secrets.token_hex(_NAME_BYTES // 2)
        path = None
        if folder is None:
            file = os.memfd_create(f"detoserve-usage-{name}")
        else:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = folder / f"{name}{SUFFIX}"
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            journal = cls(file, path, max_segments=max_segments)
        except BaseException:
            os.close(file)
            if path is not None:
                path.unlink(missing_ok=True)
            raise
        journal.name = name
        journal._map[_NAME_AT : _NAME_AT + _NAME_BYTES] = name.encode()
        # Last: a file without it was never used.
        journal._map[: len(_MAGIC)] = _MAGIC
        journal._slots.begin()
        return journal

    @classmethod
    def adopt(cls, path: Path, *, ended_at: float) -> Self:
        """The journal of a process that has died, its open requests finished as they stood.

        Raises:
            JournalBusy: its process lives, another has adopted it, or a newer version wrote it.
            OSError: as the disk says.
        """
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file).st_nlink:
                raise JournalBusy  # noqa: TRY301 - emptied and removed by another in between
            journal = cls(file, path, max_segments=0)
            magic = journal._map[: len(_MAGIC)]
            if any(magic) and magic not in _READ:
                raise JournalBusy  # noqa: TRY301 - of a newer router: for one of its kind to adopt
        except BlockingIOError:
            os.close(file)
            raise JournalBusy from None
        except BaseException:
            os.close(file)
            raise
        if magic in _READ:
            journal.name = journal._map[_NAME_AT : _NAME_AT + _NAME_BYTES].decode("ascii")
            journal._recover(ended_at)
        return journal

    # One request: open, running, finish or forget.

    def open(self, request: Opened) -> int:
        """Takes a slot for a request that is about to be sent; -1 where there is no room."""
        data = _fitting(request, _RUNNING_AT - _OPENED_AT)
        slot = self._room(narrow=False)
        if slot is None:
            self.lost += 1
            return _NONE
        at = slot + _OPENED_AT
        self._map[at : at + len(data)] = data
        # The state goes in last: a slot that is half written is still free.
        _head_into(self._map, slot, _OPEN, len(data), 0, 0)
        return slot

    def running(self, slot: int, usage: bytes) -> None:
        """What the engine says that the stream has used so far: the JSON of its `usage`."""
        size = len(usage)
        if size <= _RECORD_AT - _RUNNING_AT:
            at = slot + _RUNNING_AT
            self._map[at : at + size] = usage
            _length_into(self._map, slot + _RUNNING_LENGTH_AT, size)

    def record(
        self,
        opened: Opened,
        used: Usage,
        *,
        ended_at: float,
        outcome: str,
        replica: str = "",
        ttft_s: float | None = None,
    ) -> UsageRecord:
        """The next record to finish; times are Unix seconds."""
        return UsageRecord(
            journal=self.name,
            seq=self.seq + 1,
            id=opened.id,
            tenant=opened.tenant,
            key=opened.key,
            function=opened.function,
            revision=opened.revision,
            replica=replica,
            input_tokens=used.input_tokens,
            cached_tokens=used.cached_tokens,
            output_tokens=used.output_tokens,
            cost_nano_usd=cost_nano_usd(opened.price, used),
            estimated=used.estimated,
            started_at=opened.started_at,
            ttft_s=ttft_s,
            duration_s=max(0.0, ended_at - opened.started_at),
            outcome=outcome,
        )

    def finish(self, slot: int | None, record: UsageRecord) -> None:
        """The record of a request that has ended, numbered `seq` + 1 of this journal.

        `slot`: of the request, where it has one.
        """
        data = _encode(record)
        size = len(data)
        if slot is None and size <= _NARROW_RECORD_BYTES and self._slots.narrow:
            slot = self._slots.narrow.pop()  # nearly always
            at = slot + _NARROW_RECORD_AT
        else:
            if size > _NARROW_RECORD_BYTES:
                data = _fitting(record, WIDE_BYTES - _RECORD_AT)
                size = len(data)
            if slot is None:
                slot = self._room(narrow=size <= _NARROW_RECORD_BYTES)
                if slot is None:
                    self.lost += 1
                    return
            at = slot + (_NARROW_RECORD_AT if self._slots.is_narrow(slot) else _RECORD_AT)
        self.seq += 1
        self._map[at : at + size] = data
        _head_into(self._map, slot, _FINISHED, 0, 0, size)
        self._unsent.append(slot)
        fresh = self._fresh
        if fresh is not None:
            fresh += data
            self._fresh_sizes.append(size)
            if len(fresh) > _MOST_FRESH_BYTES:
                self._fresh = None

    def forget(self, slot: int) -> None:
        """A request that was not sent after all: its slot is free again, and there is no record."""
        if slot != _NONE:
            self._map[slot] = _FREE
            self._slots.give_back(slot)

    # What becomes of the records.

    @property
    def waiting(self) -> int:
        """Records that Redis does not have."""
        return len(self._unsent)

    @property
    def kept(self) -> int:
        """Records that the ledger may not have, those of `waiting` among them."""
        return len(self._unsent) + len(self._sent)

    @property
    def oldest(self) -> int:
        """The number of the first record that is kept; of the next one where none is."""
        return self.seq - self.kept + 1

    @property
    def newest(self) -> int:
        """The greatest number that Redis has been given."""
        return self.seq - len(self._unsent)

    def unsent(self, limit: int) -> tuple[list[int], bytes]:
        """The first records that Redis does not have, from number `newest` + 1 on: sizes, all in a row.

        Of one that could not be read again the size is 0.
        """
        if self._fresh is not None:
            sizes = self._fresh_sizes[:limit]
            return sizes, bytes(self._fresh[: sum(sizes)])
        records = [self._record(slot) for slot in islice(self._unsent, limit)]
        return [len(data) for data in records], b"".join(records)

    def sent(self, seq: int) -> None:
        """Redis has everything up to this number."""
        unsent, sent = self._unsent, self._sent
        count = min(seq - self.newest, len(unsent))
        for _ in range(count):
            sent.append(unsent.popleft())
        self._left(count)

    def send_again(self) -> None:
        """Redis has lost what was sent."""
        if self._sent:
            self._unsent.extendleft(reversed(self._sent))
            self._sent.clear()
            self._fresh = None

    def acknowledge(self, seq: int) -> None:
        """The ledger has everything up to this number: it need not be kept any more."""
        if seq <= self.acked:
            return
        self.acked = seq
        _number.pack_into(self._map, _ACKED_AT, seq)
        unsent, sent = self._unsent, self._sent
        for _ in range(min(seq - self.oldest + 1, len(sent))):
            self.forget(sent.popleft())
        count = min(seq - self.newest, len(unsent))
        for _ in range(count):
            self.forget(unsent.popleft())
        self._left(count)

    def close(self, *, remove: bool = False) -> None:
        """Lets go of it. `remove`: there is nothing in it that anybody needs."""
        if remove and self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._map.close()
        os.close(self._file)

    # Inside.

    def _left(self, count: int) -> None:
        """So many are unsent no more."""
        if not self._unsent:
            self._fresh = bytearray()
            self._fresh_sizes.clear()
        elif self._fresh is not None and count > 0:
            del self._fresh[: sum(self._fresh_sizes[:count])]
            del self._fresh_sizes[:count]

    def _record(self, slot: int) -> bytes:
        if slot == _NONE:
            return b""
        size = _SLOT_HEAD.unpack_from(self._map, slot)[3]
        at = slot + (_NARROW_RECORD_AT if self._slots.is_narrow(slot) else _RECORD_AT)
        return self._map[at : at + size]

    def _room(self, *, narrow: bool) -> int | None:
        """A slot; where there is none, that of the oldest record that Redis has."""
        slot = self._slots.take(narrow=narrow)
        while slot is None and self._sent:
            self.forget(self._sent.popleft())
            slot = self._slots.take(narrow=narrow)
        return slot

    def _recover(self, ended_at: float) -> None:
        (self.acked,) = _number.unpack_from(self._map, _ACKED_AT)
        running = []
        finished: dict[int, int] = {}
        for slot in self._slots:
            state = self._map[slot]
            if state == _OPEN:
                running.append(slot)
            elif state == _FINISHED:
                with suppress(*_UNREADABLE):
                    finished[usage_record(self._record(slot)).seq] = slot
        self.seq = self.acked
        for seq in sorted(finished):
            if seq <= self.acked:
                self.forget(finished[seq])
                continue
            missing = seq - self.seq - 1 if self._unsent else 0
            if missing <= _MOST_MISSING:  # else it is nobody's number
                self._unsent.extend([_NONE] * missing)
                self._unsent.append(finished[seq])
                self.seq = seq
        self._fresh = None
        for slot in running:
            record = self._as_it_stood(slot, ended_at)
            if record is None:
                self.forget(slot)
            else:
                self.finish(slot, record)

    def _as_it_stood(self, slot: int, ended_at: float) -> UsageRecord | None:
        _, opened_size, running_size, _ = _SLOT_HEAD.unpack_from(self._map, slot)
        at = slot + _RUNNING_AT
        used = running_usage(self._map[at : at + running_size])
        at = slot + _OPENED_AT
        try:
            opened = read_opened(self._map[at : at + opened_size])
        except _UNREADABLE:
            return None
        return self.record(opened, used or NOTHING, ended_at=ended_at, outcome="router_lost")


def _fitting(value: Opened | UsageRecord, size: int) -> bytes:
    """Encoded; names that are longer than any should be give way, a client's id first."""
    data = _encode(value)
    for most in (48, 16):
        if len(data) <= size:
            break
        cut = {"id": value.id[:most]}
        if most < 48:
            names = ("tenant", "key", "function", "revision")
            cut |= {name: getattr(value, name)[:64] for name in names}
            if isinstance(value, UsageRecord):
                cut["replica"] = value.replica[:64]
        data = _encode(msgspec.structs.replace(value, **cut))
    return data


def journals_in(folder: Path) -> list[Path]:
    """Journals in a folder, whosever they are."""
    with suppress(OSError):
        return sorted(folder.glob(f"*{SUFFIX}"))
    return []
