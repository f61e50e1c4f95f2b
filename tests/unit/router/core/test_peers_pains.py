"""What users of other routers suffer from, each beside the naive rule that brings it about.

Every test runs the same fleet twice: by our rule, which must hold, and by the naive one, which must
fail what is asked of ours; else the test would prove nothing. References are to the issues of those
projects.
"""

from __future__ import annotations

import random
from collections import Counter
from statistics import mean

import pytest

from router.core.arms import by_session
from router.core.blocks import Prompt, chain_seed, hash_blocks, read_prompt, render
from router.core.index import PrefixIndex
from router.core.load import Load
from router.core.route import Candidates, States, choose, dispatched
from router.core.score import rendezvous
from router.core.sharing import Journal, Peers
from router.core.snapshot import snapshot
from router.core.speeds import RAMP_S, Speeds
from schemas.wire.routing import Arm, Function, Policy, Replica, RoutingTable

SEED = chain_seed("m")
ANY = {slot: f"r{slot}" for slot in range(8)}


class Fleet:
    """One function's engines in this process's time, as one or more routers know them."""

    def __init__(self, replicas=8, routers=1, *, share=True):
        self.names = {slot: f"r{slot}" for slot in range(replicas)}
        self.slots = {name: slot for slot, name in self.names.items()}
        self.candidates = Candidates(range(replicas), [*self.slots])
        self.chance = random.Random(1)
        self.now = RAMP_S
        self.share = share
        self.routers = []
        for number in range(routers):
            states, speeds = States(), Speeds()
            for slot in self.names:
                states.index.add(slot)
                states.load.add(slot)
                speeds.add(slot, 0.0, 0.002)
            speeds.refresh(self.now)
            journal = Journal(f"router-{number}", states.load)
            self.routers.append(
                (states, speeds, journal, Peers(f"router-{number}", states.load, states.index))
            )
        self.sent = Counter()
        self.hits = []

    def send(self, prompt, *, router=0, by=None):
        """(slot, ticket). `by`: a rule in place of ours, from the router's states to a slot."""
        states, speeds, journal, _ = self.routers[router]
        choice = choose(
            self.candidates, prompt, states, speeds, Policy(), now=self.now, chance=self.chance
        )
        if by is not None:
            slot = by(states)
            alone = Candidates((slot,), (self.names[slot],))
            choice = choose(
                alone, prompt, states, speeds, Policy(), now=self.now, chance=self.chance
            )
        journal.dispatched(choice.slot, prompt.blocks)
        ticket = dispatched(choice, prompt, states, speeds, now=self.now)
        self.sent[choice.slot] += 1
        self.hits.append(choice.hit_tokens / prompt.tokens)
        self.tell(router)
        return choice.slot, ticket

    def end(self, ticket, router=0):
        states, _, journal, _ = self.routers[router]
        states.load.finish(ticket, self.now)
        journal.changed(ticket.slot)
        self.tell(router)

    def tell(self, router):
        if not self.share:
            return
        batches = self.routers[router][2].batches(self.names, self.now, full=False)
        for number, (_, speeds, _, peers) in enumerate(self.routers):
            if number != router:
                for batch in batches:
                    peers.receive(batch, self.slots, speeds.learn, self.now)

    @property
    def hotspot(self):
        return max(self.sent.values()) * len(self.names) / sum(self.sent.values())


def chat(*texts):
    roles = ("system", "user", "assistant")
    messages = [
        {"role": roles[0] if i == 0 else roles[2 - i % 2], "content": text}
        for i, text in enumerate(texts)
    ]
    return {"messages": messages}


def prompt_of(*texts):
    return read_prompt(chat(*texts), SEED)


SYSTEM = "You are a helpful assistant. " * 100


def conversations(count, turns, rng):
    """(conversation, prompt) of all turns, the conversations' turns mixed; one system prompt."""
    texts = {c: [SYSTEM] for c in range(count)}
    order = [c for c in range(count) for _ in range(turns)]
    rng.shuffle(order)
    for conversation in order:
        texts[conversation].append(f"{conversation} " + str(rng.random()) * 150)
        yield conversation, prompt_of(*texts[conversation])


def run(fleet, by=None, in_flight=24):
    """Hit rate of a busy hour: so many requests are always under way."""
    running = []
    for _, prompt in conversations(60, 6, random.Random(2)):
        running.append(fleet.send(prompt, by=by and by(prompt))[1])
        fleet.now += 0.01
        if len(running) > in_flight:
            fleet.end(running.pop(0))
    return mean(fleet.hits)


def longest_match(prompt):
    def rule(states):
        found = states.index.match(prompt.blocks)
        return found[0][1][0] if found else 0

    return rule


def least_requests(_):
    return lambda states: states.load.requests.index(min(states.load.requests))


def test_1_affinity_herds_nobody_and_balance_costs_no_hits():
    # 1: sglang#14305, sglang#32195, production-stack#1035
    ours, herded, balanced = Fleet(), Fleet(), Fleet()
    hit = run(ours)
    most = run(herded, longest_match)
    least = run(balanced, least_requests)
    assert ours.hotspot < 2
    assert hit > most - 0.1
    # The naive: everybody shares the system prompt, so the longest match is always the first replica.
    assert herded.hotspot == len(ANY)
    # And what rebalances by count alone loses the hits.
    assert least < hit - 0.2


def test_179_load_counts_before_it_is_sent():
    # 2: vllm-project/router#179; sglang#27547, #15473: one engine of eight took 100 %
    ours = Fleet()
    for number in range(64):
        ours.send(prompt_of(str(number) * 4000))
    assert max(ours.sent.values()) <= 10

    naive = Fleet()
    late = []
    for number in range(64):
        states = naive.routers[0][0]
        slot, ticket = naive.send(prompt_of(str(number) * 4000), by=least_requests(None))
        late.append(slot)
        # It counts only when the answer begins: as if nothing had been sent yet.
        states.load.finish(ticket, naive.now)
    assert max(Counter(late).values()) == 64


@pytest.mark.parametrize("texts", [["a", "b"], ["b", "a"]])
def test_26263_all_messages_tell_conversations_apart(texts):
    # 12: sglang#26263
    one, other = chat(SYSTEM, texts[0] * 3000), chat(SYSTEM, texts[1] * 3000)
    shared = len(SYSTEM) // 256 + 1

    def common(first, second):
        return sum(x == y for x, y in zip(first, second, strict=False))

    ours = common(read_prompt(one, SEED).blocks, read_prompt(other, SEED).blocks)
    assert ours <= shared

    def naive(request):
        return hash_blocks(render({"messages": request["messages"][:1]}), SEED)

    assert naive(one) == naive(other)
    fleet = Fleet()
    for number in range(40):
        fleet.send(prompt_of(SYSTEM, str(number) * 8000))
    assert len(fleet.sent) == len(ANY)


def test_687_what_is_remembered_is_bounded():
    # 3: production-stack#687, #707; sglang#16734: 2 -> 16 GB
    index, naive = PrefixIndex(max_blocks=5000), {}
    for slot in range(4):
        index.add(slot, capacity_blocks=2000)
    rng = random.Random(1)
    for turn in range(2000):
        blocks = [rng.getrandbits(60) for _ in range(32)]
        index.insert(turn % 4, blocks)
        naive.update(dict.fromkeys(blocks, turn % 4))
        assert len(index) <= 5000
        assert index.held(turn % 4) <= 2000
    assert len(naive) == 64_000


def test_39822_a_restarted_engine_is_credited_with_nothing():
    # 11: sglang#39822; dynamo#11194, #7072
    fleet = Fleet()
    prompt = prompt_of(SYSTEM, "x" * 9000)
    slot, ticket = fleet.send(prompt)
    fleet.end(ticket)
    states = fleet.routers[0][0]
    naive = dict.fromkeys(prompt.blocks, slot)  # knows of replicas by their address alone
    states.index.set_epoch(slot, 2)
    fleet.send(prompt)
    assert fleet.hits[-1] == 0
    assert all(naive[block] == slot for block in prompt.blocks)


def test_11_an_engine_that_nobody_reports_is_found_out_by_its_answers():
    # 11 again, where no agent tells of the restart
    fleet = Fleet()
    states = fleet.routers[0][0]
    prompts = [prompt_of(SYSTEM, str(number) * 9000) for number in range(3)]
    for prompt in prompts:
        fleet.end(fleet.send(prompt, by=lambda _: 3)[1])
    empty = [states.trust.learn(3, prompt.tokens - 64, 0) for prompt in prompts]
    assert empty == [False, False, True]


@pytest.mark.parametrize("share", [True, False])
def test_10_two_routers_are_as_good_as_one(share):
    # 10: llm-d-router#1892, #1946; dynamo#1056: a stateful router cannot run active-active
    one, two = Fleet(), Fleet(routers=2, share=share)
    running = {id(one): [], id(two): []}
    for number, (_, prompt) in enumerate(conversations(60, 6, random.Random(3))):
        for fleet, router in ((one, 0), (two, number % 2)):
            fleet.now += 0.01
            under_way = running[id(fleet)]
            under_way.append((fleet.send(prompt, router=router)[1], router))
            if len(under_way) > 24:
                fleet.end(*under_way.pop(0))
    # Where they share, a conversation is found from either; where they do not, only half of it.
    assert (mean(two.hits) > mean(one.hits) - 0.03) is share
    if share:
        for fleet, (ticket, router) in [(two, left) for left in running[id(two)]]:
            fleet.end(ticket, router)
        for states, *_ in two.routers:
            assert states.load.requests == [0] * 8
            assert list(states.load.floor_s) == [0] * 8


def test_13_a_new_replica_takes_its_share_and_moves_nobody_else():
    # 13: envoy/gateway#7561: sticky sessions break on scale-out
    rng = random.Random(1)
    keys = [rng.getrandbits(64) for _ in range(9)]
    sessions = [rng.getrandbits(64) for _ in range(2000)]
    before = [rendezvous(s, keys[:8]) for s in sessions]
    after = [rendezvous(s, keys) for s in sessions]
    moved = sum(a != b for a, b in zip(before, after, strict=True)) / len(sessions)
    assert 0.08 < moved < 0.15
    assert all(b == 8 for a, b in zip(before, after, strict=True) if a != b)
    naive = sum(s % 8 != s % 9 for s in sessions) / len(sessions)
    assert naive > 0.8


def test_13_no_session_drags_a_canary_along():
    # 13: flagger#1655: sticky sessions drag a canary to 100 %
    def candidates(canary):
        arms = tuple(
            Arm(
                deployment=name,
                cluster="c",
                weight=weight,
                replicas=(Replica(id=f"{name}-0", url="http://127.0.0.1:1"),),
            )
            for name, weight in (("stable", 100 - canary), ("canary", canary))
        )
        function = Function(name="f", served_name="f", arms=arms)
        table = RoutingTable(generation=1, revision="r", published_at=1.0, functions=(function,))
        return [*snapshot(table).replicas.values()]

    rng = random.Random(1)
    sessions = [rng.getrandbits(64) for _ in range(2000)]

    def arm(session, canary):
        return by_session(candidates_of[canary], session)

    candidates_of = {canary: candidates(canary) for canary in (10, 20)}
    # Each asks many times over; the canary has its share of the sessions, and no more as time goes on.
    for _ in range(3):
        on_canary = sum(arm(s, 10) == "canary" for s in sessions) / len(sessions)
        assert 0.07 < on_canary < 0.13
    was = {s for s in sessions if arm(s, 10) == "canary"}
    assert all(arm(s, 20) == "canary" for s in was)
    # The naive: an arm is drawn for each request, and a session stays where it has once met the canary.
    pinned = set()
    for _ in range(20):
        pinned |= {s for s in sessions if rng.random() < 0.1}
    assert len(pinned) / len(sessions) > 0.8


def test_a_request_that_is_over_has_no_load_whatever_others_said():
    # 2 and 10 together: counters that only one router gives back
    load, other = Load(), Load()
    for each in (load, other):
        each.add(0)
    journal, peers = Journal("a", load), Peers("b", other, PrefixIndex())
    ticket = load.dispatch(0, 1.0, 10, 0.0)
    journal.dispatched(0, ())
    for batch in journal.batches({0: "r0"}, 0.0, full=False):
        peers.receive(batch, {"r0": 0}, lambda *_: None, 0.0)
    load.finish(ticket, 1.0)
    journal.changed(0)
    journal.batches({0: "r0"}, 1.0, full=False)  # lost on the way
    assert other.requests == [1]
    for batch in journal.batches({0: "r0"}, 1.5, full=True):
        peers.receive(batch, {"r0": 0}, lambda *_: None, 1.5)
    assert other.requests == [0]


def test_a_prompt_without_blocks_goes_by_load_alone():
    fleet = Fleet()
    for _ in range(32):
        fleet.send(Prompt((), 40.0))
    assert max(fleet.sent.values()) <= 5
