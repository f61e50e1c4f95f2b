"""What a routing decision costs, and what the rules do to a fleet.

    python tests/bench/bench_routing_core.py costs [--index-blocks 10000000]
    python tests/bench/bench_routing_core.py rules [--trace FILE] [--replicas 8] [--scale 1.0]

`costs` prints microseconds (p50 and p99 of single calls) and bytes. `rules` replays a trace (traces.py)
through a discrete-event simulation: FCFS prefill, decodes that slow it down, an LRU cache of 2,000
blocks a replica, three clusters at 2, 25 and 80 ms. The router sees what a router sees: its own
dispatches, first tokens and ends, no engine's cache.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import time
from collections import Counter, OrderedDict
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from router.core.blocks import Prompt, chain_seed, hash_blocks, read_prompt, render
from router.core.index import PrefixIndex
from router.core.route import Candidates, States, choose, dispatched
from router.core.speeds import Speeds
from schemas.wire.routing import Policy
from tests.bench import traces

POLICIES = (
    "round-robin",
    "least-load",
    "random-two-choices",
    "session",
    "linear",
    "expected-latency",
)


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def timed_us(call, rounds=2000):
    taken = []
    for _ in range(rounds):
        start = time.thread_time_ns()
        call()
        taken.append((time.thread_time_ns() - start) / 1000)
    return taken


def line(name, taken):
    print(f"{name:<58}{percentile(taken, 0.5):8.1f}{percentile(taken, 0.99):8.1f}")


def resident_bytes():
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith("VmRSS"):
            return int(text.split()[1]) * 1024
    return 0


def costs(index_blocks):
    rng = random.Random(1)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(999)
    ]
    text = " ".join(rng.choices(words, k=8000))
    messages = [{"role": "system", "content": text[:8000]}]
    messages += [
        {"role": "user" if i % 2 == 0 else "assistant", "content": text[8000 + i * 1000 :][:1000]}
        for i in range(24)
    ]
    request = {"model": "m", "messages": messages}
    data = render(request)
    seed = chain_seed("m")
    print(f"{'us, one call':<58}{'p50':>8}{'p99':>8}")
    print(f"prompt of {len(data)} bytes in {len(messages)} messages")
    line("  render", timed_us(lambda: render(request)))
    line("  hash", timed_us(lambda: hash_blocks(data, seed)))
    line("  render and hash", timed_us(lambda: read_prompt(request, seed)))

    replicas = 256
    before = resident_bytes()
    states, speeds = States(PrefixIndex(max_blocks=index_blocks)), Speeds()
    slots = list(range(replicas))
    for slot in slots:
        states.index.add(slot, capacity_blocks=index_blocks)
        states.load.add(slot)
        speeds.add(slot, -100.0, rng.choice((0.002, 0.025, 0.08)))
    start = time.perf_counter()
    prompts = []
    shared = [rng.getrandbits(60) for _ in range(32)]
    while len(states.index) < index_blocks:
        blocks = shared + [rng.getrandbits(60) for _ in range(96)]
        states.index.insert(rng.randrange(replicas), blocks)
        if rng.random() < 0.02:
            # A conversation that went on elsewhere: the next turn is another replica's too.
            states.index.insert(rng.randrange(replicas), blocks[: rng.randrange(40, 128)])
            prompts.append(blocks)
    filled = time.perf_counter() - start
    size = resident_bytes() - before
    count = len(states.index)
    print(
        f"index of {count} blocks: {size / 2**20:.0f} MiB, {size / count:.0f} bytes a block, "
        f"{filled / count * 1e6:.2f} us a block to insert"
    )
    for i in range(replicas):
        for _ in range(rng.randrange(3)):
            states.load.dispatch(i, rng.random(), 4000, rng.random())
    candidates = Candidates(slots, [f"r{i}" for i in slots])
    policy = Policy()
    asked = iter(rng.choices(prompts, k=200_000))
    line("match, 128 blocks, cold", timed_us(lambda: states.index.match(next(asked))))
    line("match, hot", timed_us(lambda: states.index.match(prompts[0])))

    def decide(blocks, name):
        prompt = Prompt(blocks, 128 * 64 + 30)
        return lambda: choose(
            candidates, prompt, states, speeds, name, now=1.0, chance=rng, pinned=3, turn=1
        )

    for policy in (Policy(), *(Policy(name=name) for name in POLICIES[:-1])):
        line(
            f"choose among {replicas}, {policy.name}: look-up and score, cold",
            timed_us(lambda p=policy: decide(next(asked), p)()),
        )
    few = [rng.getrandbits(60) for _ in range(128)]
    for slot in range(5):
        states.index.insert(slot, few)
    line("choose, 5 holders", timed_us(decide(few, Policy())))
    choice = decide(few, Policy())()

    def through():
        ticket = dispatched(choice, Prompt(few, 8222), states, speeds, now=1.0)
        states.load.first_token(ticket, 1.1)
        states.load.finish(ticket, 1.2)

    line("dispatched, first token, finish", timed_us(through))


# The rules


def sessions_of(rows):
    """A session name for each row: that of the row whose prompt this one continues."""
    last, seen, names, count = {}, set(), [], 0
    for _, _, _, blocks in rows:
        found = None
        for block in reversed(blocks):
            found = last.get(block)
            if found is not None:
                break
        if found is None:
            count += 1
            found = count
        if blocks and blocks[-1] not in seen:
            last[blocks[-1]] = found
        seen.update(blocks)
        names.append(found)
    return names


class Engine:
    """FCFS prefill with an LRU cache of blocks; each running decode slows prefill a little."""

    def __init__(self, speed=12_500.0, attention=32_768.0, capacity=2000):
        self.speed, self.attention, self.capacity = speed, attention, capacity
        self.cache = OrderedDict()
        self.free_at = 0.0
        self.decoding = []

    def hit_blocks(self, blocks):
        depth = 0
        for block in blocks:
            if block not in self.cache:
                break
            depth += 1
        return depth

    def serve(self, at, tokens, blocks, answer):
        """(blocks hit, first token at, done at) of a request that arrives now."""
        start = max(at, self.free_at)
        hit = self.hit_blocks(blocks)
        h = min(hit * 512, tokens - 1)
        while self.decoding and self.decoding[0] <= start:
            heapq.heappop(self.decoding)
        slowdown = 1 + len(self.decoding) / 64
        work = ((tokens - h) + (tokens**2 - h**2) / (2 * self.attention)) / self.speed
        first = start + work * slowdown + 0.02
        self.free_at = first
        done = first + answer * 0.02 * slowdown
        heapq.heappush(self.decoding, done)
        for block in reversed(blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.capacity:
            self.cache.popitem(last=False)
        return hit, first, done


def replay(rows, names, policy, replicas, scale, index_capacity=2000, seed=5):
    rng = random.Random(seed)
    states, speeds = States(PrefixIndex()), Speeds()
    engines = [Engine() for _ in range(replicas)]
    rtts = [(0.002, 0.025, 0.08)[i * 3 // replicas] for i in range(replicas)]
    for i in range(replicas):
        states.index.add(i, capacity_blocks=index_capacity)
        states.load.add(i)
        speeds.add(i, -1e9, rtts[i])
    candidates = Candidates(range(replicas), [f"replica-{i}" for i in range(replicas)])
    events, order = [], 0
    pins, ttfts, hits, total, predicted = {}, [], 0, 0, 0
    work = Counter()
    refreshed = 0.0
    chosen_policy = Policy(name=policy)
    for turn, ((at, tokens, answer, blocks), name) in enumerate(zip(rows, names, strict=True)):
        now = at / 1000 / scale
        while events and events[0][0] <= now:
            when, _, kind, ticket, sample = heapq.heappop(events)
            if kind == "first":
                at_front = states.load.first_token(ticket, when)
                if at_front is not None:
                    speeds.learn(ticket.slot, *sample, at_front)
            else:
                states.load.finish(ticket, when)
        if now - refreshed > 1:
            refreshed = now
            speeds.refresh(now)
        prompt = Prompt(blocks, float(tokens), 512.0)
        choice = choose(
            candidates, prompt, states, speeds, chosen_policy,
            now=now, chance=rng, turn=turn, session=name * 0x9E3779B97F4A7C15 & (1 << 64) - 1,
            pinned=pins.get(name),
        )  # fmt: skip
        pins[name] = choice.slot
        ticket = dispatched(choice, prompt, states, speeds, now=now)
        rtt = rtts[choice.slot]
        hit, first, done = engines[choice.slot].serve(now + rtt / 2, tokens, blocks, answer)
        sample = (min(hit * 512, tokens - 1), tokens)
        for when, kind in ((first + rtt / 2, "first"), (done + rtt / 2, "done")):
            order += 1
            heapq.heappush(events, (when, order, kind, ticket, sample))
        ttfts.append(first + rtt / 2 - now)
        hits += hit * 512
        predicted += choice.hit_blocks * 512
        total += tokens
        work[choice.slot] += tokens - sample[0]
    hotspot = max(work.values()) / (sum(work.values()) / replicas)
    return {
        "hit": 100 * hits / total,
        "predicted": 100 * predicted / total,
        "mean": mean(ttfts),
        **{f"p{int(s * 100)}": percentile(ttfts, s) for s in (0.5, 0.95, 0.99)},
        "hotspot": hotspot,
    }


def rules(trace, replicas, scale, policies=POLICIES):
    rows = [
        (r.at_s * 1000, r.tokens, r.answer, r.blocks[: r.tokens // traces.BLOCK_TOKENS])
        for r in traces.load(trace)
    ]
    names = sessions_of(rows)
    seen, held = set(), 0
    for _, _, _, blocks in rows:
        for block in blocks:
            if block not in seen:
                break
            held += 512
        seen.update(blocks)
    tokens = sum(row[1] for row in rows)
    print(
        f"{len(rows)} requests, {tokens / len(rows):.0f} tokens in on average, {len(set(names))} sessions, "
        f"oracle hit {100 * held / tokens:.1f} %; x{scale}, {replicas} replicas"
    )
    print(
        f"{'':<20}{'hit %':>8}{'thought':>8}{'mean s':>9}{'p50':>8}{'p95':>8}{'p99':>8}{'hotspot':>9}"
    )
    for policy in policies:
        r = replay(rows, names, policy, replicas, scale)
        print(
            f"{policy:<20}{r['hit']:8.1f}{r['predicted']:8.1f}{r['mean']:9.2f}{r['p50']:8.2f}"
            f"{r['p95']:8.2f}{r['p99']:8.2f}{r['hotspot']:9.2f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("costs", "rules"))
    parser.add_argument("--index-blocks", type=int, default=1_000_000)
    parser.add_argument("--trace", default="agents", help="a file, or a made-up one's name")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="how many times faster than recorded"
    )
    given = parser.parse_args()
    if given.what == "costs":
        costs(given.index_blocks)
    else:
        rules(given.trace, given.replicas, given.scale)


if __name__ == "__main__":
    main()
