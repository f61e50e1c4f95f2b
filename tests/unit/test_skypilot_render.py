"""Golden files: what a config says, and the SkyPilot service that follows from it.

`golden/skypilot/NAME.config.yaml` becomes `NAME.service.yaml`. After a change that is meant, run with
DETOSERVE_WRITE_GOLDEN=1 and read the difference.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reconciler.cli.yaml_text import yaml_text
from reconciler.core.compile import compile_workloads
from reconciler.core.skypilot.render import SLURM_PORTS, port_of, service_task
from reconciler.core.workload import Workload
from reconciler.errors import Stalled
from tests.engines import sky_workload
from tests.unit.cli.config_repo import effective_of

GOLDEN = Path(__file__).parent / "golden" / "skypilot"
NAMES = sorted(file.name.removesuffix(".config.yaml") for file in GOLDEN.glob("*.config.yaml"))


def workload_of(name: str) -> Workload:
    text = (GOLDEN / f"{name}.config.yaml").read_text()
    (workload,) = compile_workloads(effective_of(text)).workloads.values()
    return workload


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    made = yaml_text([service_task(workload_of(name), "detoserve")])
    file = GOLDEN / f"{name}.service.yaml"
    if os.environ.get("DETOSERVE_WRITE_GOLDEN"):
        file.write_text(made)
    assert made == file.read_text()


def test_every_golden_file_has_its_config() -> None:
    services = {f.name.removesuffix(".service.yaml") for f in GOLDEN.glob("*.service.yaml")}
    assert services == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_scripts_are_bash(name: str) -> None:
    """`bash -n` reads and runs nothing."""
    task = service_task(workload_of(name), "detoserve")
    for part in ("setup", "run"):
        script = task.get(part, "")
        done = subprocess.run(
            ["bash", "-n"], check=False, input=script, text=True, capture_output=True
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_a_script_gives_the_program_its_very_words(tmp_path: Path) -> None:
    """Run for real, with a program that prints what it was given."""
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\nfor word in "$@"; do echo "[$word]"; done; echo "NAME=$NAME"\n')
    show.chmod(0o755)
    words = ["--a", "it's", "$HOME", '{"x": "{port}"}', "{replica}", "", "-5", "a\nb"]
    workload = sky_workload(command=[str(show), *words], env={"NAME": "<{replica}>"})
    task = service_task(workload, "detoserve")
    assert "NAME" not in task["envs"], "only the replica knows its number"
    run: dict[str, Any] = {"env": {"SKYPILOT_SERVE_REPLICA_ID": "7", "PATH": os.environ["PATH"]}}
    done = subprocess.run(
        ["bash", "-c", task["run"]], check=False, text=True, capture_output=True, **run
    )
    port = port_of(workload)
    assert done.stdout == (
        f'[--a]\n[it\'s]\n[$HOME]\n[{{"x": "{port}"}}]\n[chat--gpus-7]\n[]\n[-5]\n[a\nb]\n'
        "NAME=<chat--gpus-7>\n"
    )


def test_a_part_that_ends_takes_its_replica_down(tmp_path: Path) -> None:
    """SkyServe replaces a replica whole; it has to see that half of it is gone."""
    for name, body in {"python3": "sleep 60", "mkdir": "true"}.items():
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\ncase "$*" in *decode*) exit 3;; esac\nexec {body}\n')
        program.chmod(0o755)
    task = service_task(workload_of("dynamo-disaggregated"), "detoserve")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DYN_FILE_KV": str(tmp_path)}
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run([bash, "-c", task["run"]], env=env, timeout=20, check=False)
    assert done.returncode == 1


def test_only_the_number_of_replicas_changes_nothing_but_the_service() -> None:
    """SkyServe keeps replicas over such an update, and over no other."""
    one = sky_workload(replicas=1)
    five = service_task(replace(one, replicas=5), "detoserve")
    assert {**service_task(one, "detoserve"), "service": five["service"]} == five
    assert "file_mounts" not in five, "with mounts every update replaces everything"


def test_ports_on_slurm_are_a_services_own_and_stay() -> None:
    ports = {port_of(sky_workload(name=f"f{n}--campus")) for n in range(50)}
    assert len(ports) > 35
    assert all(port in SLURM_PORTS and port + 63 in SLURM_PORTS for port in ports)
    assert port_of(sky_workload()) == port_of(sky_workload(replicas=3, spec="two"))


def test_a_kubernetes_secret_outside_kubernetes_is_refused() -> None:
    workload = sky_workload(secrets={"TOKEN": {"kubernetesSecret": "a/b"}})
    with pytest.raises(Stalled, match="slurm and has no Kubernetes Secrets; use fromEnv"):
        service_task(workload, "detoserve")


def test_a_model_name_that_triton_cannot_have_is_refused() -> None:
    workload = workload_of("triton-openai")
    template = replace(workload.template, served_name="org/llama")
    with pytest.raises(Stalled, match="without a slash"):
        service_task(replace(workload, template=template), "detoserve")


@pytest.mark.parametrize("engine", ["triton", "dynamo", "llm-d"])
def test_an_engine_without_a_newest_image_says_what_to_give(engine: str) -> None:
    workload = sky_workload(provider={"type": "cloud", "cloud": "aws"}, engine=engine, command=[])
    with pytest.raises(Stalled, match=r"give runtime\.version, which stands for .*VERSION"):
        service_task(workload, "detoserve")
