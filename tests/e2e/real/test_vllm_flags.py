"""What is rendered for vLLM is read by vLLM's own parser: every flag there is one that it has."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest

from reconciler.core.skypilot.render import service_task
from tests.e2e.real.vllm_install import install
from tests.unit.test_skypilot_render import NAMES, workload_of

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(600)]

PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
for name, argv in json.load(sys.stdin).items():
    known = parser.parse_args(argv)
    events = known.kv_events_config
    print("READ" + json.dumps([name, known.port, bool(events and events.enable_kv_cache_events)]))
"""


def commands(name: str) -> dict[str, list[str]]:
    """The arguments of every `vllm serve` in a golden's script."""
    script = service_task(workload_of(name), "detoserve")["run"].replace("\\\n", " ")
    found = {}
    for number, line in enumerate(script.splitlines()):
        words = shlex.split(line.rstrip(" &"))
        if "vllm" in words:
            found[f"{name}-{number}"] = words[words.index("vllm") + 2 :]
    return found


def test_vllm_reads_its_flags() -> None:
    asked = {key: argv for name in NAMES for key, argv in commands(name).items()}
    assert len(asked) >= 8
    installed = install()
    done = subprocess.run(
        [installed.program.with_name("python"), "-c", PARSE],
        check=False,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
        env=installed.environ,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [li.removeprefix("READ") for li in done.stdout.splitlines() if li.startswith("READ")]
    read = {name: (port, events) for name, port, events in map(json.loads, lines)}
    assert read.keys() == asked.keys()
    assert read["llm-d-disaggregated-2"] == (8003, True)
    assert [name for name, (_, events) in read.items() if not events] == ["vllm-bucket-0"]
