"""One engine over time: which process it is, and what is said of it."""

from __future__ import annotations

from agent.core.cache import Cache, Change
from agent.core.engine import EngineState
from agent.core.metrics import Reading
from schemas.wire.token_blocks import unpack

NOW = 1_790_000_000.0


def reading(started_at: float = 0.0, **fields: int) -> Reading:
    return Reading(started_at=started_at, **fields)


def life(state: EngineState) -> tuple[int, int]:
    report = state.report(NOW)
    return report.epoch, report.clears


def test_a_process_is_known_by_when_it_started() -> None:
    state = EngineState("r", NOW, agent="a")
    assert not state.read(reading(100.0))  # the first look tells of no change
    assert life(state) == (100_000, 0)
    assert not state.read(reading(100.0))
    assert state.read(reading(200.0))
    assert life(state) == (200_000, 0)


def test_processes_that_answer_by_turns_are_no_restarts() -> None:
    state = EngineState("r", NOW)
    state.read(reading(200.0))
    assert not any(state.read(reading(at)) for at in (100.0, 200.0, 100.0, 0.0))
    assert life(state) == (200_000, 0)


def test_without_a_start_its_events_tell() -> None:
    state = EngineState("r", NOW)
    state.read(reading())
    before = life(state)
    state.restarted(NOW + 1)
    assert life(state) != before


def test_what_is_lost_is_forgotten_and_said() -> None:
    state = EngineState("r", NOW)
    state.read(reading(100.0, running=3, waiting=2, capacity_blocks=64, block_tokens=16))
    batch = state.lost()
    assert batch.cleared
    report = state.report(NOW)
    assert (report.epoch, report.clears) == (100_000, 1)
    assert (report.running, report.waiting, report.capacity_blocks) == (0, 0, 64)


def test_batches_are_numbered_from_zero_in_each_epoch() -> None:
    state = EngineState("r", NOW)
    cache = Cache(bytes(32))
    state.add_cache("one", cache)
    state.read(reading(100.0))
    change = Change(stored={5: None}, stored_tokens=16)
    first, second = state.changed(change), state.changed(change)
    assert first is not None
    assert second is not None
    assert (first.seq, second.seq, unpack(first.stored)) == (0, 1, [5])
    assert state.changed(Change(stored_tokens=16)) is None  # nothing that has a name
    assert state.report(NOW).stored_tokens == 48
    state.read(reading(200.0))
    third = state.changed(change)
    assert third is not None
    assert (third.epoch, third.seq) == (200_000, 0)
    assert state.snapshot().seq == 0
    assert state.report(NOW).stored_tokens == 16
