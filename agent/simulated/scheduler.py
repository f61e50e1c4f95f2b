"""Which sequences an engine step serves: first come, first served, with chunked prefill.

A step gives every decoding sequence one token, then spends what is left of its token budget on
prompts, longest-waiting first. Sequences wait while `max_num_seqs` run, or while the cache cannot
promise them all the blocks they will need. Blocks enter the cache when they are scheduled, so that
a sequence admitted in the same step already finds them; events are handed out when the step ends.

Pure: time is passed in and nothing waits. `engine` turns `Step.duration_s` into waiting. Where the
time model is instant a step decodes every sequence to its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import count

from agent.simulated.generation import NOTHING, Output
from agent.simulated.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from agent.simulated.metrics import EngineMetrics
from agent.simulated.prefix_cache import BlockHash, Lease, PrefixCache, block_hashes, root_hash
from agent.simulated.settings import EngineSettings
from agent.simulated.tokens import Tokens

_MEDIUM = "GPU"
_ids = count()


class EngineBusyError(Exception):
    """More requests are in flight than `max_num_queued_reqs` allows."""


class Phase(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making: a prompt, what will be generated, and how far it has come.

    `notify` is called when tokens were emitted or the sequence ended. `embeds`: only the prompt is
    computed, nothing is cached.
    """

    prompt: Tokens[int]
    output: Output = NOTHING
    cache_salt: str = ""
    lora: str = ""
    embeds: bool = False
    notify: Callable[[], None] = lambda: None
    id: int = field(default_factory=lambda: next(_ids))

    phase: Phase = Phase.WAITING
    arrived_s: float = 0.0
    last_token_s: float = 0.0
    emitted: int = 0  # tokens of the output that are out
    computed: int = 0  # tokens of prompt and output whose KV exists or is in this step
    cached_tokens: int = 0  # of the prompt, found in the cache at admission
    lease: Lease | None = None
    hashes: list[BlockHash] = field(default_factory=list)  # of full blocks, as far as known
    stored_blocks: int = 0

    @property
    def ended(self) -> bool:
        return self.phase in (Phase.FINISHED, Phase.ABORTED)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step does: prompt chunks as (sequence, start, end), and sequences to decode."""

    prefills: tuple[tuple[Sequence, int, int], ...]
    decodes: tuple[Sequence, ...]
    duration_s: float


@dataclass(slots=True)
class SchedulerStats:
    """What happened since the start; blocks are full prompt blocks of admitted sequences."""

    admitted: int = 0
    rejected: int = 0
    peak_running: int = 0
    peak_waiting: int = 0
    blocks_seen: int = 0
    blocks_hit: int = 0


class Scheduler:
    """One engine's queue, running batch and cache."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self.cache = PrefixCache(capacity_blocks=settings.num_blocks)
        self.metrics = EngineMetrics()
        self.stats = SchedulerStats()
        self.slow_factor = 1.0
        self.waiting: dict[int, Sequence] = {}
        self.running: dict[int, Sequence] = {}
        self._cleared: list[Event] = []
        self._removed: list[BlockHash] = []
        self._stored: list[Event] = []
        self._loras = {name: index for index, name in enumerate(settings.lora_modules, start=1)}

    # -- requests ----------------------------------------------------------------------------------

    def submit(self, sequences: list[Sequence], now_s: float) -> None:
        """Queues the sequences of one request, all or none.

        Raises:
            EngineBusyError: when there are too many in flight; nothing was queued.
        """
        limit = self._settings.max_num_queued_reqs
        in_flight = len(self.waiting) + len(self.running)
        if limit is not None and in_flight + len(sequences) > limit:
            self.stats.rejected += 1
            raise EngineBusyError
        for sequence in sequences:
            sequence.arrived_s = now_s
            self.waiting[sequence.id] = sequence
        self.stats.peak_waiting = max(self.stats.peak_waiting, len(self.waiting))

    def abort(self, sequence: Sequence, now_s: float) -> None:
        """Ends a sequence and frees its place and blocks at once; no effect on one that ended."""
        if not sequence.ended:
            self._end(sequence, Phase.ABORTED, "abort", now_s)

    def reset_prefix_cache(self) -> bool:
        """False when blocks are in use, as in vLLM. Subscribers hear of it after the next step."""
        cleared = self.cache.clear()
        if cleared:  # what a step under way has stored is forgotten with the rest
            self._cleared, self._removed, self._stored = [AllBlocksCleared()], [], []
        return cleared

    # -- steps -------------------------------------------------------------------------------------

    def schedule(self, now_s: float) -> Step | None:
        """The next step, its blocks already taken; None when there is nothing to do."""
        decodes = []
        prefills = []
        budget = self._settings.max_num_batched_tokens
        burst = self._settings.time.instant
        for sequence in self.running.values():
            if sequence.emitted:
                left = len(sequence.output.tokens) - sequence.emitted
                self._compute(sequence, left if burst else 1)
                decodes.append(sequence)
                budget -= 1
        for sequence in self.running.values():
            if not sequence.emitted and budget > 0:
                chunk = min(budget, len(sequence.prompt) - sequence.computed)
                prefills.append(self._prefill(sequence, chunk))
                budget -= chunk
        while self.waiting and budget > 0 and len(self.running) < self._settings.max_num_seqs:
            sequence = next(iter(self.waiting.values()))
            if not self._admit(sequence, now_s):
                break  # first come, first served: nobody overtakes
            chunk = min(budget, len(sequence.prompt) - sequence.computed)
            prefills.append(self._prefill(sequence, chunk))
            budget -= chunk
        if not decodes and not prefills:
            return None
        duration_s = self._settings.time.step_s(
            [(start, end) for _, start, end in prefills], len(decodes)
        )
        return Step(tuple(prefills), tuple(decodes), duration_s * self.slow_factor)

    def complete(self, step: Step, now_s: float) -> list[Event]:
        """Emits the step's tokens and ends what is done; returns the events to publish.

        Sequences aborted in the meantime are passed over.
        """
        burst = self._settings.time.instant
        for sequence, _, end in step.prefills:
            if sequence.phase is Phase.RUNNING and end == len(sequence.prompt):
                self._first_token(sequence, now_s)
        for sequence in step.decodes:
            if sequence.phase is Phase.RUNNING:
                left = len(sequence.output.tokens) - sequence.emitted
                self._emit(sequence, left if burst else 1, now_s)
        events = [*self._cleared]
        if self._removed:
            events.append(BlockRemoved(tuple(self._removed), _MEDIUM))
        events += self._stored
        self._cleared, self._removed, self._stored = [], [], []
        return events

    def _admit(self, sequence: Sequence, now_s: float) -> bool:
        size = self._settings.block_size
        length = len(sequence.prompt)
        if sequence.embeds:
            sequence.lease = Lease(0)
        else:
            reusable: list[BlockHash] = []
            if self._settings.enable_prefix_caching:
                if not sequence.hashes:  # else a former try that did not fit
                    root = root_hash(lora=sequence.lora, cache_salt=sequence.cache_salt)
                    sequence.hashes = list(block_hashes(root, sequence.prompt, size))
                # The last token is always computed: its logits make the first token.
                reusable = sequence.hashes[: (length - 1) // size]
            # The last output token is never fed back, so it needs no KV.
            needed = -(-(length + len(sequence.output.tokens) - 1) // size)
            sequence.lease = self.cache.open(reusable, needed_blocks=needed)
            if sequence.lease is None:
                return False
            hit = sequence.lease.hit_blocks
            sequence.stored_blocks = hit
            sequence.cached_tokens = sequence.computed = hit * size
            self.stats.blocks_seen += length // size
            self.stats.blocks_hit += hit
            self.metrics.prefix_cache_queries += length
            self.metrics.prefix_cache_hits += sequence.cached_tokens
        del self.waiting[sequence.id]
        self.running[sequence.id] = sequence
        sequence.phase = Phase.RUNNING
        self.stats.admitted += 1
        self.stats.peak_running = max(self.stats.peak_running, len(self.running))
        self.metrics.queue_time.observe(now_s - sequence.arrived_s)
        return True

    def _prefill(self, sequence: Sequence, chunk: int) -> tuple[Sequence, int, int]:
        start = sequence.computed
        self._compute(sequence, chunk)
        return sequence, start, start + chunk

    def _compute(self, sequence: Sequence, tokens: int) -> None:
        """Takes the blocks for the next tokens and stores those that become full."""
        sequence.computed += tokens
        if sequence.embeds:
            return
        size = self._settings.block_size
        lease = sequence.lease
        assert lease is not None
        missing = -(-sequence.computed // size) - lease.taken_blocks
        if missing > 0:
            self._removed += self.cache.take(lease, missing)
        full = sequence.computed // size
        if not self._settings.enable_prefix_caching or full == sequence.stored_blocks:
            return
        first = sequence.stored_blocks
        sequence.stored_blocks = full
        prompt_blocks = len(sequence.prompt) // size
        if first < prompt_blocks:
            self._store(sequence, first, min(full, prompt_blocks))
        for block in range(max(first, prompt_blocks), full):
            self._store(sequence, block, block + 1)

    def _store(self, sequence: Sequence, first: int, end: int) -> None:
        """Stores blocks `first` to `end` (exclusive); one event for each run of new ones."""
        size = self._settings.block_size
        lease = sequence.lease
        assert lease is not None
        if end > len(sequence.hashes):  # filled by decoding: hashed when full
            parent = sequence.hashes[-1] if sequence.hashes else self._root(sequence)
            tokens = self._tokens(sequence, len(sequence.hashes) * size, end * size)
            sequence.hashes += block_hashes(parent, tokens, size)
        run = first
        for block in range(first, end):
            if not self.cache.store(lease, sequence.hashes[block]):
                self._announce(sequence, run, block)
                run = block + 1
        self._announce(sequence, run, end)

    def _announce(self, sequence: Sequence, first: int, end: int) -> None:
        if self._settings.kv_events is None or first == end:
            return
        size = self._settings.block_size
        every = (sequence.lora,) if sequence.lora else ()
        salt = (sequence.cache_salt,) if sequence.cache_salt else ()
        self._stored.append(
            BlockStored(
                block_hashes=tuple(sequence.hashes[first:end]),
                parent_block_hash=sequence.hashes[first - 1] if first else None,
                token_ids=self._tokens(sequence, first * size, end * size).tolist(),
                block_size=size,
                lora_id=self._loras.get(sequence.lora),
                medium=_MEDIUM,
                lora_name=sequence.lora or None,
                extra_keys=[
                    (every + (salt if block == 0 else ())) or None for block in range(first, end)
                ],
            )
        )

    def _root(self, sequence: Sequence) -> BlockHash:
        return root_hash(lora=sequence.lora, cache_salt=sequence.cache_salt)

    def _tokens(self, sequence: Sequence, start: int, end: int) -> Tokens[int]:
        """Tokens `start` to `end` of prompt and output as one row."""
        length = len(sequence.prompt)
        if end <= length:
            return sequence.prompt[start:end]
        if start >= length:
            return sequence.output.tokens[start - length : end - length]
        return sequence.prompt[start:] + sequence.output.tokens[: end - length]

    def _first_token(self, sequence: Sequence, now_s: float) -> None:
        self.metrics.prompt_tokens += len(sequence.prompt)
        self.metrics.prompt_tokens_cached += sequence.cached_tokens
        self.metrics.first_token.observe(now_s - sequence.arrived_s)
        sequence.last_token_s = now_s
        if sequence.embeds:
            self._end(sequence, Phase.FINISHED, "stop", now_s)
            return
        sequence.emitted = 1
        self.metrics.generation_tokens += 1
        self._progress(sequence, now_s)

    def _emit(self, sequence: Sequence, tokens: int, now_s: float) -> None:
        self.metrics.inter_token.observe((now_s - sequence.last_token_s) / tokens, tokens)
        self.metrics.generation_tokens += tokens
        sequence.last_token_s = now_s
        sequence.emitted += tokens
        self._progress(sequence, now_s)

    def _progress(self, sequence: Sequence, now_s: float) -> None:
        if sequence.emitted == len(sequence.output.tokens):
            self._end(sequence, Phase.FINISHED, sequence.output.finish_reason, now_s)
        else:
            sequence.notify()

    def _end(self, sequence: Sequence, phase: Phase, reason: str, now_s: float) -> None:
        self.waiting.pop(sequence.id, None)
        self.running.pop(sequence.id, None)
        if sequence.lease is not None:
            self.cache.close(sequence.lease)
        sequence.phase = phase
        self.metrics.finished[reason] += 1
        self.metrics.e2e_latency.observe(now_s - sequence.arrived_s)
        sequence.notify()
