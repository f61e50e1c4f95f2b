"""A Slurm cluster and a SkyPilot API server on this machine, as tests and people use them.

Everything runs in namespaces whose first process is `inside.py`: ending that one ends all. Not here:
what it consists of (layout, slurm_files), or what the reconciler does with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.foreign_suites import shared_folder
from tests.e2e.lab import install, programs
from tests.e2e.lab.layout import API_URL, HOST_ADDRESS, LINK, Layout
from tests.e2e.real.vllm_install import vllm_program
from tests.support import eventually_sync

DEFAULT_FOLDER = Path("/var/tmp/detoserve-lab")
"""Not below /tmp: the lab has a /tmp of its own."""
_ROOT = Path(__file__).parents[3]
_NAMESPACES = ("--pid", "--mount", "--uts", "--net")


@dataclass(frozen=True, slots=True)
class Job:
    """A Slurm job that holds nodes, or waits for one."""

    id: str
    name: str
    state: str
    node: str


class Lab:
    """One lab; there can be one at a time on a machine."""

    def __init__(self, layout: Layout) -> None:
        self.at = layout
        self._outer: subprocess.Popen[bytes] | None = None
        """Of a lab that this process started."""

    @classmethod
    def found(cls, folder: Path = DEFAULT_FOLDER) -> Lab | None:
        """The lab that runs there."""
        try:
            raw = json.loads((folder / "layout.json").read_text())
        except OSError:
            return None
        lab = cls(Layout(**{name: Path(value) for name, value in raw.items()}))
        return lab if lab._first_pid() is not None else None

    @classmethod
    def start(cls, folder: Path = DEFAULT_FOLDER) -> Lab:
        """Brings one up and returns when all of it answers; what lies in the folder is removed."""
        install.check_machine()
        sky, agent = install.skypilot(), install.agent_python()
        if (old := cls.found(folder)) is not None:
            old.stop()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o755)
        lab = cls(Layout(folder, sky, folder / "programs"))
        lab.at.programs.mkdir()
        vllm = vllm_program(shared_folder())
        programs.write(lab.at.programs, skypilot=sky, agent_python=agent, vllm=vllm)
        (folder / "layout.json").write_text(json.dumps(asdict(lab.at), default=str))
        with (folder / "lab.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *("unshare", *_NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc"),
                    *(sys.executable, "-m", "tests.e2e.lab.inside", folder / "layout.json"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(_ROOT)},
                start_new_session=True,
            )
        lab._outer = process
        (folder / "unshare.pid").write_text(f"{process.pid}")
        try:
            lab._plug_in()

            ready = folder / "ready"
            eventually_sync(
                lambda: ready.exists() or process.poll() is not None,
                timeout_s=120,
                what="the lab is up",
            )
            assert ready.exists(), (folder / "lab.log").read_text()[-3000:]
            lab.wait_api()
        except BaseException:
            lab.stop(keep=True)
            raise
        return lab

    def stop(self, *, keep: bool = False) -> None:
        """Ends every process of the lab; `keep` leaves its files and logs."""
        if (first := self._first_pid()) is not None:
            process = psutil.Process(first)
            process.kill()
            process.wait(30)
            # Networks are taken apart a moment later.
            cable = Path("/sys/class/net") / LINK
            eventually_sync(lambda: not cable.exists(), timeout_s=10, what="the cable is gone")
        if self._outer is not None:
            self._outer.wait(30)
        if not keep:
            shutil.rmtree(self.at.folder, ignore_errors=True)

    def _first_pid(self) -> int | None:
        """Of the lab's first process, as seen from here."""
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            outer = psutil.Process(int((self.at / "unshare.pid").read_text()))
            if outer.name() == "unshare":
                return next((child.pid for child in outer.children()), None)
        return None

    def _plug_in(self) -> None:
        """Lays the cable between the machine and the lab; the lab's end waits for it."""
        first = eventually_sync(self._first_pid, timeout_s=10, what="the lab's first process")
        mine = Path("/proc/self/ns/net").readlink()
        eventually_sync(lambda: Path(f"/proc/{first}/ns/net").readlink() != mine)
        ends = ("name", LINK, "type", "veth", "peer", "name", "uplink", "netns", str(first))
        for command in (
            ("ip", "link", "add", *ends),
            ("ip", "address", "add", f"{HOST_ADDRESS}/24", "dev", LINK),
            ("ip", "link", "set", LINK, "up"),
        ):
            subprocess.run(command, check=True)

    def run(self, *command: object, user: str | None = None) -> str:
        """What a command prints that runs inside the lab, as root or as a user of Slurm."""
        words = [str(word) for word in command]
        if user is not None:
            words = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", *words]
        done = subprocess.run(
            ["nsenter", "--target", str(self._first_pid()), *_NAMESPACES, *words],
            capture_output=True,
            text=True,
            env=self.at.environ,
            cwd="/",
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stderr}{done.stdout}"
        return done.stdout.strip()

    def jobs(self) -> list[Job]:
        """Slurm's jobs that are not over."""
        lines = self.run("squeue", "--noheader", "--format", "%A|%j|%T|%N").splitlines()
        return [Job(*line.split("|")) for line in lines]

    def cancel(self, job: Job) -> None:
        """As its administrator, or a node that fails, would end a replica under SkyPilot's feet."""
        self.run("scancel", job.id)

    def services(self) -> dict[str, dict[str, Any]]:
        """Name -> row, as the API server says; without our client, which is what is tested.

        A status that is asked for just as a service goes may fail in SkyPilot: asked again.
        """
        for _ in range(30):
            try:
                return self._services()
            except urllib.error.HTTPError as error:
                if error.code != 500:
                    raise
            time.sleep(1)
        return self._services()

    def _services(self) -> dict[str, dict[str, Any]]:
        me = {"SKYPILOT_USER_ID": "1ab01ab0", "SKYPILOT_USER": "lab"}
        body = json.dumps({"service_names": None, "env_vars": me}).encode()
        asked = urllib.request.Request(
            f"{API_URL}/serve/status", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=30) as answer:
            request_id = answer.headers["X-Skypilot-Request-ID"]
        with urllib.request.urlopen(f"{API_URL}/api/get?request_id={request_id}", timeout=120) as a:
            rows = json.loads(json.load(a)["return_value"])
        return {row["name"]: row for row in rows}

    def wait_api(self) -> float:
        """Seconds until the API server is healthy."""
        began = time.monotonic()

        def healthy() -> bool:
            with urllib.request.urlopen(f"{API_URL}/api/health", timeout=5) as answer:
                return bool(json.load(answer)["status"] == "healthy")

        eventually_sync(healthy, timeout_s=90, what="SkyPilot's API server healthy")
        return time.monotonic() - began

    def kill_api_server(self) -> None:
        """The server and its workers at once. Controllers of services live on."""
        self.run("pkill", "-KILL", "--session", (self.at / "state/api.pid").read_text())

    def start_api_server(self) -> float:
        """Seconds until it answered."""
        psutil.Process(self._first_pid()).send_signal(signal.SIGUSR1)
        return self.wait_api()
