"""Where routers send what, side by side: `python tests/bench/bench_routing.py [--trace FILE]`.

Replays a trace (a file in Mooncake's format, or a made-up one) over HTTP through our router, the SGLang
router and vllm-router, each as one process and as four, before the same modelled engines: eight, in
three clusters at 2, 25 and 80 ms. Fresh engines and a fresh router for every run. Prints Markdown: hit
rate as the engines saw it beside that of one pooled cache, time to the first token in the engines'
seconds, the hotspot factor (work of the busiest engine over the mean), errors. Loads are shares of
what the fleet could compute if it cached nothing. Engines' time runs --speed times faster than ours,
so what a router itself takes weighs as much more. A peer that cannot be had is named, and the others
go on. Asserts nothing. Some half an hour; --quick takes three minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import msgspec

from schemas.wire.routing import Arm, Cluster, Function, Policy, Replica
from tests.behaviour.router.harness import KEY, routing_table
from tests.bench import traces
from tests.bench.bench_router import PEERS, REPO, Target, installed, process, ready

ENGINES: Final = 8
RTTS_S: Final = (0.002, 0.025, 0.08)
PREFILL: Final = 12_500.0
"""Characters a second of an engine; a trace's token is a character here."""
CACHE_TOKENS: Final = 1_024_000
"""Of an engine."""
HARD_TRACES: Final = ("unrelated", "short")
"""Where caches help nobody: ours must not be worse than least-load there."""


@dataclass(frozen=True)
class Kind:
    """A router as it is started."""

    name: str
    package: str = ""
    """Of a peer; empty: ours."""
    policy: str = "cache_aware"
    processes: int = 1


OURS: Final = Kind("DetoServe", policy="expected-latency")
OURS_LEAST: Final = Kind("DetoServe, least-load", policy="least-load")
SGLANG: Final = Kind("SGLang cache_aware", "sglang-router")
VLLM: Final = Kind("vllm-router cache_aware", "vllm-router")
ALL: Final = {
    "ours": OURS,
    "least-load": OURS_LEAST,
    "round-robin": Kind("DetoServe, round-robin", policy="round-robin"),
    "linear": Kind("DetoServe, linear", policy="linear"),
    "sglang": SGLANG,
    "sglang-rr": Kind("SGLang round_robin", "sglang-router", "round_robin"),
    "sglang-p2": Kind("SGLang power_of_two", "sglang-router", "power_of_two"),
    "vllm": VLLM,
    "vllm-p2": Kind("vllm-router power_of_two", "vllm-router", "power_of_two"),
}


def table_of(engines: list[str], policy: str, speed: float) -> bytes:
    """Ours: the fleet as a reconciler would publish it, in three clusters."""
    clusters = [f"c{i}" for i in range(len(RTTS_S))]
    where = [clusters[i * len(RTTS_S) // len(engines)] for i in range(len(engines))]
    arms = tuple(
        Arm(
            deployment=f"sim-{cluster}",
            cluster=cluster,
            replicas=tuple(
                Replica(id=f"sim-r{i}", url=url)
                for i, url in enumerate(engines)
                if where[i] == cluster
            ),
        )
        for cluster in clusters
    )
    served = Function(name="sim", served_name="sim", policy=Policy(name=policy), arms=arms)
    # The engines' clocks are faster than ours, and the way to them with them.
    known = tuple(
        Cluster(name=name, rtt_s=rtt_s / speed)
        for name, rtt_s in zip(clusters, RTTS_S, strict=True)
    )
    return msgspec.msgpack.encode(routing_table(served, clusters=known))


@contextlib.contextmanager
def running(kind: Kind, engines: list[str], speed: float, folder: Path) -> Iterator[list[Target]]:
    """The router's processes, ready.

    Raises:
        RuntimeError: it cannot be had, or does not answer.
    """
    with contextlib.ExitStack() as stack:
        if not kind.package:
            routes = folder / "routes.msgpack"
            routes.write_bytes(table_of(engines, kind.policy, speed))
            flags = f"--port 0 --admin-port 0 --routes {routes} --log-level warning"
            command = [sys.executable, "-m", "router", *flags.split()]
            command.append(f"--workers={kind.processes}")
            one = stack.enter_context(process(command, folder / "detoserve.log"))
            said = one.stdout.readline()
            if not said:
                raise RuntimeError((folder / "detoserve.log").read_text()[-500:])
            yield [Target(kind.name, json.loads(said)["url"], KEY.text, one)]
            return
        program = installed(kind.package, dict(PEERS.values())[kind.package])
        out = []
        ports = free_ports(2 * kind.processes)
        for number in range(kind.processes):
            port = ports.pop()
            launch = ["launch"] if kind.package == "sglang-router" else []
            flags = f"--host 127.0.0.1 --port {port} --policy {kind.policy} --log-level error"
            flags += f" --prometheus-port {ports.pop()} --worker-urls"
            log = folder / f"{kind.package}-{number}.log"
            command = [str(program), *launch, *flags.split(), *engines]
            one = stack.enter_context(process(command, log))
            out.append(Target(kind.name, f"http://127.0.0.1:{port}", process=one))
        for target in out:
            if not ready(target):
                raise RuntimeError(f"{kind.package} does not answer: {log.read_text()[-500:]}")
        yield out


def free_ports(count: int) -> list[int]:
    """All different: each is held until all are found."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def stats(url: str, method: str = "GET") -> dict[str, float]:
    request = urllib.request.Request(f"{url}/stats", method=method)
    with urllib.request.urlopen(request, timeout=10) as response:
        return dict(json.load(response))


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@dataclass
class Run:
    """What one run showed; times are the engines'."""

    hit: float
    mean_s: float
    quantiles_s: tuple[float, float, float]
    hotspot: float
    errors: dict[str, int]
    late_s: float

    def row(self, name: str) -> str:
        p50, p95, p99 = self.quantiles_s
        errors = ", ".join(f"{n} {why}" for why, n in self.errors.items()) or "0"
        return (
            f"| {name} | {100 * self.hit:.1f} | {self.mean_s:.2f} | {p50:.2f} | {p95:.2f} "
            f"| {p99:.2f} | {self.hotspot:.2f} | {errors} |"
        )


def measure(kind: Kind, trace: str, pace: float, given: argparse.Namespace) -> Run:
    """One run with everything fresh.

    Raises:
        RuntimeError: as `running` says.
    """
    speed = given.speed
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, str(REPO / "tests/bench/modelled_engines.py")]
        command += [f"--count={ENGINES}", f"--rtts={','.join(map(str, RTTS_S))}"]
        command += [f"--blocks={CACHE_TOKENS // 128}", f"--prefill={PREFILL}", f"--speed={speed}"]
        command.append(f"--attention={given.attention}")
        fleet = stack.enter_context(process(command, folder / "engines.log"))
        engines = json.loads(fleet.stdout.readline())["urls"]
        routers = stack.enter_context(running(kind, engines, speed, folder))
        for url in engines:
            stats(url, "DELETE")
        command = [sys.executable, str(REPO / "tests/bench/http_replay.py")]
        command += [f"--urls={','.join(r.url for r in routers)}", f"--key={routers[0].key}"]
        command += [f"--trace={trace}", f"--requests={given.requests}", f"--pace={pace * speed}"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(ran.stderr[-500:])
        seen: dict[str, Any] = json.loads(ran.stdout)
        each = [stats(url) for url in engines]
    ttfts = [speed * ttft_s for ttft_s in seen["ttft_s"]]
    work = [e["work_s"] for e in each]
    return Run(
        sum(e["hit"] for e in each) / max(1, sum(e["seen"] for e in each)),
        sum(ttfts) / max(1, len(ttfts)),
        (quantile(ttfts, 0.5), quantile(ttfts, 0.95), quantile(ttfts, 0.99)),
        max(work) * len(work) / max(1e-9, sum(work)),
        seen["errors"],
        seen["late_s"],
    )


def compare(trace: str, load: float, kinds: list[Kind], given: argparse.Namespace) -> None:
    """Prints a table of all routers over one trace at one load."""
    requests = traces.load(trace)[: given.requests]
    took_s = max(1e-9, requests[-1].at_s - requests[0].at_s)
    offered = sum(request.tokens for request in requests) / took_s / (ENGINES * PREFILL)
    pace = load / offered
    pooled = traces.pooled_hit(requests, ENGINES * CACHE_TOKENS // traces.BLOCK_TOKENS)
    name = trace if trace in traces.MADE_UP else Path(trace).name
    print(
        f"\n### {name}, load {load:g}: {len(requests)} requests, {pace:.2f} times the trace's pace; "
        f"a pooled cache would hit {100 * pooled:.1f} %\n"
    )
    print("| router | hit % | TTFT mean, s | p50 | p95 | p99 | hotspot | errors |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    late_s = 0.0
    for kind in kinds:
        label = kind.name + (f", {kind.processes} processes" if kind.processes > 1 else "")
        try:
            run = measure(kind, trace, pace, given)
        except RuntimeError as error:
            print(f"MISSING: {label} is not measured: {error}", file=sys.stderr)
            continue
        late_s = max(late_s, run.late_s)
        print(run.row(label), flush=True)
    if late_s > 0.05:
        print(f"\nThe client was late by up to {late_s * given.speed:.1f} s of the engines' time.")


def main(given: argparse.Namespace) -> None:
    chosen = [ALL[name] for name in given.routers.split(",")]
    began = os.getloadavg()[0]
    for load in (float(text) for text in given.loads.split(",")):
        kinds = list(chosen)
        if 4 in given.processes:
            kinds += [replace(kind, processes=4) for kind in chosen]
        if 1 not in given.processes:
            kinds = kinds[len(chosen) :]
        compare(given.trace, load, kinds, given)
    if not given.only:
        for trace, load in (*((t, 0.7) for t in HARD_TRACES), (given.trace, 0.05)):
            compare(trace, load, [OURS, OURS_LEAST], given)
    print(
        f"\n{ENGINES} modelled engines, {PREFILL:,.0f} characters a second, {CACHE_TOKENS:,} cached; "
        f"their time runs {given.speed:g} times faster than ours. {os.cpu_count()} cores shared by "
        f"routers, engines and client; load average {began:.1f} before and {os.getloadavg()[0]:.1f} after."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", default="conversations", help="a file, or a made-up one's name")
    parser.add_argument("--loads", default="0.6,0.9,1.2")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--routers", default="ours,sglang,vllm,sglang-p2", help=", ".join(ALL))
    parser.add_argument(
        "--processes", type=lambda t: [int(n) for n in t.split(",")], default=[1, 4]
    )
    parser.add_argument("--speed", type=float, default=5.0)
    parser.add_argument("--attention", type=float, default=0.0, help="of modelled_engines.py")
    parser.add_argument("--only", action="store_true", help="only the trace, not the hard cases")
    parser.add_argument(
        "--quick", action="store_true", help="one load, 400 requests, no hard cases"
    )
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.loads, chosen.requests, chosen.only = "1.0", 400, True
    main(chosen)
