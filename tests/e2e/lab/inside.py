"""The lab's first process: `inside.py LAYOUT.json`, in namespaces of its own.

Lays the lab out, starts munge, slurmctld, a slurmd for each node in a network of its own, sshd and
SkyPilot's API server, writes `ready`, and collects what ends; SIGUSR1 starts another API server. When it is killed the kernel ends
everything that ever ran in the lab, and the mounts, users and networks go with it.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.e2e.lab.layout import (
    API_PORT,
    GPUS_A_NODE,
    LAB_ADDRESS,
    NODES,
    UID,
    Layout,
)
from tests.e2e.lab.slurm_files import texts

_PRIVATE = ("passwd", "group", "shadow", "hosts")
"""Files of /etc that the lab has its own of."""


def do(*command: object, env: dict[str, str] | None = None) -> None:
    subprocess.run([str(word) for word in command], check=True, env=env)


def lay_out(at: Layout) -> None:
    for name in ("etc", "log", "state", "spool", "munge", "dev", "home", "user"):
        (at / name).mkdir(parents=True, exist_ok=True)
    for name, text in texts(at).items():
        file = at / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (at / "etc/prolog").chmod(0o755)
    (at / "etc/shadow").chmod(0o600)
    for key in ("id", "hostkey"):
        do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", at / f"etc/{key}")
    (at / "munge/key").write_bytes(os.urandom(1024))
    (at / "munge/key").chmod(0o400)
    os.chown(at / "user", UID, UID)
    for number in range(GPUS_A_NODE):
        os.mknod(at / f"dev/gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))


def mount(at: Layout) -> None:
    """What the lab changes of the machine, seen by nobody outside."""
    for place in ("/tmp", "/run"):
        do("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", place)
    for place in ("/run/sshd", "/run/netns"):
        Path(place).mkdir(mode=0o755)
    for name in _PRIVATE:
        do("mount", "--bind", at / f"etc/{name}", f"/etc/{name}")
    do("mount", "--bind", at.programs, "/usr/local/bin")


def network() -> None:
    """A switch, the cable to the machine (laid by whoever starts the lab), and one to each node."""
    show = ("ip", "link", "show", "uplink")
    until(
        lambda: subprocess.run(show, capture_output=True, check=False).returncode == 0,
        "nobody has laid the cable to the machine",
    )
    do("ip", "link", "set", "lo", "up")
    do("ip", "link", "add", "switch", "type", "bridge")
    do("ip", "address", "add", f"{LAB_ADDRESS}/24", "dev", "switch")
    cables = ["uplink"]
    for node in NODES:
        do("ip", "netns", "add", node.name)
        do(
            "ip",
            "link",
            "add",
            node.name,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            node.name,
        )
        within = ("ip", "-n", node.name)
        do(*within, "address", "add", f"{node.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            do(*within, "link", "set", link, "up")
        cables.append(node.name)
    for cable in cables:
        do("ip", "link", "set", cable, "master", "switch", "up")
    do("ip", "link", "set", "switch", "up")


def start_slurm(at: Layout) -> None:
    munge = at.folder / "munge"
    do(
        *("/usr/sbin/munged", f"--key-file={munge / 'key'}", f"--socket={munge / 'socket'}"),
        *(f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}"),
        f"--seed-file={munge / 'seed'}",
    )
    conf = at / "etc/slurm.conf"
    do("/usr/sbin/slurmctld", "-f", conf, env=at.environ)
    for node in NODES:
        (at / f"spool/{node.name}").mkdir()
        start = f"hostname {node.name}; exec /usr/sbin/slurmd -f {conf} -N {node.name}"
        # Not `ip netns exec`: it mounts a /sys without the cgroups that slurmd looks for.
        net = f"--net=/run/netns/{node.name}"
        do("nsenter", net, "unshare", "--uts", "sh", "-c", start, env=at.environ)
    do("/usr/sbin/sshd", "-f", at / "etc/sshd_config")
    idle = ["sinfo", "--noheader", "--format", "%D %t"]
    wanted = f"{len(NODES)} idle"
    until(lambda: output(idle, at) == wanted, f"Slurm's nodes are not all idle: {wanted}")


def start_api_server(at: Layout) -> None:
    """In a session of its own, so that it can be killed with its workers and nothing else."""
    with (at / "log/api.log").open("ab") as log:
        server = subprocess.Popen(
            [
                *(at.python, "-u", "-m", "sky.server.server"),
                *("--host", LAB_ADDRESS, "--port", str(API_PORT)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**at.environ, "IS_SKYPILOT_SERVER": "true"},
            cwd=at.folder,
            start_new_session=True,
        )
    (at / "state/api.pid").write_text(str(server.pid))


def output(command: list[str], at: Layout) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=at.environ, check=False)
    return done.stdout.strip()


def until(true: Callable[[], bool], otherwise: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(otherwise)
        time.sleep(0.1)


def main() -> None:
    at = Layout(**{k: Path(v) for k, v in json.loads(Path(sys.argv[1]).read_text()).items()})
    signal.signal(signal.SIGUSR1, lambda *_: start_api_server(at))
    lay_out(at)
    mount(at)
    network()
    do("hostname", "lab")
    start_slurm(at)
    # From here on no wheel is built any more, so that nothing is fetched for one.
    build = "from sky.backends import wheel_utils; wheel_utils.build_sky_wheel()"
    do(at.python, "-c", build, env=at.environ)
    start_api_server(at)
    (at / "ready").touch()
    while True:
        # A first process inherits every orphan.
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(1)


if __name__ == "__main__":
    main()
