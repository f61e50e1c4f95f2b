"""`detoserve status` as a process, on a status branch written as the reconciler writes it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import pytest

from reconciler.cli.repository import Repository
from reconciler.cli.status import _moments
from reconciler.core.compile import compile_workloads
from reconciler.core.last_good import effective
from reconciler.core.observed import Observation, ObservedReplica, ObservedWorkload, Phase
from reconciler.core.plan import PlanPolicy, plan
from reconciler.core.status import RoutingView, World, documents
from reconciler.publish.lease import Lease, boottime_s
from reconciler.publish.status_branch import StatusBranch
from reconciler.publish.status_yaml import render_document
from reconciler.sources.loader import load_directory
from tests.behaviour.cli_process import (
    COMMAND,
    ENVIRON,
    commit,
    detoserve,
    example_repo,
    git,
)
from tests.support import eventually


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return example_repo(tmp_path / "repo")


async def write_status(repo: Path, *, ready: bool) -> str:
    """Status of the repo's head, with every replica up or all still starting."""
    revision = git(repo, "rev-parse", "main")
    wanted = replace(effective(load_directory(repo), None), revision=revision)
    desired = compile_workloads(wanted)
    phase = Phase.READY if ready else Phase.STARTING
    running = {
        w.name: ObservedWorkload(
            w.name,
            w.deployment,
            w.spec_digest,
            w.replicas,
            tuple(
                ObservedReplica(f"{w.name}-{i}", phase, w.spec_digest, f"http://127.0.0.1:400{i}")
                for i in range(w.replicas)
            ),
        )
        for w in desired.workloads.values()
    }
    observed = (Observation("local", running), Observation("external"))
    made = plan(desired, observed, PlanPolicy(), now=0.0)
    world = World(wanted, desired, observed, made, RoutingView(3, revision, {"router-1": 3}))
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    branch = StatusBranch(repo.parent / "status.git", str(repo))
    await branch.write(
        {path: render_document(d) for path, d in documents(world, {}, now).items()},
        revision=revision,
        plan_digest="0" * 16,
        lease=Lease(1, boottime_s() + 60, "test"),
    )
    return revision


async def test_all_ready_in_every_form(repo: Path) -> None:
    revision = await write_status(repo, ready=True)
    made = detoserve("status", repo)
    assert made.returncode == 0, made.stderr
    head, _, header, chat, *_ = made.stdout.splitlines()
    assert head.startswith(f"{revision[:10]}: ")
    assert header.split() == ["NAME", "READY", "REPLICAS", "REVISION", "AGE", "MESSAGE"]
    assert chat.split()[:3] == ["Deployment/chat", "yes", "2/2"]

    data = json.loads(detoserve("status", "-o", "json", cwd=repo).stdout)
    assert (data["ready"], data["revision"]) == (True, revision)
    assert {o["object"] for o in data["objects"]} >= {"Deployment/chat", "Tenant/demo"}

    text = detoserve("status", "deployment/chat", "-o", "yaml", cwd=repo).stdout
    assert text.startswith("apiVersion: detoserve.ai/v1alpha1\nkind: Deployment\n")

    full = detoserve("status", repo, "Deployment/chat").stdout
    assert full.startswith("Deployment/chat  yes\n")
    assert "chat--local-1  ready  http://127.0.0.1:4001" in full


async def test_something_not_ready_exits_with_1(repo: Path) -> None:
    await write_status(repo, ready=False)
    assert detoserve("status", repo).returncode == 1
    assert detoserve("status", repo, "Deployment/chat").returncode == 1
    assert detoserve("status", repo, "Tenant/demo").returncode == 0


async def test_through_a_url_and_in_a_clone(repo: Path, tmp_path: Path) -> None:
    await write_status(repo, ready=True)
    assert detoserve("status", f"file://{repo}").returncode == 0
    git(tmp_path, "clone", "--quiet", str(repo), "clone")
    assert detoserve("status", tmp_path / "clone").returncode == 0


async def test_what_is_not_there_exits_with_2(repo: Path, tmp_path: Path) -> None:
    made = detoserve("status", repo)
    assert made.returncode == 2
    assert "has no branch detoserve/status" in made.stderr
    assert detoserve("status", f"file://{repo}").returncode == 2
    assert detoserve("status", tmp_path).returncode == 2
    assert detoserve("status", repo, "x", "y").returncode == 2
    await write_status(repo, ready=True)
    made = detoserve("status", repo, "Deployment/cht")
    assert made.returncode == 2
    assert 'did you mean "Deployment/chat"?' in made.stderr


async def start(repo: Path, *args: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *COMMAND,
        "status",
        *args,
        cwd=repo,
        env=ENVIRON,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def lines(stream: asyncio.StreamReader | None) -> AsyncIterator[str]:
    assert stream is not None
    async for line in stream:
        yield line.decode().rstrip("\n")


async def test_wait_ready_follows_the_newest_commit(repo: Path) -> None:
    await write_status(repo, ready=True)
    newest = commit(repo, "One more")
    process = await start(repo, "--wait-ready", "--timeout", "20s", "-o", "json")
    said = lines(process.stderr)
    assert (await anext(said)).startswith(f"waiting for main@{newest[:10]}; status speaks of ")
    await write_status(repo, ready=False)
    assert (await anext(said)).startswith("waiting for Deployment/chat, Deployment/embed")
    written = time.monotonic()
    await write_status(repo, ready=True)
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert json.loads(out)["revision"] == newest
    # A watch, not the next of some long naps; the limit is loose for a busy machine.
    assert time.monotonic() - written < 3


async def test_wait_ready_gives_up_with_1(repo: Path) -> None:
    await write_status(repo, ready=False)
    made = detoserve("status", repo, "--wait-ready", "--timeout", "300ms")
    assert made.returncode == 1
    assert made.stdout == ""
    assert "error: not ready within 0.3 s; waiting for Deployment/chat" in made.stderr
    assert detoserve("status", repo, "--wait-ready", "--timeout", "soon").returncode == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_ends_a_watch_also_where_it_meets_a_finalizer(repo: Path) -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with Repository.open(str(repo)) as opened:
        moments = _moments(opened, ["main"], None)
        next(moments)
        Finalized()  # what it raises is lost
        with pytest.raises(KeyboardInterrupt):
            list(islice(moments, 3))
    assert signal.getsignal(signal.SIGINT) is before


async def test_watch_shows_each_status_until_interrupted(repo: Path) -> None:
    await write_status(repo, ready=False)
    process = await start(repo, "Deployment/chat", "--watch")
    shown: list[str] = []

    async def collect() -> None:
        async for line in lines(process.stdout):
            if line.startswith("Deployment/chat"):
                shown.append(line)  # noqa: PERF401 - each as it comes, not all at the end

    collecting = asyncio.create_task(collect())
    await eventually(lambda: shown == ["Deployment/chat  no"])
    await write_status(repo, ready=True)
    await eventually(lambda: shown == ["Deployment/chat  no", "Deployment/chat  yes"])
    os.kill(process.pid, signal.SIGINT)
    _, err = await asyncio.gather(process.wait(), process.stderr.read())  # type: ignore[union-attr]
    await collecting
    assert process.returncode == 130
    assert b"Traceback" not in err
