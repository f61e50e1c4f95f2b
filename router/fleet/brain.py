"""What this process has learned of its replicas, and the decisions it makes from it.

Holds the prefix index, the loads and the speeds that the pure core works on, gives every replica a
slot in them, and tells them what becomes of each request. Not here: the rule itself (core.score), or
which replicas may be candidates (core.pick, core.health), or how other routers hear of it (sharing).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter, time
from typing import Any, Final

from router.core.api import Endpoint
from router.core.blocks import Prompt, chain_seed, read_prompt, uncached_prompt
from router.core.engine_reports import EngineReports
from router.core.index import PrefixIndex
from router.core.load import Ticket
from router.core.pick import SCORED, Chance, counted
from router.core.room import Room
from router.core.route import Candidates, Choice, States, choose, dispatched, hit_tokens
from router.core.score import Fleet, Held
from router.core.snapshot import Candidate, Snapshot
from router.core.speeds import Speeds
from router.core.trust import in_engine_tokens
from router.core.turnover import Turnover
from router.fleet.sharing import Sharing
from schemas.wire.events import EngineReport
from schemas.wire.routing import Function

_REFRESH_S: Final = 1.0
_GROUPS_MAX: Final = 4096
_CACHED_TASKS: Final = frozenset({"chat", "completions", "responses", "messages"})


class Sent:
    """One attempt, counted from before it is sent until it is over, whichever way."""

    def __init__(self, brain: Brain, speeds: Speeds, choice: Choice, prompt: Prompt) -> None:
        self._brain = brain
        self._speeds = speeds
        self._choice = choice
        self._prompt = prompt
        self._ticket: Ticket | None = None

    @property
    def held(self) -> Held:
        """What candidates were credited with, by position."""
        return self._choice.held

    def begin(self) -> None:
        now = self._brain.now()
        choice, blocks = self._choice, self._prompt.blocks
        self._ticket = dispatched(choice, self._prompt, self._brain.states, self._speeds, now=now)
        sharing = self._brain.sharing
        if sharing is not None:
            # What the replica is known to hold is no news to the others.
            sharing.dispatched(choice.slot, blocks if choice.hit_blocks < len(blocks) else ())

    def first_token(self, *, streamed: bool) -> None:
        """Some of the answer's body is there. Only in a stream does that time the prefill alone."""
        assert self._ticket is not None
        at_front_s = self._brain.states.load.first_token(self._ticket, self._brain.now())
        choice, tokens, sharing = self._choice, self._prompt.tokens, self._brain.sharing
        if sharing is not None:
            sharing.changed(choice.slot)
        if at_front_s is not None and streamed:
            prefill_s = at_front_s - self._speeds.rtt_s.get(choice.slot, 0.0)
            self._speeds.learn(choice.slot, choice.hit_tokens, tokens, prefill_s)
            if sharing is not None:
                sharing.sampled(choice.slot, choice.hit_tokens, tokens, prefill_s)

    def used(self, input_tokens: int, cached_tokens: int) -> None:
        """What the engine says of the prompt: its length, and how much of it was cached."""
        choice, prompt = self._choice, self._prompt
        if prompt.blocks and input_tokens > 0:
            self._brain.judge(choice, prompt, input_tokens, cached_tokens)

    def finish(self) -> None:
        if self._ticket is not None:
            self._brain.states.load.finish(self._ticket, self._brain.now())
            if self._brain.sharing is not None:
                self._brain.sharing.changed(self._choice.slot)


class _Everywhere(Mapping[str, int]):
    """Requests on each replica: this router's, and those that others tell of."""

    def __init__(self, own: Mapping[str, int], brain: Brain) -> None:
        self._own = own
        self._brain = brain

    def __getitem__(self, replica: str) -> int:
        slot = self._brain.slots.get(replica)
        others = self._brain.states.load.others(slot)[0] if slot is not None else 0
        return self._own.get(replica, 0) + others

    def __iter__(self) -> Iterator[str]:
        return iter(self._brain.slots)

    def __len__(self) -> int:
        return len(self._brain.slots)


class Brain:
    """Owned by one event loop, like the state it follows."""

    def __init__(self, index_blocks: int, key: bytes = b"") -> None:
        """`key`: of the hashes that blocks are known by; routers that share have the same."""
        self.states = States(PrefixIndex(index_blocks))
        self.reports = EngineReports(self.states.index, self.states.load, self.states.trust)
        self.now = perf_counter
        self.sharing: Sharing | None = None
        self._key = key
        self._slots: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._functions: dict[str, str] = {}
        self._free: list[int] = []
        self._speeds: dict[str, Speeds] = {}
        self._rooms: dict[str, Room] = {}
        self._turnovers: dict[str, Turnover] = {}
        self._groups: dict[tuple[str, ...], Candidates] = {}
        self._whole: dict[int, tuple[Sequence[Candidate], Candidates]] = {}
        """Of those whom a table itself lists together, by identity: nearly always all are asked."""
        self._refreshed_at = 0.0

    def installed(self, snapshot: Snapshot) -> None:
        """Replicas that are new get a slot, those that are gone give theirs back."""
        rtt_s = {cluster.name: cluster.rtt_s or 0.0 for cluster in snapshot.table.clusters}
        self._groups.clear()
        self._whole.clear()
        for replica in [r for r in self._slots if r not in snapshot.replicas]:
            slot = self._slots.pop(replica)
            del self._names[slot]
            self.states.index.remove(slot)
            self.states.trust.remove(slot)
            self.reports.remove(slot)
            function = self._functions.pop(replica)
            self._speeds[function].remove(slot)
            self._rooms[function].remove(slot)
            self._turnovers[function].remove(slot)
            self._free.append(slot)
        now = self.now()  # of all: those that appear together are equally new
        for replica, candidate in snapshot.replicas.items():
            if replica not in self._slots:
                slot = self._free.pop() if self._free else len(self._slots)
                self._slots[replica] = slot
                self._names[slot] = replica
                self._functions[replica] = candidate.function
                self.states.index.add(slot)
                self.states.load.add(slot)
                self.reports.add(slot, time())
                speeds = self._speeds.setdefault(candidate.function, Speeds())
                speeds.add(slot, now, rtt_s.get(candidate.cluster, 0.0))
                self._turnovers.setdefault(candidate.function, Turnover())
                room = self._rooms.setdefault(candidate.function, Room())
                self.states.index.set_capacity(slot, room.capacity(slot))
        for name in self._speeds.keys() - snapshot.functions.keys():
            if name not in self._functions.values():
                del self._speeds[name]
                del self._rooms[name]
                del self._turnovers[name]

    def prompt(
        self,
        function: Function,
        endpoint: Endpoint,
        request: Mapping[str, Any],
        size_bytes: int,
        salt: str,
    ) -> Prompt | None:
        """What routing needs to know of a body; None where the function's policy needs nothing.

        `salt`: of the tenant; prompts of two tenants share no block.
        """
        if function.policy.name not in SCORED:
            return None
        return self.read(function, endpoint, request, size_bytes, salt)

    def read(
        self,
        function: Function,
        endpoint: Endpoint,
        request: Mapping[str, Any],
        size_bytes: int,
        salt: str,
    ) -> Prompt:
        """The prompt of a body, whatever the policy."""
        if endpoint.task not in _CACHED_TASKS or not request:
            return uncached_prompt(size_bytes)
        seed = chain_seed(function.served_name, salt, key=self._key)
        try:
            return read_prompt(request, seed)
        except RecursionError:
            # Too deep to render is not too deep for the engine to judge.
            return uncached_prompt(size_bytes)

    def choose(
        self,
        pool: Sequence[Candidate],
        function: Function,
        prompt: Prompt,
        chance: Chance,
        pinned: str | None = None,
    ) -> tuple[Candidate, Sent]:
        """The candidate for this attempt, and how to count it. `pinned` served the session before."""
        now = self.now()
        speeds = self._speeds[function.name]
        if now - self._refreshed_at >= _REFRESH_S:
            self._refresh(now)
        known = self._whole.get(id(pool))
        group = known[1] if known is not None and known[0] is pool else self._group(pool)
        choice = choose(
            group,
            prompt,
            self.states,
            speeds,
            function.policy,
            now=now,
            chance=chance,
            pinned=None if pinned is None else self._slots.get(pinned),
        )
        return pool[choice.position], Sent(self, speeds, choice, prompt)

    def _refresh(self, now: float) -> None:
        """Puts what was learned of all replicas where decisions read it."""
        self._refreshed_at = now
        for name, each in self._speeds.items():
            each.refresh(now, self._turnovers[name].dearer(self.states.index, each.factor))
        self.reports.expire(now)
        for slot, replica in self._names.items():
            # Where an engine's size is reported there is nothing to guess.
            if not self.reports.sized(slot):
                room = self._rooms[self._functions[replica]]
                self.states.index.set_capacity(slot, room.capacity(slot))

    def fleet(self, pool: Sequence[Candidate], function: Function) -> Fleet:
        """What a choice among these goes by just now, for its record."""
        group = self._group(list(pool))
        return group.fleet(self.states.load, self._speeds[function.name], self.now())

    def factors(self, pool: Sequence[Candidate], function: Function) -> list[float]:
        """How many times the fleet's prefill time each of them needs."""
        factor = self._speeds[function.name].factor
        return [factor[self._slots[candidate.id]] for candidate in pool]

    def _group(self, pool: Sequence[Candidate]) -> Candidates:
        key = tuple([candidate.id for candidate in pool])
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= _GROUPS_MAX:
                self._groups.clear()
                self._whole.clear()
            group = self._groups[key] = Candidates([self._slots[name] for name in key], key)
        if isinstance(pool, tuple):  # kept along with it, so that no other can get its identity
            self._whole[id(pool)] = pool, group
        return group

    def judge(self, choice: Choice, prompt: Prompt, input_tokens: int, cached_tokens: int) -> None:
        """Learns from what an engine had of a prompt how far the index may be believed there."""
        slot, index = choice.slot, self.states.index
        name = self._names.get(slot)
        if name is None:
            return
        self.reports.counted(slot, prompt.tokens, input_tokens)
        room = self._rooms[self._functions[name]]
        share = min(1.0, cached_tokens / input_tokens)
        held = min(len(prompt.blocks), int(share * prompt.tokens / prompt.block_tokens))
        room.learn(slot, choice.hit_blocks, held, index.held(slot))
        if not room.tells:
            return
        predicted = in_engine_tokens(
            hit_tokens(prompt, choice.hit_blocks), prompt.tokens, input_tokens
        )
        if self.states.trust.learn(slot, predicted, cached_tokens):
            room.restarted(slot)
            index.clear(slot)
            index.insert(slot, prompt.blocks)  # which it has now

    def count(self, candidate: Candidate, function: Function, size_bytes: int) -> Sent | None:
        """How to count a request whose policy weighs no caches; None where nobody else would hear of it."""
        slot = self._slots.get(candidate.id)
        if self.sharing is None or slot is None:
            return None
        choice = Choice(0, slot, 0, 0.0, ())
        return Sent(self, self._speeds[function.name], choice, uncached_prompt(size_bytes))

    def requests(self, own: Mapping[str, int]) -> Mapping[str, int]:
        """Requests on each replica by id, of all routers. `own`: of this one."""
        if self.sharing is None or self.sharing.alone:
            return own
        return _Everywhere(own, self)

    def share(self, router_id: str) -> Sharing:
        """What is done from now on is told to other routers, and theirs is counted: `run` it."""
        self.sharing = Sharing(
            router_id,
            self.states,
            names=self._names,
            slots=self._slots,
            learn=self._learn,
            now=self.now,
        )
        return self.sharing

    def _learn(self, slot: int, cached: float, tokens: float, prefill_s: float) -> None:
        self._speeds[self._functions[self._names[slot]]].learn(slot, cached, tokens, prefill_s)

    @property
    def slots(self) -> Mapping[str, int]:
        """Replica id -> slot."""
        return self._slots

    def carried(self, pool: Sequence[Candidate], own: Mapping[str, int]) -> Mapping[str, int]:
        """Requests on each replica that count against what it may carry, those of other routers too."""
        found = {}
        for candidate in pool:
            mine, slot = own.get(candidate.id, 0), self._slots.get(candidate.id)
            if slot is not None and candidate.max_concurrent:
                others, routers = self.states.load.others(slot)
                mine = counted(mine, others, routers, candidate.max_concurrent)
            found[candidate.id] = mine
        return found

    def heard(self, report: EngineReport) -> str:
        """An engine's word about itself; says why it does not count, or nothing."""
        slot = self._slots.get(report.replica)
        if slot is None:
            return "no such replica"
        return self.reports.apply(slot, report, now=self.now(), now_unix_s=time())

    def connected(self, candidate: Candidate, seconds: float) -> None:
        """Opening a connection took one round trip."""
        slot = self._slots.get(candidate.id)
        if slot is not None:
            self._speeds[candidate.function].measured_rtt(slot, seconds)
