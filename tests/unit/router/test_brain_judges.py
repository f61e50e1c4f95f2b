"""What becomes of an engine's word about a prompt: credit, size, and forgetting."""

from __future__ import annotations

import random
import time

from router.core.blocks import Prompt, chain_seed, hash_blocks
from router.core.snapshot import snapshot
from router.fleet.brain import Brain, Sent
from schemas.wire.events import EngineReport
from schemas.wire.routing import Arm, Function, Policy, Replica, RoutingTable

FUNCTION = Function(
    name="f",
    served_name="f",
    policy=Policy(name="expected-latency"),
    arms=(
        Arm(
            deployment="d",
            cluster="here",
            replicas=tuple(Replica(id=f"r{i}", url=f"http://127.0.0.1:{i + 1}") for i in range(2)),
        ),
    ),
)


class Asker:
    def __init__(self) -> None:
        table = RoutingTable(generation=1, revision="r", published_at=1.0, functions=(FUNCTION,))
        self.snapshot = snapshot(table)
        self.brain = Brain(100_000)
        self.brain.installed(self.snapshot)
        self.chance = random.Random(1)

    def send(self, prompt: Prompt) -> tuple[str, Sent]:
        pool = tuple(self.snapshot.replicas.values())
        candidate, sent = self.brain.choose(pool, FUNCTION, prompt, self.chance)
        sent.begin()
        sent.finish()
        return candidate.id, sent

    def held(self, replica: str) -> int:
        return self.brain.states.index.held(self.brain.slots[replica])

    def factor(self, replica: str) -> float:
        return self.brain.states.trust.factors.get(self.brain.slots[replica], 1.0)


def prompt(text: str, size: int = 64_000) -> Prompt:
    data = (text * size)[:size].encode()
    return Prompt(hash_blocks(data, chain_seed("f")), size / 4)


def test_an_engine_that_has_less_is_believed_less() -> None:
    asker = Asker()
    _, sent = asker.send(prompt("first"))
    sent.used(16_000, 15_000)  # these engines say what they have
    replica, _ = asker.send(prompt("a"))
    for _ in range(20):
        again, sent = asker.send(prompt("a"))
        assert again == replica
        sent.used(16_000, 8_000)
        if asker.factor(replica) < 0.7:
            break
    assert asker.factor(replica) < 0.7


def test_an_engine_that_has_nothing_any_more_is_taken_for_empty() -> None:
    asker = Asker()
    replica, sent = asker.send(prompt("first"))
    sent.used(16_000, 15_000)
    for _ in range(4):
        _, sent = asker.send(prompt("first"))
    asker.brain.states.index.insert(asker.brain.slots[replica], prompt("another").blocks)
    before = asker.held(replica)
    for _ in range(3):
        again, sent = asker.send(prompt("first"))
        if again == replica:
            sent.used(16_000, 0)
    assert asker.held(replica) < before
    assert asker.factor(replica) == 1.0  # the next process is not to blame
    # What it has just been sent it has.
    slot = asker.brain.slots[replica]
    found = asker.brain.states.index.match(prompt("first").blocks)
    assert [depth for depth, slots in found if slot in slots] == [250]


def test_engines_that_never_say_are_not_judged() -> None:
    asker = Asker()
    for _ in range(10):
        replica, sent = asker.send(prompt("first"))
        sent.used(16_000, 0)
    assert asker.held(replica) == 250
    assert asker.factor(replica) == 1.0


def test_a_reported_size_is_not_guessed_at() -> None:
    asker = Asker()
    slot = asker.brain.slots["r0"]
    report = EngineReport(
        replica="r0", at=time.time(), epoch=1, capacity_blocks=1000, block_tokens=64
    )
    assert asker.brain.heard(report) == ""
    assert asker.brain.heard(report) != ""
    for _ in range(30):
        _, sent = asker.send(prompt("first"))
        sent.used(16_000, 4_000)
    asker.brain._refresh(asker.brain.now())
    assert asker.brain.states.index.capacity(slot) == 1000
    assert asker.brain.heard(EngineReport(replica="nobody", at=time.time())) == "no such replica"
