"""The scheduler in virtual time: nothing waits, every step is looked at."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.simulated.generation import Limits, generate
from agent.simulated.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from agent.simulated.prefix_cache import block_hashes, root_hash
from agent.simulated.scheduler import EngineBusyError, Phase, Scheduler, Sequence, Step
from agent.simulated.settings import EngineSettings, KVEventSettings
from agent.simulated.timing import TimeModel
from agent.simulated.tokens import encode

EVENTS = KVEventSettings(endpoint="inproc://unused")


def small(**changes: object) -> EngineSettings:
    settings = {
        "max_model_len": 64,
        "block_size": 4,
        "num_blocks": 24,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "kv_events": EVENTS,
    }
    return EngineSettings(**settings | changes)  # type: ignore[arg-type]


def sequence(text: str, *, tokens: int = 4, **fields: object) -> Sequence:
    prompt = encode(text)
    limits = Limits(max_tokens=tokens, ignore_eos=True)
    return Sequence(prompt, generate(prompt, limits, seed=0, mean_tokens=8), **fields)  # type: ignore[arg-type]


class Simulation:
    """A scheduler, its clock, and a subscriber that believes every event."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.scheduler = Scheduler(settings)
        self.now_s = 0.0
        self.mirror: dict[int, int | None] = {}  # block -> its parent
        self.events: list[Event] = []

    def submit(self, *sequences: Sequence) -> None:
        for one in sequences:
            self.scheduler.submit([one], self.now_s)

    def begin(self) -> Step | None:
        return self.scheduler.schedule(self.now_s)

    def end(self, step: Step) -> None:
        self.now_s += step.duration_s
        events = self.scheduler.complete(step, self.now_s)
        self.events += events
        kinds = [type(event) for event in events]
        assert kinds == sorted(
            kinds, key=[AllBlocksCleared, BlockRemoved, BlockStored].index
        )  # removals before stores
        for event in events:
            match event:
                case AllBlocksCleared():
                    self.mirror.clear()
                case BlockRemoved():
                    for block in event.block_hashes:
                        del self.mirror[block]
                case BlockStored():
                    parent = event.parent_block_hash
                    for block in event.block_hashes:
                        assert block not in self.mirror
                        self.mirror[block] = parent
                        parent = block
        assert all(parent is None or parent in self.mirror for parent in self.mirror.values())

    def run(self) -> None:
        while (step := self.begin()) is not None:
            self.end(step)


jobs = st.tuples(
    st.text("ab", min_size=1, max_size=10),  # four letters of the prompt each: one token
    st.integers(1, 20),  # tokens to generate
    st.sampled_from(["", "salt"]),
    st.integers(0, 4),  # steps before the next one arrives
    st.one_of(st.none(), st.integers(0, 6)),  # aborted after so many steps
)


@given(st.lists(jobs, max_size=25), st.booleans(), st.booleans(), st.integers(0, 30))
def test_whatever_comes_everything_ends_and_subscribers_know_the_cache(
    work: list[tuple[str, int, str, int, int | None]], instant: bool, caching: bool, reset_at: int
) -> None:
    settings = small(time=TimeModel(speed=0 if instant else 1), enable_prefix_caching=caching)
    world = Simulation(settings)
    sequences: list[Sequence] = []
    aborts: list[tuple[int, Sequence]] = []
    steps = 0

    def one_step() -> bool:
        nonlocal steps
        step = world.begin()
        if step is None:
            return False
        assert len(world.scheduler.running) <= settings.max_num_seqs
        prefilled = sum(end - start for _, start, end in step.prefills)
        assert prefilled + len(step.decodes) <= settings.max_num_batched_tokens
        assert (step.duration_s == 0) == instant
        for due, doomed in aborts:
            if due <= steps:  # in the middle of a step
                world.scheduler.abort(doomed, world.now_s)
        if steps == reset_at:
            world.scheduler.reset_prefix_cache()
        world.end(step)
        cache = world.scheduler.cache
        assert cache.pinned_blocks <= settings.num_blocks
        assert cache.cached_blocks <= settings.num_blocks
        assert len(world.mirror) == cache.cached_blocks
        assert all(block in cache for block in world.mirror)
        steps += 1
        return True

    for letters, tokens, salt, pause, abort_after in work:
        new = sequence("".join(letter * 4 for letter in letters), tokens=tokens, cache_salt=salt)
        world.submit(new)
        sequences.append(new)
        if abort_after is not None:
            aborts.append((steps + abort_after, new))
        for _ in range(pause):
            one_step()
    while one_step():
        pass

    for one in sequences:
        assert one.ended
        assert one.cached_tokens < len(one.prompt)
        if one.phase is Phase.FINISHED:
            assert one.emitted == len(one.output.tokens)
    assert world.scheduler.cache.pinned_blocks == 0
    metrics = world.scheduler.metrics
    assert sum(metrics.finished.values()) == len(sequences)
    assert metrics.generation_tokens == sum(one.emitted for one in sequences)
    if not caching:
        assert world.mirror == {}


def test_first_come_first_served_with_chunked_prefill() -> None:
    world = Simulation(small(max_num_batched_tokens=16, max_num_seqs=2))
    long, short, third = sequence("x" * 80), sequence("y" * 16), sequence("z" * 16)
    world.submit(long, short, third)
    step = world.begin()
    assert step is not None
    assert step.prefills == ((long, 0, 16),)  # the budget is spent on the first
    world.end(step)
    step = world.begin()
    assert step is not None
    assert step.prefills == ((long, 16, 20), (short, 0, 4))
    assert third.phase is Phase.WAITING  # max_num_seqs
    world.end(step)
    assert (long.emitted, short.emitted) == (1, 1)
    step = world.begin()
    assert step is not None
    assert step.decodes == (long, short)
    world.end(step)
    world.run()
    assert third.phase is Phase.FINISHED


def test_a_warm_prefix_is_not_computed_again() -> None:
    world = Simulation(small(max_num_batched_tokens=64))
    world.submit(sequence("x" * 128, tokens=1))
    world.run()
    cold_s = world.now_s
    warm = sequence("x" * 128, tokens=1)
    world.submit(warm)
    world.run()
    # the last block is computed again: its last token's logits make the first token
    assert warm.cached_tokens == 28
    assert world.now_s - cold_s < cold_s / 5
    assert (world.scheduler.stats.blocks_seen, world.scheduler.stats.blocks_hit) == (16, 7)
    assert world.scheduler.metrics.prefix_cache_queries == 64
    assert world.scheduler.metrics.prefix_cache_hits == 28


def test_the_next_turn_finds_the_answer_it_continues() -> None:
    world = Simulation(small())
    first = sequence("x" * 32, tokens=9)
    world.submit(first)
    world.run()
    turn = sequence("x" * 32 + first.output.text + "tail")
    world.submit(turn)
    world.run()
    assert turn.cached_tokens == 16  # 8 of the prompt and 8 generated


def test_events_tell_how_blocks_came_about() -> None:
    world = Simulation(small(max_num_batched_tokens=8, lora_modules=("tuned",)))
    one = sequence("x" * 64, tokens=9, cache_salt="tenant-a", lora="tuned")
    world.submit(one)
    world.run()
    stored = [event for event in world.events if isinstance(event, BlockStored)]
    # one event a prefill chunk (8 tokens: 2 blocks), then one a block filled by decoding
    assert [len(event.block_hashes) for event in stored] == [2, 2, 1, 1]
    tokens = list(one.prompt) + list(one.output.tokens)
    assert [token for event in stored for token in event.token_ids] == tokens[:24]
    hashes = [block for event in stored for block in event.block_hashes]
    root = root_hash(lora="tuned", cache_salt="tenant-a")
    assert hashes == list(block_hashes(root, one.prompt + one.output.tokens, 4))
    parents = [event.parent_block_hash for event in stored]
    assert parents == [None, hashes[1], hashes[3], hashes[4]]
    keys = [key for event in stored for key in event.extra_keys]
    assert keys == [("tuned", "tenant-a"), *[("tuned",)] * 5]
    assert {(event.lora_id, event.lora_name) for event in stored} == {(1, "tuned")}


def test_salts_share_nothing_and_one_salt_shares() -> None:
    world = Simulation(small())
    sequences = [sequence("x" * 64, cache_salt=salt) for salt in ("a", "b", "a")]
    for one in sequences:
        world.submit(one)
        world.run()
    assert [one.cached_tokens for one in sequences] == [0, 0, 12]


def test_the_bound_counts_running_and_waiting_and_refuses_a_request_whole() -> None:
    world = Simulation(small(max_num_queued_reqs=3, max_num_seqs=1))
    world.submit(sequence("a"), sequence("b"))
    world.begin()
    with pytest.raises(EngineBusyError):
        world.scheduler.submit([sequence("c"), sequence("d")], 0.0)
    assert len(world.scheduler.waiting) == 1
    world.submit(sequence("e"))
    assert world.scheduler.stats.rejected == 1


def test_who_does_not_fit_waits_and_nobody_overtakes() -> None:
    world = Simulation(small(num_blocks=16, max_num_batched_tokens=64))
    first, large, little = sequence("x" * 128, tokens=8), sequence("y" * 160), sequence("z" * 4)
    world.submit(first, large, little)
    step = world.begin()
    assert step is not None
    assert [one for one, _, _ in step.prefills] == [first]
    world.end(step)
    world.run()
    assert all(one.phase is Phase.FINISHED for one in (first, large, little))


def test_aborting_frees_place_and_blocks_at_once() -> None:
    world = Simulation(small(max_num_seqs=1))
    first, second = sequence("x" * 64, tokens=20), sequence("y" * 64)
    told = []
    first.notify = lambda: told.append(first.phase)
    world.submit(first, second)
    step = world.begin()
    assert step is not None
    world.scheduler.abort(first, world.now_s)
    assert told == [Phase.ABORTED]
    assert world.scheduler.cache.pinned_blocks == 0
    assert not world.scheduler.running
    world.end(step)
    assert first.emitted == 0
    world.run()
    assert second.phase is Phase.FINISHED
    world.scheduler.abort(second, world.now_s)  # too late: no effect
    assert second.phase is Phase.FINISHED
    assert world.scheduler.metrics.finished["abort"] == 1


def test_a_batch_is_slower_than_one_alone() -> None:
    def seconds(count: int) -> float:
        world = Simulation(small(max_num_batched_tokens=64))
        world.submit(*(sequence(f"{n}" * 4, tokens=10) for n in range(count)))
        world.run()
        return world.now_s

    assert seconds(1) < seconds(4) < 4 * seconds(1)


def test_embeddings_take_prefill_time_and_leave_nothing_behind() -> None:
    world = Simulation(small())
    one = Sequence(encode("x" * 128), embeds=True)
    world.submit(one)
    world.run()
    assert one.phase is Phase.FINISHED
    assert world.now_s > 0
    assert world.scheduler.cache.cached_blocks == 0
    assert world.events == []


def test_a_slow_engine_takes_longer() -> None:
    world = Simulation(small())
    world.scheduler.slow_factor = 10
    world.submit(sequence("x" * 32))
    world.run()
    usual = Simulation(small())
    usual.submit(sequence("x" * 32))
    usual.run()
    assert world.now_s == pytest.approx(10 * usual.now_s)


def test_a_reset_tells_subscribers_with_the_next_step() -> None:
    world = Simulation(small())
    world.submit(sequence("x" * 64))
    world.run()
    assert world.scheduler.reset_prefix_cache()
    assert world.mirror
    world.submit(sequence("y" * 64))
    world.run()
    assert AllBlocksCleared() in world.events
    assert len(world.mirror) == world.scheduler.cache.cached_blocks == 4


def test_a_reset_forgets_what_the_step_under_way_has_stored() -> None:
    world = Simulation(small())
    one = sequence("x" * 64)
    world.submit(one)
    step = world.begin()
    assert step is not None
    world.scheduler.abort(one, world.now_s)
    assert world.scheduler.reset_prefix_cache()
    world.end(step)
    assert world.events == [AllBlocksCleared()]
    assert world.mirror == {}


def test_a_reset_is_refused_while_something_runs() -> None:
    world = Simulation(small())
    world.submit(sequence("x" * 64))
    step = world.begin()
    assert step is not None
    assert not world.scheduler.reset_prefix_cache()
    world.end(step)
    world.run()
    assert AllBlocksCleared() not in world.events
