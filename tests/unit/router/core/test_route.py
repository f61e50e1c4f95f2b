from __future__ import annotations

import random

import pytest

from router.core.blocks import Prompt, chain_seed, read_prompt, uncached_prompt
from router.core.route import Candidates, States, choose, dispatched, hit_tokens
from router.core.speeds import RAMP_S, Speeds
from schemas.wire.routing import Policy, Weights

POLICIES = (
    "expected-latency", "linear", "least-load", "session", "round-robin", "random-two-choices",
)  # fmt: skip

DEFAULT = Weights()


class Router:
    """One function's replicas, and requests that come to an end when the test says so."""

    def __init__(self, replicas=4, policy="expected-latency", weights=DEFAULT, rtt_s=None):
        self.states, self.speeds, self.chance = States(), Speeds(), random.Random(1)
        self.policy = Policy(name=policy, weights=weights)
        for slot in range(replicas):
            self.states.index.add(slot, 1000, epoch=1)
            self.states.load.add(slot)
            self.speeds.add(slot, 0.0, (rtt_s or {}).get(slot, 0.002))
        self.now = RAMP_S
        self.speeds.refresh(self.now)
        self.candidates = Candidates(range(replicas), [f"r{i}" for i in range(replicas)])
        self.turn = 0

    def choose(self, prompt, **given):
        self.turn += 1
        return choose(
            given.pop("candidates", self.candidates), prompt, self.states, self.speeds, self.policy,
            now=self.now, chance=self.chance, turn=self.turn, **given,
        )  # fmt: skip

    def send(self, prompt, *, finish=True, **given):
        choice = self.choose(prompt, **given)
        ticket = dispatched(choice, prompt, self.states, self.speeds, now=self.now)
        if finish:
            self.states.load.finish(ticket, self.now)
        return choice


def asked(*texts, salt=""):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return read_prompt({"messages": messages}, chain_seed("m", salt))


def text(letter, size=8000):
    return letter * size


@pytest.mark.parametrize("count", [4, 100])
def test_a_conversation_comes_back_to_its_replica(count):
    router = Router(count)
    first = router.send(asked(text("a")))
    for other in "bcdefgh":
        router.send(asked(text(other)))
    again = router.send(asked(text("a"), text("x", 500), text("y", 500)))
    assert again.slot == first.slot
    assert again.hit_blocks == (8000 + 6) // 256
    assert again.hit_tokens == again.hit_blocks * 64


def test_other_tenants_see_nothing_of_it():
    router = Router()
    router.send(asked(text("a"), salt="one"))
    assert router.send(asked(text("a"), salt="two")).hit_blocks == 0
    assert router.send(asked(text("a"), salt="one")).hit_blocks > 0


def test_of_many_that_hold_a_beginning_the_one_that_holds_the_end_is_chosen():
    router = Router(100)
    begun = text("a")
    for slot in range(0, 100, 3):
        router.states.index.insert(slot, asked(begun).blocks)
    once = [router.send(asked(begun, text(letter))) for letter in "bcd"]
    for before, letter in zip(once, "bcd", strict=True):
        again = router.send(asked(begun, text(letter), text("e", 500)))
        assert again.slot == before.slot
        assert again.hit_blocks > before.hit_blocks


def test_a_hot_prompt_spreads_by_the_price_of_load():
    router = Router(8)
    slots = [
        router.send(asked(text("a"), text(str(i), 6000)), finish=False).slot for i in range(64)
    ]
    counts = [slots.count(slot) for slot in range(8)]
    assert min(counts) >= 4
    assert max(counts) <= 16


def test_after_a_restart_the_replica_is_credited_with_nothing():
    router = Router()
    first = router.send(asked(text("a")))
    router.states.index.set_epoch(first.slot, 2)
    assert router.choose(asked(text("a"))).hit_blocks == 0


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_chooses_a_candidate_and_reports_it(name):
    router = Router(6, name)
    some = Candidates((1, 3, 4), ("r1", "r3", "r4"))
    seen = set()
    for i in range(60):
        choice = router.send(
            asked(text(str(i))), candidates=some, session=i * 0x9E3779B97F4A7C15, finish=i % 2 == 0
        )
        assert some.slots[choice.position] == choice.slot
        seen.add(choice.slot)
    assert seen == {1, 3, 4}
    alone = router.choose(
        asked(text("z")), candidates=Candidates((4,), ("r4",)), session=1, pinned=2
    )
    assert alone.slot == 4


def test_replicas_that_hold_it_but_are_no_candidates_do_not_count():
    router = Router(6)
    holder = router.send(asked(text("a"))).slot
    others = [slot for slot in range(6) if slot != holder]
    choice = router.choose(
        asked(text("a")), candidates=Candidates(others, [f"r{i}" for i in others]), pinned=holder
    )
    assert choice.slot != holder
    assert (choice.hit_blocks, choice.held) == (0, [])


def test_near_replicas_come_first_while_they_are_idle():
    router = Router(4, rtt_s={0: 0.08, 1: 0.08, 2: 0.08})
    assert router.send(asked(text("a")), finish=False).slot == 3
    assert router.send(asked(text("b")), finish=False).slot != 3


def test_operators_weights_are_multipliers():
    prompt = asked(text("a"))
    for weights, stays in ((DEFAULT, True), (Weights(kv_cache=0.0), False)):
        router = Router(2, weights=weights)
        holder = router.send(prompt).slot
        # 0.3 s of other work there: less than the cache saves, more than nothing.
        router.states.load.dispatch(holder, 0.3, 0, router.now)
        assert (router.choose(prompt).slot == holder) is stays


def test_session_policy_stays_and_moves_when_the_replica_goes():
    router = Router(6, "session")
    session = 0x1234567890ABCDEF
    own = router.choose(uncached_prompt(100), session=session).slot
    assert {router.choose(uncached_prompt(100), session=session).slot for _ in range(9)} == {own}
    assert (
        router.choose(uncached_prompt(100), session=session, pinned=(own + 1) % 6).slot
        == (own + 1) % 6
    )
    left = [slot for slot in range(6) if slot != own]
    moved = router.choose(
        uncached_prompt(100), session=session, pinned=own,
        candidates=Candidates(left, [f"r{i}" for i in left]),
    )  # fmt: skip
    assert moved.slot != own


def test_the_last_token_is_always_computed():
    assert hit_tokens(Prompt([1, 2], 128.0), 2) == 127
    assert hit_tokens(Prompt([1, 2], 140.0), 2) == 128
    assert hit_tokens(Prompt([], 0.0), 0) == 0


def test_choosing_changes_nothing():
    router = Router()
    prompt = asked(text("a"))
    for _ in range(3):
        assert router.choose(prompt).hit_blocks == 0
    assert router.states.load.requests == [0] * 4
    assert len(router.states.index) == 0


def test_a_cache_that_does_not_come_true_is_worth_less():
    router = Router()
    prompt = asked(text("a", 64_000))
    home = router.send(prompt).slot
    router.states.load.dispatch(home, 3.0, 1000, router.now)  # worth waiting for, if it is true
    before = router.choose(prompt)
    assert before.slot == home
    for _ in range(50):
        router.states.trust.learn(home, 16_000, 800)
    after = router.choose(prompt)
    assert after.slot != home
    mine = router.candidates.position[home]
    (credited,) = [tokens for tokens, positions in after.held if mine in positions]
    assert 0 < credited < 0.3 * before.hit_tokens
    for _ in range(200):
        router.states.trust.learn(home, 16_000, 16_000)
    assert router.choose(prompt).slot == home


def test_work_is_counted_as_much_as_comes_true():
    router = Router(replicas=1)
    prompt = asked(text("a", 64_000))
    router.send(prompt)
    whole = router.choose(prompt)
    for _ in range(50):
        router.states.trust.learn(0, 16_000, 1)
    doubted = router.choose(prompt)
    assert doubted.hit_blocks == whole.hit_blocks  # what is thought, by which the engine is judged
    assert doubted.hit_tokens < 0.2 * whole.hit_tokens
