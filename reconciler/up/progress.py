"""What a person or a script sees of `detoserve up`. Not here: what happens (run)."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from reconciler.core.action import Noop
from reconciler.core.observed import Observation, Phase
from reconciler.core.status import World


@dataclass(frozen=True, slots=True)
class DeploymentLine:
    """One deployment at a glance."""

    name: str
    function: str
    wanted: int
    ready: int
    updated: int
    """Ready ones that run the newest spec."""
    live: bool
    """Every router serves its newest arm, with all replicas wanted, and nothing else runs."""
    detail: str = ""
    acted_on: bool = True
    """A backend of this reconciler runs it."""


def deployment_lines(world: World) -> dict[str, DeploymentLine]:
    """Every deployment of the repo that has a workload, by name."""
    observed = {
        name: current
        for o in world.observed
        if isinstance(o, Observation)
        for name, current in o.workloads.items()
    }
    held = {a.name: a.reason for a in world.plan.actions if isinstance(a, Noop) and a.held}
    backends = {o.backend for o in world.observed}
    lines = {}
    for workload in world.desired.workloads.values():
        if workload.arm:
            continue  # the second one of a roll, of which status tells
        current = observed.get(workload.name)
        replicas = current.replicas if current else ()
        up = [r for r in replicas if r.phase in (Phase.READY, Phase.RUNNING, Phase.SUCCEEDED)]
        fresh = [r for r in up if r.spec_digest == workload.spec_digest]
        sick = [r.detail for r in replicas if r.phase is Phase.FAILED and r.detail]
        detail = world.failures.get(workload.name) or held.get(workload.name) or ""
        if not detail and sick:
            detail = sick[0]
        lines[workload.deployment] = DeploymentLine(
            name=workload.deployment,
            function=workload.function,
            wanted=workload.replicas,
            ready=len(up),
            updated=len(fresh),
            live=len(fresh) == len(replicas) == workload.replicas
            and bool(world.routing.routers)
            and not world.routing.behind(workload.deployment),
            detail=detail,
            acted_on=workload.backend in backends,
        )
    return lines


def all_live(world: World) -> bool:
    """Also where there is nothing to run: an empty repo is up as soon as its router is."""
    return all(line.live for line in deployment_lines(world).values() if line.acted_on)


@dataclass(frozen=True, slots=True)
class Ready:
    """All that a first request needs."""

    endpoint: str
    api_key: str | None
    model: str | None
    config_repo: str
    config_path: str
    state_dir: str
    admin: str

    @property
    def curl(self) -> str:
        """A line to paste; the key is left to its owner where `up` did not make one."""
        key = self.api_key or "$DETOSERVE_API_KEY"
        body = {
            "model": self.model or "MODEL",
            "messages": [{"role": "user", "content": "Hello!"}],
            "stream": True,
        }
        return (
            f"curl -N {self.endpoint}/chat/completions "
            f'-H "Authorization: Bearer {key}" -H "Content-Type: application/json" '
            f"-d {shlex.quote(json.dumps(body))}"
        )


class Screen(Protocol):
    """Where `up` says what it does."""

    def step(self, text: str) -> None: ...
    def world(self, world: World) -> None: ...
    def ready(self, ready: Ready) -> None: ...
    def warn(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class News:
    """What differs between two worlds, in the order in which it is told."""

    revision: str | None
    problems: tuple[str, ...]
    deployments: tuple[DeploymentLine, ...]
    gone: tuple[str, ...]


class _Follower:
    """Tells what is new in each world it is shown."""

    def __init__(self) -> None:
        self._lines: Mapping[str, DeploymentLine] = {}
        self._revision = ""
        self._problems: tuple[str, ...] = ()

    def news(self, world: World) -> News:
        problems = tuple(str(p) for p in world.effective.problems) + world.plan.refusals
        if world.source_problem:
            problems += (world.source_problem,)
        lines = deployment_lines(world)
        revision = world.effective.revision
        news = News(
            revision if revision != self._revision else None,
            tuple(p for p in problems if p not in self._problems),
            tuple(line for name, line in lines.items() if line != self._lines.get(name)),
            tuple(sorted(self._lines.keys() - lines.keys())),
        )
        self._lines, self._revision, self._problems = lines, revision, problems
        return news


class TextScreen:
    """Lines for people: a step each, then one line for each change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._follower = _Follower()

    def _line(self, mark: str, text: str, style: str) -> None:
        seconds = time.monotonic() - self._started
        line = Text.assemble(
            (f"{seconds:7.1f}s ", "dim"), (f"{mark} ", style), Text(text, overflow="fold")
        )
        self._console.print(line, soft_wrap=True)

    def step(self, text: str) -> None:
        self._line("✓", text, "green")

    def warn(self, text: str) -> None:
        self._line("!", text, "yellow")

    def world(self, world: World) -> None:
        news = self._follower.news(world)
        if news.revision:
            self._line("→", f"config at {news.revision[:12]}", "cyan")
        for problem in news.problems:
            self.warn(problem)
        for line in news.deployments:
            self._deployment(line)
        for name in news.gone:
            self._line("•", f"{name}: gone", "magenta")

    def _deployment(self, line: DeploymentLine) -> None:
        count = f"{line.name}: {line.updated}/{line.wanted} replicas ready"
        if line.ready > line.updated:
            count += f", {line.ready - line.updated} of the spec before"
        if line.live:
            self._line("✓", f"{count}, live", "green")
        else:
            self._line("•", count + (f": {line.detail}" if line.detail else ""), "blue")

    def ready(self, ready: Ready) -> None:
        rows = {
            "endpoint": Text(ready.endpoint, "bold"),
            "api key": Text(ready.api_key or "not made here: see detoserve keys create --help"),
            "config": Text(f"{ready.config_repo} ({ready.config_path or 'its root'})"),
            "logs": Text(f"{ready.state_dir}/logs"),
            "metrics": Text(f"{ready.admin}/metrics"),
        }
        table = Text("\n", overflow="fold").join(
            Text.assemble((f"{name:10}", "dim"), value) for name, value in rows.items()
        )
        self._console.print(Panel(table, title="DetoServe is up", title_align="left"))
        self._console.print(Text("Try it:", "dim"))
        # Whole, without a frame, so that it can be copied.
        self._console.print(Text(ready.curl), soft_wrap=True)
        place = Path(ready.config_repo) / ready.config_path
        self._console.print(
            Text(
                f"\nEdit a file in {place} and commit it: what runs will follow. "
                f"`git -C {ready.config_repo} log detoserve/status` tells the story. Ctrl-C stops it all.",
                "dim",
            ),
            soft_wrap=True,
        )


class JsonScreen:
    """One JSON object a line, for scripts: event step | config | problem | deployment | gone | ready."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._follower = _Follower()

    def _event(self, event: str, **fields: object) -> None:
        self._console.file.write(json.dumps({"event": event, **fields}) + "\n")
        self._console.file.flush()

    def step(self, text: str) -> None:
        self._event("step", text=text)

    def warn(self, text: str) -> None:
        self._event("problem", text=text)

    def world(self, world: World) -> None:
        news = self._follower.news(world)
        if news.revision:
            self._event("config", revision=news.revision)
        for problem in news.problems:
            self.warn(problem)
        for line in news.deployments:
            self._event("deployment", revision=world.effective.revision, **asdict(line))
        for name in news.gone:
            self._event("gone", name=name)

    def ready(self, ready: Ready) -> None:
        self._event("ready", **asdict(ready), curl=ready.curl)
