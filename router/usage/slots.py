"""Room for usage in a mapped file: slots of two sizes, which are never moved.

A write is a copy, not a system call, and what is in the file survives a SIGKILL (though not a machine
that stops). A wide slot has room for what is known of a request while it runs; a narrow one for its
record alone, which is all that most requests leave. Each segment of the file has slots of one size, for
good. Not here: what is in them (journal).

    header: the journal's own, from KINDS_AT on one byte a segment: which slots it has
    segments
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

WIDE_BYTES: Final = 1536
NARROW_BYTES: Final = 256
SEGMENT_BYTES: Final = 64 * WIDE_BYTES
HEADER_BYTES: Final = 4096
KINDS_AT: Final = 128
MOST_SEGMENTS: Final = 3072
"""Some 300 MB, and fewer than the header has bytes for."""
_FIRST_SEGMENTS: Final = 16
_WIDE: Final = 0
"""Also of all segments that were made before there were narrow slots."""
_NARROW: Final = 2
_POPULATE_WRITE: Final = 23
"""MADV_POPULATE_WRITE, of Linux 5.14 and later; `mmap` has no name for it yet."""
_SIZES: Final = (WIDE_BYTES, 512, NARROW_BYTES)
"""By kind; the second was what narrow slots had before records went without names."""


class Slots:
    """The file is the caller's to open and to close.

    Args:
        max_segments: the file does not grow beyond it, though it may be larger already.

    Raises:
        OSError: as the disk says.
    """

    def __init__(self, file: int, *, max_segments: int) -> None:
        self._file = file
        self._max_segments = max_segments
        self._size = max(
            os.fstat(file).st_size,
            HEADER_BYTES + min(_FIRST_SEGMENTS, max_segments) * SEGMENT_BYTES,
        )
        # Also where the disk is full: a mapped page without a block would end the process.
        os.posix_fallocate(file, 0, self._size)
        self.map = mmap.mmap(file, self._size)
        self._kinds = bytearray(self.map[KINDS_AT:HEADER_BYTES])
        self._segments = (self._size - HEADER_BYTES) // SEGMENT_BYTES
        self._unused: list[int] = []
        """Segments without slots yet."""
        self._wide: list[int] = []
        self.narrow: list[int] = []
        """Free slots; `take` makes more."""

    def begin(self) -> None:
        """The file is new: all of it may be used."""
        self._unused += reversed(range(self._segments))

    def take(self, *, narrow: bool) -> int | None:
        """A slot of this size, or a larger one; None where there is no room."""
        free = self.narrow if narrow else self._wide
        if not free:
            if not self._unused:
                self._grow()
            if self._unused:
                self._divide(self._unused.pop(), narrow=narrow)
            else:
                free = self._wide
        return free.pop() if free else None

    def give_back(self, slot: int) -> None:
        (self.narrow if self.is_narrow(slot) else self._wide).append(slot)

    def is_narrow(self, slot: int) -> bool:
        return self._kinds[(slot - HEADER_BYTES) // SEGMENT_BYTES] != _WIDE

    def __iter__(self) -> Iterator[int]:
        """All slots of the file, whether or not they are taken."""
        for begins, kind in zip(
            range(HEADER_BYTES, self._size, SEGMENT_BYTES), self._kinds, strict=False
        ):
            size = _SIZES[kind % len(_SIZES)]
            ends = min(begins + SEGMENT_BYTES, self._size)
            yield from range(begins, ends - size + 1, size)

    def _grow(self) -> None:
        more = min(self._segments * 2, self._max_segments)
        if more <= self._segments:
            return
        size = HEADER_BYTES + more * SEGMENT_BYTES
        try:
            os.posix_fallocate(self._file, 0, size)
            self.map.resize(size)
        except OSError:
            self._max_segments = self._segments  # a full disk is not asked again
            return
        self._unused += reversed(range(self._segments, more))
        self._size, self._segments = size, more

    def _divide(self, segment: int, *, narrow: bool) -> None:
        kind, size = (_NARROW, NARROW_BYTES) if narrow else (_WIDE, WIDE_BYTES)
        self._kinds[segment] = self.map[KINDS_AT + segment] = kind
        begins = HEADER_BYTES + segment * SEGMENT_BYTES
        with suppress(OSError):
            # All its pages in one call: else every sixteenth record would cost a page fault.
            self.map.madvise(_POPULATE_WRITE, begins, SEGMENT_BYTES)
        slots = range(begins, begins + SEGMENT_BYTES, size)
        (self.narrow if narrow else self._wide).extend(reversed(slots))
