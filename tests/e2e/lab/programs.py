"""What stands on PATH in the lab: what images bring along in a real cluster."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.e2e.lab.install import ROOT

_UV = """\
#!/bin/bash
# SkyPilot makes environments of Python 3.10, which uv would download.
export UV_PYTHON_DOWNLOADS=never UV_OFFLINE=1 UV_CACHE_DIR=/tmp/uv-cache-$(id -u)
args=(); before=
for word in "$@"; do
  [ "$before" = --python ] && [ "$word" = 3.10 ] && word=/usr/bin/python3
  args+=("$word"); before=$word
done
exec {uv} "${{args[@]}}"
"""
_AGENT = """\
#!/bin/sh
export PYTHONPATH={code}
exec {python} -c 'import sys; sys.argv[0] = "detoserve-agent"; from agent.cli import main; main()' "$@"
"""


def write(folder: Path, *, skypilot: Path, agent_python: Path, vllm: Path) -> None:
    """`vllm`: where the command is, or will be once it is installed.

    Our agent is a command, and a module of the Python that replicas run with.
    """
    code = folder / "code"
    for package in ("agent", "schemas"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("*.pyc"))
    for user, own in zip(_sites(skypilot / "user"), _sites(agent_python.parents[1]), strict=True):
        (user / "detoserve.pth").write_text(f"{code}\n{own}\n")
    texts = {
        "uv": _UV.format(uv=skypilot / "venv/bin/uv"),
        "detoserve-agent": _AGENT.format(code=code, python=agent_python),
        "vllm": f'#!/bin/sh\nexec {vllm} "$@"\n',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def _sites(environment: Path) -> list[Path]:
    return list(environment.glob("lib/python3*/site-packages"))
