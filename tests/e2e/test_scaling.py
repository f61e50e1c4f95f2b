"""Load moves replicas, a sleeping function wakes for whoever asks, and a bad canary goes back by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from git import Repo
from openai import OpenAI
from ruamel.yaml import YAML

from tests.e2e.up_process import Up
from tests.support import eventually_sync

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

CHAT = "local/functions/chat.yaml"
DEPLOYMENT = "local/deployments/chat.yaml"


def status(up: Up, name: str = "chat") -> dict[str, Any]:
    with Repo(up.config) as repo:
        text = repo.git.show(f"detoserve/status:status/deployment/{name}.yaml")
    return YAML(typ="safe", pure=True).load(text)["status"]


def conditions(up: Up) -> dict[str, str]:
    return {c["type"]: c["reason"] for c in status(up)["conditions"] if c["status"] == "True"}


@contextmanager
def asking(client: OpenAI, *, threads: int, max_tokens: int) -> Iterator[list[BaseException]]:
    """Streams without pause from several threads; what failed is in what it yields."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def ask(number: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            try:
                _say(client, f"thread {number} turn {turn}", max_tokens=max_tokens)
            except BaseException as error:  # noqa: BLE001 - every failure counts
                failures.append(error)

    workers = [threading.Thread(target=ask, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield failures
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def _say(client: OpenAI, text: str, *, max_tokens: int = 8) -> str:
    stream = client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": text}],
        max_tokens=max_tokens,
        stream=True,
    )
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


def test_load_takes_one_replica_to_three_and_its_end_back_to_one(
    start_up: Callable[..., Up],
) -> None:
    up = start_up()
    ready = up.ready()
    client = up.client(ready)
    up.replace(
        CHAT,
        "minReplicas: 2",
        "minReplicas: 1\n    maxReplicas: 3\n    metric: concurrency\n    target: 2\n"
        "    upscaleDelay: 1s\n    downscaleDelay: 4s",
    )
    up.live("chat", 1)
    began = time.monotonic()
    with asking(client, threads=8, max_tokens=40) as failures:
        up.live("chat", 3)
        up_s = time.monotonic() - began
    began = time.monotonic()
    up.live("chat", 1)
    down_s = time.monotonic() - began
    print(f"1 -> 3 in {up_s:.1f} s of load, 3 -> 1 in {down_s:.1f} s without")
    assert not failures

    def told() -> bool:
        scaling = status(up)["scaling"]
        return bool(scaling["replicas"] == 1 and "at 2 a replica" in scaling["last"])

    eventually_sync(told)
    events = [event["message"] for event in status(up)["events"]]
    assert any(message.startswith("1 -> ") for message in events)
    assert events[-1].split(":")[0].endswith("-> 1")


def test_a_sleeping_function_holds_a_request_until_it_is_awake(
    start_up: Callable[..., Up],
) -> None:
    up = start_up()
    ready = up.ready()
    client = up.client(ready)
    up.replace(
        CHAT,
        "minReplicas: 2",
        "minReplicas: 0\n    maxReplicas: 2\n    downscaleDelay: 2s\n    wakeTimeout: 60s",
    )
    eventually_sync(
        lambda: status(up)["replicas"] == {"wanted": 0, "ready": 0, "updated": 0}, timeout_s=40
    )
    began = time.monotonic()
    answers: list[str] = []
    together = [
        threading.Thread(target=lambda n=n: answers.append(_say(client, f"wake {n}")))
        for n in range(5)
    ]
    for one in together:
        one.start()
    for one in together:
        one.join()
    print(f"awake and answered in {time.monotonic() - began:.1f} s")
    assert len(answers) == 5
    assert all(answers)
    eventually_sync(lambda: status(up)["replicas"]["wanted"] == 0, timeout_s=40)


def test_a_canary_that_fails_goes_back_and_proposes_its_revert(
    start_up: Callable[..., Up],
) -> None:
    up = start_up()
    ready = up.ready()
    client = up.client(ready)
    rolls = up.replace(
        DEPLOYMENT,
        "    strategy: rolling\n    maxSurge: 1",
        "    strategy: canary\n    maxSurge: 1\n    steps:\n"
        "      - {weightPercent: 30, hold: 3s}\n      - {weightPercent: 60, hold: 3s}\n"
        "    gates: {minRequests: 5, maxTtftIncreasePercent: 1000}",
    )
    eventually_sync(lambda: status(up)["observedRevision"] == rolls)
    before = (up.config / CHAT).read_text()
    with asking(client, threads=4, max_tokens=6) as failures:
        up.replace(CHAT, "--itl-s=0.02", "--itl-s=0.01", "Make chat faster")
        eventually_sync(lambda: conditions(up).get("Reconciling") == "Canary", timeout_s=30)
        eventually_sync(lambda: status(up)["replicas"]["updated"] == 2, timeout_s=60)
        eventually_sync(lambda: "canary" not in status(up), timeout_s=40)
        eventually_sync(lambda: conditions(up) == {"Ready": "Serving"}, timeout_s=30)
        after_good = (up.config / CHAT).read_text()
        assert after_good != before
        up.replace(CHAT, "--itl-s=0.01", "--itl-s=0.01\n      - --fault=fail_next=-1", "Break chat")
        eventually_sync(lambda: conditions(up).get("Stalled") == "RolledBack", timeout_s=40)
    assert not failures
    assert [e["reason"] for e in status(up)["events"]][-2:] == ["Canary", "RolledBack"]

    def proposed() -> str:
        with Repo(up.config) as repo:
            return str(
                repo.git.for_each_ref("--format=%(refname:short)", "refs/heads/detoserve/revert")
            )

    branch = eventually_sync(proposed)
    with Repo(up.config) as repo:
        assert repo.git.show(f"{branch}:{CHAT}").strip() == after_good.strip()
        assert repo.git.rev_list("--count", f"main..{branch}") == "1"
        assert "failed" in repo.git.log("-1", "--format=%B", branch)
        repo.git.merge("--ff-only", branch)
    eventually_sync(lambda: conditions(up) == {"Ready": "Serving"}, timeout_s=30)
    assert _say(client, "still there")
