"""What the lab installs, once: SkyPilot for the API server and its nodes, and what replicas run.

From PyPI into the test cache; Debian's packages are left to whoever owns the machine.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

from tests.e2e.foreign_suites import filling, run, shared_folder, unavailable
from tests.e2e.lab.layout import SKYPILOT

PYTHON = "/usr/bin/python3"
"""SkyPilot's nodes work as another user, to whom a Python in a home directory may be closed."""
PACKAGES = {
    "munge": "/usr/sbin/munged",
    "slurm-wlm": "/usr/sbin/slurmctld",
    "slurm-client": "/usr/bin/sinfo",
    "openssh-server": "/usr/sbin/sshd",
    "openssh-client": "/usr/bin/ssh",
    "iproute2": "/usr/sbin/ip",
    "rsync": "/usr/bin/rsync",
    "netcat-openbsd": "/bin/nc.openbsd",
    "python3-venv": "/usr/lib/python3.11/ensurepip/__init__.py",
}
"""Debian 12's, with a file of each."""
ROOT = Path(__file__).parents[3]
PATCHES = Path(__file__).with_name("sky_patches.py")


def check_machine() -> None:
    """Skips, and says what to do, where the lab cannot stand; fails in CI."""
    if os.geteuid() != 0:
        unavailable("the lab makes namespaces and users of its own: run it as root")
    missing = [package for package, file in PACKAGES.items() if not Path(file).exists()]
    if missing:
        unavailable(
            f"apt-get update && apt-get install -y --no-install-recommends {' '.join(missing)}"
        )
    asked = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount", "--uts", "--net", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode:
        unavailable(f"this machine gives no namespaces: {asked.stderr.strip()}")


def skypilot() -> Path:
    """Folder with `venv` (SkyPilot: client, server and node runtime) and `user` (a node's own)."""
    root = shared_folder()
    root.mkdir(parents=True, exist_ok=True)
    with filling(f"skypilot-{SKYPILOT}-lab", root) as (folder, empty):
        venv = folder / "venv"
        if empty:
            run(PYTHON, "-m", "venv", venv, cwd=folder)
            pip = (venv / "bin/python", "-m", "pip", "install", "-q")
            run(*pip, "uv", f"skypilot[slurm,remote]=={SKYPILOT}", cwd=folder)
            uv = (venv / "bin/uv", "-q", "venv", "--seed", "--relocatable", "--python", PYTHON)
            run(*uv, "--system-site-packages", folder / "user", cwd=folder)
        (site,) = (venv / "lib").glob("python3*/site-packages")
        shutil.copyfile(PATCHES, site / "detoserve_lab_patches.py")
        (site / "detoserve_lab.pth").write_text(
            "import os; os.environ.get('DETOSERVE_LAB') and __import__('detoserve_lab_patches')\n"
        )
    return folder


def agent_python() -> Path:
    """A Python with what our agent imports, open to every user."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["agent"]]
    digest = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:12]
    with filling(f"agent-{digest}", shared_folder()) as (folder, empty):
        python = folder / "bin/python"
        if empty:
            run(PYTHON, "-m", "venv", folder, cwd=folder)
            run(python, "-m", "pip", "install", "-q", *wanted, cwd=folder)
    return python
