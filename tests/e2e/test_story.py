"""The story of README, end to end: a commit starts engines, and a client streams from them."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import openai
import psutil
import pytest
from git import Repo
from openai import OpenAI

from tests.e2e.up_process import DETOSERVE, Up
from tests.support import eventually_sync

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

CHAT = "local/functions/chat.yaml"


def say(client: OpenAI, text: str, *, model: str = "chat", max_tokens: int = 8) -> str:
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=max_tokens,
        stream=True,
    )
    parts = [c.choices[0].delta.content or "" for c in stream if c.choices]
    return "".join(parts)


@contextmanager
def steady_requests(client: OpenAI, *, threads: int = 3):
    """Streams without pause from several threads; the failures are in what it yields."""
    stop = threading.Event()
    failures: list[BaseException] = []
    done = [0]

    def ask(number: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            try:
                assert say(client, f"thread {number} turn {turn}", max_tokens=12)
                done[0] += 1
            except BaseException as error:  # noqa: BLE001 - every failure counts
                failures.append(error)

    workers = [threading.Thread(target=ask, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield failures, done
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def test_a_commit_becomes_streamed_tokens(start_up: Callable[..., Up]) -> None:
    up = start_up()
    ready = up.ready()
    client = up.client(ready)

    assert {m.id for m in client.models.list()} >= {"chat", "embed"}
    assert say(client, "Hello!")
    whole = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": "Hello!"}], max_tokens=8
    )
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    text = client.completions.create(model="chat", prompt="Once", max_tokens=4)
    assert text.choices[0].text
    chunks = client.completions.create(model="chat", prompt="Once", max_tokens=4, stream=True)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == text.choices[0].text
    vector = client.embeddings.create(model="embed", input=["a", "b"]).data
    assert len(vector) == 2
    assert vector[0].embedding != vector[1].embedding

    with pytest.raises(openai.AuthenticationError):
        say(up.client(ready, key="ds_wrong"), "Hello!")
    with pytest.raises(openai.NotFoundError) as unknown:
        say(client, "Hello!", model="nobody-has-this")
    up.edit("local/functions/other.yaml", lambda _: _function("other", "chat"))
    up.replace("local/tenants/demo.yaml", 'models: ["*"]', "models: [chat, embed]")

    def foreign() -> str:
        with pytest.raises(openai.NotFoundError) as refused:
            say(client, "Hello!", model="other")
        return str(refused.value)

    expected = str(unknown.value).replace("nobody-has-this", "other")
    assert eventually_sync(lambda: foreign() == expected)


def test_edits_under_load_lose_no_request(start_up: Callable[..., Up]) -> None:
    up = start_up()
    ready = up.ready()
    client = up.client(ready)
    with steady_requests(client) as (failures, done):
        grown = up.replace(CHAT, "minReplicas: 2", "minReplicas: 3", "Grow chat to 3")
        up.live("chat", 3, revision=grown)
        eventually_sync(lambda: grown in up.story())
        rolled = up.replace(CHAT, "--itl-s=0.02", "--itl-s=0.01", "Make chat faster")
        up.live("chat", 3, revision=rolled)
        eventually_sync(lambda: rolled in up.story())
        shrunk = up.replace(CHAT, "minReplicas: 3", "minReplicas: 1", "Shrink chat to 1")
        up.live("chat", 1, revision=shrunk)
        added = up.edit(
            "local/deployments/chat-b.yaml",
            lambda _: (
                (up.config / "local/deployments/chat.yaml")
                .read_text()
                .replace("name: chat", "name: chat-b")
            ),
        )
        up.live("chat-b", 1, revision=added)
        up.edit("local/deployments/chat-b.yaml", lambda _: None, "Remove chat-b")
        up.gone("chat-b")
        before = done[0]
        eventually_sync(lambda: done[0] > before + 10)
    assert not failures
    assert done[0] > 50

    deleted = up.edit("local/deployments/chat.yaml", lambda _: None, "Remove chat")
    up.gone("chat")

    def refused() -> bool:
        with pytest.raises((openai.InternalServerError, openai.NotFoundError)):
            say(client, "Hello!")
        return True

    assert refused()
    engines = up.processes(running="agent.simulated")
    assert eventually_sync(lambda: sum(map(_runs, engines)) <= 1)

    assert eventually_sync(lambda: f"Detoserve-Source-Revision: {deleted}" in up.story())
    with Repo(up.config) as repo:
        files = str(repo.git.ls_tree("-r", "--name-only", "detoserve/status")).splitlines()
        assert "status/summary.yaml" in files
        assert "status/deployment/chat.yaml" not in files
        assert repo.active_branch.name == "main"
        assert not repo.is_dirty(untracked_files=True)


def test_routers_hear_what_engines_hold(start_up: Callable[..., Up]) -> None:
    up = start_up()
    ready = up.ready()
    client = up.client(ready)

    capacity = eventually_sync(
        lambda: (
            len(found := up.metric(ready, "detoserve_router_engine_capacity_tokens")) == 3 and found
        )
    )
    assert all(tokens > 1000 for tokens in capacity.values())
    say(client, "word " * 2000)
    assert eventually_sync(
        lambda: max(up.metric(ready, "detoserve_router_index_blocks").values()) > 30
    )
    assert set(up.metric(ready, "detoserve_router_cache_trust").values()) == {1.0}
    assert eventually_sync(
        lambda: set(up.metric(ready, "detoserve_router_engine_events").values()) == {1.0}
    )


def test_every_answer_can_be_explained(start_up: Callable[..., Up]) -> None:
    up = start_up()
    ready = up.ready()
    client = up.client(ready)

    def answered() -> str:
        got = client.chat.completions.with_raw_response.create(
            model="chat", messages=[{"role": "user", "content": "Why?"}], max_tokens=4
        )
        return str(got.headers["x-detoserve-route"])

    def explained(route: str) -> dict[str, Any]:
        told = subprocess.run(
            [DETOSERVE, "explain", route, "--json", "--state-dir", up.state_dir],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        (one,) = json.loads(told.stdout)
        return dict(one)

    first = answered()
    before = eventually_sync(lambda: explained(first), timeout_s=60)
    assert before["policy"] == "expected-latency"
    assert before["policySince"] == before["revision"]
    assert len(before["candidates"]) == 2
    weights = "routing:\n    policy: least-load\n  scaling:"
    commit = up.replace(CHAT, "scaling:", weights, "Route chat by load alone")
    eventually_sync(lambda: explained(answered())["policy"] == "least-load", timeout_s=60)
    up.replace(CHAT, "minReplicas: 2", "minReplicas: 1", "Shrink chat")
    after = eventually_sync(
        lambda: (found := explained(answered()))["revision"] != commit and found,
        timeout_s=60,
    )
    assert after["policySince"] == commit


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(start_up: Callable[..., Up], signum: int) -> None:
    up = start_up()
    up.ready()
    everything = {*up.processes(), *psutil.Process(up.process.pid).children(recursive=True)}
    # Short-lived ones, git's among them, may be gone before they are asked.
    commands = [" ".join(told) for p in everything if (told := _command(p))]
    for part in ("router", "agent.cli", "agent.simulated", "valkey"):
        assert [c for c in commands if part in c], part
    code = up.stop(signum)
    if signum == signal.SIGINT:
        assert code == 0
    eventually_sync(
        lambda: not [p for p in everything if _runs(p)],
        timeout_s=20,
    )
    assert eventually_sync(lambda: not up.processes(), timeout_s=20)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _function(name: str, like: str) -> str:
    assert like
    return f"""\
apiVersion: detoserve.ai/v1alpha1
kind: Function
metadata:
  name: {name}
spec:
  model:
    uri: sim://{name}
  runtime:
    engine: simulated
"""
