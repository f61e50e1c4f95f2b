"""A record says again what the choice was: the same functions, fed from what was written down."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.blocks import Prompt
from router.core.record import chain, considered, removed, unchain
from router.core.rescore import DEFAULT, Rule, explain, fleet, held, liked
from router.core.route import Candidates, States, choose, dispatched
from router.core.score import Ranking, linear_signals, weigh
from router.core.snapshot import snapshot
from router.core.speeds import RAMP_S, Speeds
from schemas.wire.decisions import Considered, Decision, Removed
from schemas.wire.routing import Arm, Function, Policy, Replica, RoutingTable, Tenant, Weights

N = 5
FUNCTION = Function(
    name="f",
    served_name="f",
    arms=(
        Arm(
            deployment="d",
            cluster="c",
            replicas=tuple(Replica(id=f"r{i}", url=f"http://h:{i + 1}") for i in range(N)),
        ),
    ),
)
TENANT = Tenant(name="t", models=("*",))
SNAPSHOT = snapshot(
    RoutingTable(generation=1, revision="", published_at=0.0, functions=(FUNCTION,))
)
POOL = SNAPSHOT.candidates(FUNCTION, TENANT)
multiplier = st.sampled_from([0.0, 0.25, 1.0, 3.0])
weights = st.builds(
    Weights, kv_cache=multiplier, session=multiplier, load=multiplier, latency=multiplier
)
prompts = st.builds(
    lambda start, size: Prompt([start * 10_000 + i for i in range(size)], size * 64.0 + 20),
    st.integers(0, 3),
    st.integers(0, 60),
)


def decision(**more):
    base = {
        "id": "x", "at": 0.0, "router": "r", "tenant": "t", "function": "f", "operation": "chat",
        "generation": 1, "revision": "", "policy": "expected-latency", "chosen": "r0",
        "candidates": tuple(one(f"r{i}") for i in range(3)), "tokens": 1000.0, "p": 1e-4, "q": 1e-9,
    }  # fmt: skip
    return Decision(**{**base, **more})


def one(replica, **known):
    base = {
        "deployment": "d", "cluster": "c", "rtt_s": 0.002, "slow": 1.0, "factor": 1.0,
        "backlog_s": 0.0, "kv_used": 0.0, "requests": 0, "cached_tokens": 0.0,
    }  # fmt: skip
    return Considered(replica=replica, **{**base, **known})


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(prompts, st.floats(0, 2), st.booleans()), min_size=1, max_size=25),
    st.sampled_from(["expected-latency", "linear", "least-load", "round-robin"]),
    weights,
    st.none() | st.integers(0, N - 1),
)
def test_the_record_of_any_choice_likes_what_was_chosen(steps, policy, weigh_, pin):
    states, speeds, chance = States(), Speeds(), random.Random(1)
    for slot in range(N):
        states.index.add(slot, 1000, epoch=1)
        states.load.add(slot)
        speeds.add(slot, 0.0, 0.01 * slot)
    group, now = Candidates(range(N), [c.id for c in POOL]), RAMP_S
    speeds.refresh(now)
    for turn, (prompt, wait, finish) in enumerate(steps):
        now += wait
        rule = Policy(name=policy, weights=weigh_)
        seen = group.fleet(states.load, speeds, now)
        choice = choose(
            group, prompt, states, speeds, rule, now=now, chance=chance, turn=turn, pinned=pin
        )
        record = decision(
            policy=policy,
            weights=weigh_,
            chosen=POOL[choice.position].id,
            candidates=considered(POOL, seen, choice.held),
            pinned="" if pin is None else POOL[pin].id,
            turn=turn,
            tokens=prompt.tokens,
            p=seen.p,
            q=seen.q,
            chain=chain(prompt.blocks),
        )
        record = msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=Decision)
        assert record.chosen in liked(record, Rule(policy, weigh_))
        told = explain(record)
        assert {s.replica for s in told.standings} == {c.id for c in POOL}
        if told.standings[0].score is not None:
            mine = next(s for s in told.standings if s.replica == record.chosen)
            assert mine.score == pytest.approx(told.standings[0].score, abs=1e-6)
        ticket = dispatched(choice, prompt, states, speeds, now=now)
        if finish:
            states.load.finish(ticket, now)


def test_the_standings_are_the_scores_of_the_choice():
    record = decision(
        candidates=(
            one("r0", cached_tokens=640.0, backlog_s=0.3, requests=2),
            one("r1", rtt_s=0.08),
            one("r2", kv_used=0.5),
        ),
        pinned="r2",
    )
    ranking = Ranking(fleet(record), 1000.0, held(record), pinned=2)
    told = explain(record)
    assert told.price == ranking.price
    for standing in told.standings:
        i = int(standing.replica[1])
        assert standing.score == pytest.approx(ranking.score(i))
        cold = told.price * fleet(record).prefill_s(0, 1000.0)
        cost = standing.rtt_s + standing.wait_s + cold - standing.saved_s - standing.session_s
        assert cost == pytest.approx(ranking.costs_s[i])
    others = dict(told.others)
    assert others["least-load"] == ("r1", "r2")
    assert others["round-robin"] == ("r0",)
    assert others["session"] == ("r2",)
    assert "expected-latency" not in others


def test_what_would_have_been_without_a_signal():
    cached = decision(candidates=(one("r0", cached_tokens=900.0, backlog_s=0.01), one("r1")))
    others = dict(explain(cached).others)
    assert explain(cached).standings[0].replica == "r0"
    assert others["without kvCache"] == ("r1",)
    far = decision(candidates=(one("r0", rtt_s=0.2), one("r1", backlog_s=0.1)), chosen="r1")
    assert explain(far).standings[0].replica == "r1"
    assert dict(explain(far).others)["without latency"] == ("r0",)
    pinned = decision(candidates=(one("r0", rtt_s=0.1), one("r1")), pinned="r0")
    assert explain(pinned).standings[0].replica == "r0"
    assert dict(explain(pinned).others)["without session"] == ("r1",)


def test_linear_is_explained_by_its_own_signals():
    record = decision(policy="linear", candidates=(one("r0", requests=3), one("r1")), chosen="r1")
    signals = linear_signals(fleet(record), 1000.0, held(record))
    assert [s.score for s in explain(record).standings] == [
        weigh(s, DEFAULT) for s in signals[::-1]
    ]


def test_simple_policies_have_no_score_and_say_who_else_was_as_good():
    record = decision(
        policy="least-load", candidates=(one("a", requests=1), one("b"), one("c")), chosen="c"
    )
    told = explain(record)
    assert [s.score for s in told.standings] == [None] * 3
    assert told.standings[0].replica == "c"
    assert liked(record, Rule("least-load")) == ("b", "c")
    assert liked(record, Rule("random-two-choices")) == ("b", "c")
    assert liked(record, Rule("session")) == ("b", "c")
    known = msgspec.structs.replace(record, session=77)
    assert liked(known, Rule("session")) == liked(known, Rule("session"))
    assert len(liked(known, Rule("session"))) == 1


def test_what_took_each_replica_out_is_said():
    arms = (
        Arm(deployment="stable", cluster="eu", weight=90, replicas=tuple(
            Replica(id=name, url="http://h:1", state=state, max_concurrent=2)
            for name, state in [("ok", "ready"), ("drain", "draining"), ("full", "ready"),
                                ("sick", "ready"), ("tried", "ready")])),
        Arm(deployment="canary", cluster="eu", weight=10, replicas=(Replica(id="new", url="http://h:1"),)),
        Arm(deployment="off", cluster="eu", weight=0, replicas=(Replica(id="off", url="http://h:1"),)),
        Arm(deployment="dark", cluster="eu", shadow_percent=5, replicas=(Replica(id="dark", url="http://h:1"),)),
        Arm(deployment="us", cluster="us", replicas=(Replica(id="us", url="http://h:1"),)),
        Arm(deployment="own", cluster="eu", tenants=("x",), replicas=(Replica(id="own", url="http://h:1"),)),
    )  # fmt: skip
    function = Function(name="f", served_name="f", arms=arms)
    made = snapshot(
        RoutingTable(generation=1, revision="", published_at=0.0, functions=(function,))
    )
    tenant = Tenant(name="t", models=("*",), clusters=("eu",))
    pool = [c for c in made.candidates(function, tenant) if c.id == "ok"]
    why = removed(made, function, tenant, pool, {"full": 2}, tried={"tried"}, ejected={"sick"})
    assert {r.replica: r.reason for r in why} == {
        "drain": "draining",
        "full": "full: 2 requests of 2",
        "sick": "kept out after failures",
        "tried": "tried before, and failed",
        "new": "the session is on deployment stable",
        "off": "its deployment has weight 0",
        "dark": "a shadow: gets copies only",
        "us": "cluster us is not the tenant's",
        "own": "of other tenants",
    }
    assert isinstance(why[0], Removed)


@given(st.lists(st.integers(0, 2**60 - 1)))
def test_chains_keep_every_fourth_hash(blocks):
    assert list(unchain(chain(blocks))) == blocks[3::4]
