"""SkyPilot itself reads what we render: its own schemas, and the objects it makes of them.

Nothing is started; only SkyPilot's Python is needed, not the cluster. And what its statuses are called
is compared with our tables.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reconciler.core.skypilot.render import service_task
from reconciler.core.skypilot.states import REPLICA_STATES, SERVICE_STATES
from tests.e2e.lab.install import skypilot
from tests.unit.test_skypilot_render import NAMES, workload_of

pytestmark = [pytest.mark.e2e, pytest.mark.skypilot, pytest.mark.timeout(600)]

READ = """
import json, sys, os
os.environ.pop("IS_SKYPILOT_SERVER", None)
import sky
from sky.serve import serve_state
from sky.utils import dag_utils, schemas
made = {}
for name, text in json.load(sys.stdin).items():
    (task,) = dag_utils.load_dag_from_yaml_str(text).tasks
    whole = task.to_yaml_config()
    spec = task.service
    made[name] = {
        "replicas": spec.min_replicas,
        "ports": spec.ports,
        "probe": spec.readiness_path,
        "file_mounts": whole["file_mounts"],
        "envs": whole["envs"],
        "run": whole["run"],
        "resources": whole["resources"],
    }
print("READ" + json.dumps({
    "made": made,
    "services": [s.value for s in serve_state.ServiceStatus],
    "replicas": [s.value for s in serve_state.ReplicaStatus],
}, default=str))
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What SkyPilot makes of all golden configs."""
    python = skypilot() / "venv/bin/python"
    home = tmp_path_factory.mktemp("home")
    (home / ".slurm").mkdir()
    # The one Slurm cluster that the goldens name.
    (home / ".slurm/config").write_text("Host campus\n  HostName 127.0.0.1\n  User nobody\n")
    tasks = {}
    for name in NAMES:
        task = service_task(workload_of(name), "detoserve")
        if "secrets" in task:
            task["secrets"] = dict.fromkeys(task["secrets"], "value")
        tasks[name] = json.dumps(task)
    done = subprocess.run(
        [python, "-c", READ],
        check=False,
        input=json.dumps(tasks),
        capture_output=True,
        text=True,
        timeout=300,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        cwd=Path("/"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("READ")]
    return dict(json.loads(line.removeprefix("READ")))


@pytest.mark.parametrize("name", NAMES)
def test_skypilot_reads_what_is_rendered(read: dict[str, Any], name: str) -> None:
    task, made = service_task(workload_of(name), "detoserve"), read["made"][name]
    service = task["service"]
    count = service.get("replicas", service.get("replica_policy", {}).get("min_replicas"))
    assert made["replicas"] == count
    assert made["ports"] == str(service["ports"])
    assert made["probe"] == service["readiness_probe"]["path"]
    assert made["run"] == task["run"]
    assert made["envs"] == task["envs"]
    assert made["file_mounts"] == {}, "with mounts every update replaces everything"
    assert task["resources"]["infra"] in json.dumps(made["resources"]).replace(
        "kubernetes/", "k8s/"
    )


def test_our_tables_have_every_status(read: dict[str, Any]) -> None:
    assert set(read["services"]) == set(SERVICE_STATES)
    assert set(read["replicas"]) == set(REPLICA_STATES)
