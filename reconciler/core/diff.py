"""Which fields differ between two pieces of plain data. Pure; a generator over `match before, after`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from reconciler.core.action import Change


def diff(before: object, after: object, path: str = "") -> Iterator[Change]:
    """Leaves that differ, in the order of the fields. Lists are compared place by place."""
    match before, after:
        case Mapping(), Mapping():
            for key in [*before, *(k for k in after if k not in before)]:
                inner = f"{path}.{key}" if path else str(key)
                yield from diff(before.get(key), after.get(key), inner)
        case list() | tuple(), list() | tuple():
            yield from _sequence(before, after, path)
        case _ if before != after:
            yield Change(path, before, after)


def _sequence(before: Sequence[object], after: Sequence[object], path: str) -> Iterator[Change]:
    for index in range(max(len(before), len(after))):
        old = before[index] if index < len(before) else None
        new = after[index] if index < len(after) else None
        yield from diff(old, new, f"{path}[{index}]")
