"""The example config repo works as it stands: each set loads, fits together, and its engine starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reconciler.core.references import check_references
from reconciler.sources.loader import load_directory
from schemas.cluster import Cluster, LocalProvider
from schemas.deployment import Deployment
from schemas.function import Function
from schemas.kinds import MODELS

EXAMPLE = Path(__file__).parents[2] / "example-config-repo"
SETS = ["", "local", "local-vllm"]


@pytest.mark.parametrize("folder", SETS)
def test_a_set_loads_without_a_problem_or_a_warning(folder: str) -> None:
    loaded = load_directory(EXAMPLE / folder)
    assert loaded.problems == ()
    assert check_references(loaded.objects) == ()
    assert {key.kind for key in loaded.objects} == set(MODELS)


def test_the_main_set_leaves_the_others_out() -> None:
    paths = {obj.location.path for obj in load_directory(EXAMPLE).objects.values()}
    assert not any(path.startswith("local") for path in paths)


def test_the_local_set_needs_nothing_but_this_machine() -> None:
    values = [obj.value for obj in load_directory(EXAMPLE / "local").objects.values()]
    functions = {v.metadata.name: v.spec for v in values if isinstance(v, Function)}
    assert {spec.runtime.engine for spec in functions.values()} == {"simulated"}
    assert {"chat", "embed"} == functions.keys()
    assert functions["chat"].scaling.min_replicas == 2
    clusters = [v.spec.provider for v in values if isinstance(v, Cluster)]
    assert all(isinstance(provider, LocalProvider) for provider in clusters)
    deployed = {v.spec.function for v in values if isinstance(v, Deployment)}
    assert deployed == functions.keys()


@pytest.mark.parametrize("name", ["chat", "embed"])
def test_the_simulated_engine_takes_the_flags_of_a_local_function(name: str) -> None:
    objects = load_directory(EXAMPLE / "local").objects
    function = objects[next(key for key in objects if key == ("Function", name))].value
    assert isinstance(function, Function)
    command = [sys.executable, "-m", "agent.simulated", "--port", "0", "--served-model-name", name]
    with subprocess.Popen(
        [*command, *function.spec.runtime.args],
        cwd=EXAMPLE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as engine:
        assert engine.stdout
        assert engine.stderr
        line = engine.stdout.readline()
        engine.terminate()
        assert line, engine.stderr.read()
        assert json.loads(line)["event"] == "ready"
        assert engine.wait(timeout=10) == 0
