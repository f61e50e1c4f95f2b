"""Tasks end although they forget that they were cancelled, and leave none behind."""

from __future__ import annotations

import asyncio
from types import ModuleType

import pytest

from agent import ending as of_agent
from reconciler import ending as of_reconciler
from router import ending as of_router

each = pytest.mark.parametrize("ending", [of_router, of_agent, of_reconciler])
with_parts = pytest.mark.parametrize("ending", [of_router, of_agent])


async def forgetful(times: int, began: asyncio.Event | None = None) -> None:
    """As redis-py under Python 3.11: a cancellation that meets a time-out is one time-out more."""
    while True:
        try:
            if began is not None:
                began.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if not times:
                raise
            times -= 1


@each
async def test_who_forgets_is_told_again(ending: ModuleType) -> None:
    tasks = [asyncio.create_task(forgetful(times)) for times in (0, 1, 3)]
    await asyncio.sleep(0)
    await ending.end(tasks)
    assert all(task.cancelled() for task in tasks)


@each
async def test_whoever_is_cancelled_while_it_ends_others_ends_them_all_the_same(
    ending: ModuleType,
) -> None:
    task = asyncio.create_task(forgetful(2))
    await asyncio.sleep(0)
    ends = asyncio.create_task(ending.end([task]))
    await asyncio.sleep(0)
    ends.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ends
    assert task.cancelled()


@with_parts
async def test_parts_are_cancelled_with_the_whole_however_forgetful(ending: ModuleType) -> None:
    began = asyncio.Event()
    parts = [asyncio.create_task(forgetful(times, began)) for times in (0, 2)]
    whole = asyncio.create_task(ending.together(*parts))
    await began.wait()
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole
    assert all(part.cancelled() for part in parts)


@with_parts
async def test_a_part_that_fails_ends_the_others_and_is_heard_of(ending: ModuleType) -> None:
    async def fails() -> None:
        raise ValueError("broken")

    other = asyncio.create_task(forgetful(1))
    with pytest.raises(ValueError, match="broken"):
        await ending.together(other, asyncio.create_task(fails()))
    assert other.cancelled()


@with_parts
async def test_parts_that_end_by_themselves_are_the_end_of_the_whole(ending: ModuleType) -> None:
    await ending.together(*(asyncio.create_task(asyncio.sleep(0)) for _ in range(2)))
