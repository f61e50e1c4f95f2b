"""What status, wait-ready and plan say while `detoserve up` runs: soon, and true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.up_process import DETOSERVE, Up
from tests.support import eventually_sync

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

CHAT = "local/functions/chat.yaml"
DEMO = "local/tenants/demo.yaml"


def detoserve(up: Up, *args: str | Path, exit_code: int = 0) -> str:
    done = subprocess.run(
        [DETOSERVE, *args],
        capture_output=True,
        text=True,
        cwd=up.folder,
        env={**os.environ, "HOME": str(up.folder / "home"), "GIT_CONFIG_NOSYSTEM": "1"},
        timeout=60,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr + done.stdout
    return done.stdout


def status_subjects(up: Up) -> list[str]:
    return [line for line in up.story().splitlines() if line.startswith("status: ")]


def test_status_follows_a_commit_soon_and_says_nothing_twice(start_up: Callable[..., Up]) -> None:
    up = start_up()
    up.ready()
    detoserve(up, "status", up.config, "--wait-ready", "--timeout", "30s")

    edited = up.replace(DEMO, 'models: ["*"]', "models: [chat, embed]")
    started = time.monotonic()
    eventually_sync(lambda: edited in up.story(), timeout_s=10)
    # About 1 s on a quiet machine: the debounce and one push.
    assert time.monotonic() - started < 5

    detoserve(up, "status", up.config, "--wait-ready", "--timeout", "30s")
    before = status_subjects(up)
    nothing = up.edit("README.md", lambda text: text + "\nMore words.\n", "Say more")
    eventually_sync(lambda: nothing in up.story(), timeout_s=10)
    detoserve(up, "status", up.config, "--wait-ready", "--timeout", "30s")
    assert len(status_subjects(up)) == len(before) + 1, "the revision, and nothing else"

    grown = up.replace(CHAT, "minReplicas: 2", "minReplicas: 3")
    detoserve(up, "status", up.config, "--wait-ready", "--timeout", "60s")
    shown = json.loads(detoserve(up, "status", up.config, "--output", "json"))
    assert grown[:7] in json.dumps(shown)
    deployment = json.dumps(
        json.loads(detoserve(up, "status", up.config, "Deployment/chat", "-o", "json"))
    )
    assert '"ready": 3' in deployment

    broken = up.edit(CHAT, lambda text: text + "colour: blue\n", "Break chat")
    eventually_sync(lambda: broken in up.story(), timeout_s=10)
    detoserve(up, "status", up.config, "--wait-ready", "--timeout", "2s", exit_code=1)


def test_plan_against_live_is_what_up_does_next(start_up: Callable[..., Up]) -> None:
    up = start_up("--verbose")
    up.ready()
    detoserve(up, "status", up.config, "--wait-ready", "--timeout", "30s")

    def planned() -> list[tuple[str, str]]:
        text = detoserve(
            up,
            *("plan", up.config / "local", "--against", "live"),
            *("--state-dir", up.state_dir, "--output", "json"),
        )
        verbs = {"roll": "update", "scale": "update"}
        found = json.loads(text)["workloads"]
        return sorted((verbs.get(w["verb"], w["verb"]), w["workload"]) for w in found)

    assert planned() == []
    chat = up.config / CHAT
    chat.write_text(chat.read_text().replace("minReplicas: 2", "minReplicas: 1"))
    (up.config / "local/deployments/embed.yaml").unlink()
    more = up.config / "local/deployments/more.yaml"
    text = (up.config / "local/deployments/chat.yaml").read_text()
    more.write_text(text.replace("name: chat", "name: more"))
    before = planned()
    assert len(before) == 3
    committed = up.edit("README.md", lambda text: text + "\n", "Commit it all")[:12]
    detoserve(up, "status", up.config, "--wait-ready", "--timeout", "60s")
    assert planned() == []
    log = (up.folder / "stderr.txt").read_text()
    said = re.findall(r"reconciler INFO (create|update|delete) (\S+): ", log.split(committed)[1])
    assert sorted(said) == before
