"""What the lab consists of: paths, addresses, nodes. Pure; inside and outside read the same file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SKYPILOT = "0.14.1"
CLUSTER = "lab"
"""Name of the Slurm cluster: placements say `slurm/lab`."""
PARTITION = "all"
USER = "labuser"
UID = 64_990
GPUS_A_NODE = 8
CPUS_A_NODE = 64
MEMORY_MB_A_NODE = 512_000
NODES_BY_GPU = {"H100": 8, "L4": 2}
"""Each node takes one replica, so that all of them may use the same port; draining ones count too."""
NETWORK = "10.89.46"
LINK = "detoserve-lab"
"""The host's end of the only cable into the lab (interface names have at most 15 bytes)."""
HOST_ADDRESS = f"{NETWORK}.254"
LAB_ADDRESS = f"{NETWORK}.1"
API_PORT = 46580
API_URL = f"http://{LAB_ADDRESS}:{API_PORT}"


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    address: str
    gpu: str


NODES = tuple(
    Node(f"n{number}", f"{NETWORK}.{number}", gpu)
    for number, gpu in enumerate(
        (gpu for gpu, count in NODES_BY_GPU.items() for _ in range(count)), start=11
    )
)


@dataclass(frozen=True, slots=True)
class Layout:
    """`folder` holds one lab and goes with it; `install` and `code` are used again."""

    folder: Path
    install: Path
    """SkyPilot's environment (install.py)."""
    programs: Path
    """Folder of what replicas run: all of it is on PATH in the lab, as /usr/local/bin."""

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def python(self) -> Path:
        return self.install / "venv" / "bin" / "python"

    @property
    def user_home(self) -> Path:
        return self.folder / "user"

    @property
    def environ(self) -> dict[str, str]:
        """Of everything that runs in the lab as root."""
        return {
            "HOME": str(self.folder / "home"),
            "PATH": f"{self.install}/venv/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "DETOSERVE_LAB": str(self.folder),
            "SLURM_CONF": str(self.folder / "etc/slurm.conf"),
            "SKYPILOT_API_SERVER_ENDPOINT": API_URL,
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        }
