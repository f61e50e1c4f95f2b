"""What `detoserve up` tells of a world, and when it calls itself up."""

from __future__ import annotations

import json
from io import StringIO

from rich.console import Console

from reconciler.core.compile import compile_workloads
from reconciler.core.observed import Observation, Phase
from reconciler.core.plan import PlanPolicy, plan
from reconciler.core.status import RoutingView, World
from reconciler.up.progress import JsonScreen, Ready, TextScreen, all_live, deployment_lines
from tests.unit.core.worlds import (
    config_object,
    deployment,
    desired_of,
    function,
    in_effect,
    local,
    observation,
    running,
)

CLOUD = config_object("Cluster", "k", {"provider": {"type": "kubernetes", "context": "ctx"}})
BASE = (function("f"), local("c"), CLOUD)


def world(*objects, observed: tuple[Observation, ...] = (), routers: int = 1) -> World:
    now = in_effect(*objects)
    desired = compile_workloads(now)
    made = plan(desired, observed, PlanPolicy(known=frozenset()), 0.0)
    view = RoutingView(3, "r", {f"router-{i}": 3 for i in range(routers)}, {"a": 3})
    return World(now, desired, observed, made, view)


def served(*phases: Phase) -> Observation:
    workload = desired_of(*BASE, deployment("a")).workloads["a--c"]
    return observation(running(workload, *phases)) if phases else observation()


def test_live_needs_every_replica_and_a_router() -> None:
    objects = (*BASE, deployment("a"))
    assert all_live(world(*objects, observed=(served(Phase.READY),)))
    assert not all_live(world(*objects, observed=(served(Phase.STARTING),)))
    assert not all_live(world(*objects, observed=(served(Phase.READY, Phase.DRAINING),)))
    assert not all_live(world(*objects, observed=(served(Phase.READY),), routers=0))


def test_what_no_backend_here_runs_is_not_waited_for() -> None:
    made = world(*BASE, deployment("a", at="k"), observed=(served(),))
    assert all_live(made)
    line = deployment_lines(made)["a"]
    assert not line.acted_on
    assert "no skypilot backend runs in this reconciler" in line.detail


def test_each_change_is_told_once() -> None:
    out = StringIO()
    screen = JsonScreen(Console(file=out))
    objects = (*BASE, deployment("a"))
    for phase in (Phase.STARTING, Phase.STARTING, Phase.READY):
        screen.world(world(*objects, observed=(served(phase),)))
    screen.world(world(*BASE, observed=(served(),)))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["config", "deployment", "deployment", "gone"]
    assert [e["live"] for e in events[1:3]] == [False, True]


def test_the_line_to_try_holds_the_key_only_where_one_was_made() -> None:
    made = Ready("http://h/v1", None, "chat", "repo", "", "state", "http://a")
    assert "$DETOSERVE_API_KEY" in made.curl
    out = StringIO()
    TextScreen(Console(file=out, width=200)).ready(made)
    assert "detoserve keys create" in out.getvalue()
    assert made.curl in out.getvalue()
