"""The example for vLLM on one machine, as `detoserve up` runs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from schemas import api_keys
from tests.e2e.real.vllm_install import install
from tests.e2e.up_process import Up
from tests.git_repo import GitRepo
from tests.support import eventually_sync

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(600)]

EXAMPLE = Path(__file__).parents[3] / "example-config-repo"
URI = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_example_answers_from_a_real_model(
    start_up: Callable[..., Up], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = install()
    for name, value in installed.environ.items():
        monkeypatch.setenv(name, value)
    repo = GitRepo(tmp_path / "detoserve-config")
    shutil.copytree(EXAMPLE, repo.path, dirs_exist_ok=True)
    key = api_keys.create()

    def replace(name: str, old: str, new: str) -> None:
        file = repo.path / "local-vllm" / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    # As the file itself says, for a machine without the network.
    replace("functions/smollm2.yaml", f"uri: {URI}", f"uri: {installed.model}")
    replace("tenants/demo.yaml", "keys: []", f"keys: [{{id: {key.id}, sha256: {key.sha256}}}]")
    repo.commit(message="Read the model from a folder")

    up = start_up("--path", "local-vllm")
    ready = up.wait(lambda event: event["event"] == "ready", timeout_s=300)
    client = up.client(ready, key=key.text).with_options(timeout=120)
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=16,
        temperature=0,
        stream=True,
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert "Paris" in said
    # The engine tells the agent what its cache holds, by a socket that only this machine has.
    assert eventually_sync(
        lambda: set(up.metric(ready, "detoserve_router_engine_events").values()) == {1.0},
        timeout_s=60,
    )
    assert max(up.metric(ready, "detoserve_router_engine_capacity_tokens").values()) > 1000
    client.close()
