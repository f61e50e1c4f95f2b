"""The lab itself stands, and an API server that is killed comes back."""

from __future__ import annotations

import socket

import pytest

from tests.e2e.lab.lab import Lab
from tests.e2e.lab.layout import NODES

pytestmark = [pytest.mark.e2e, pytest.mark.skypilot, pytest.mark.timeout(900)]


def test_slurm_has_its_nodes_and_skypilot_answers_again_after_a_kill(lab: Lab) -> None:
    listed = lab.run("sinfo", "--noheader", "--Node", "--format", "%N %G").splitlines()
    wanted = {f"{node.name} gpu:{node.gpu.lower()}:8" for node in NODES}
    assert {line.split("(")[0] for line in listed} == wanted
    with socket.create_connection((NODES[0].address, 6818), timeout=5):
        pass

    before = lab.services()
    lab.kill_api_server()
    with pytest.raises(OSError):
        lab.services()
    print(f"API server healthy {lab.start_api_server():.0f} s after its start")
    assert lab.services().keys() == before.keys()
