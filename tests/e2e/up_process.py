"""`detoserve up` as a user runs it: the real command, a real repo, real processes."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
from git import Actor, Repo
from openai import OpenAI

DETOSERVE = str(Path(sys.executable).parent / "detoserve")
AUTHOR = Actor("A Person", "person@example.com")

Event = dict[str, Any]


class Up:
    """One running `detoserve up --output json`, its config repo and its events."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.config = folder / "detoserve-config"
        self.state_dir = folder / "state"
        self.folder = folder
        self.stderr = (folder / "stderr.txt").open("ab")
        home = folder / "home"
        home.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [
                *(DETOSERVE, "up", "--config", self.config, "--state-dir", self.state_dir),
                *("--port", "0", "--output", "json", *args),
            ],
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            cwd=folder,
            env={**os.environ, "HOME": str(home), "GIT_CONFIG_NOSYSTEM": "1"},
            text=True,
        )
        self.events: list[Event] = []
        self._clients: list[OpenAI] = []
        self._fresh: queue.Queue[Event | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._fresh.put(json.loads(line))
        self._fresh.put(None)

    def wait(self, true: Callable[[Event], bool], *, timeout_s: float = 60.0) -> Event:
        """The next event for which it is true; what was waited past is not seen again."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                event = self._fresh.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no such event in {timeout_s} s: {self.tail()}") from None
            if event is None:
                raise AssertionError(f"up ended with {self.process.wait()}: {self.tail()}")
            self.events.append(event)
            if true(event):
                return event

    def ready(self) -> Event:
        return self.wait(lambda e: e["event"] == "ready", timeout_s=90)

    def live(self, name: str, replicas: int, *, revision: str | None = None) -> Event:
        return self.wait(
            lambda e: (
                e["event"] == "deployment"
                and e["name"] == name
                and e["live"]
                and e["updated"] == replicas
                and (revision is None or e["revision"] == revision)
            )
        )

    def gone(self, name: str) -> Event:
        return self.wait(lambda e: e["event"] == "gone" and e["name"] == name)

    def tail(self) -> str:
        text = (self.folder / "stderr.txt").read_text(errors="replace")[-3000:]
        return f"last events {self.events[-8:]}\nstderr: {text}"

    def edit(self, path: str, change: Callable[[str], str | None], message: str = "Edit") -> str:
        """Changes (or with None removes) a file of the config repo and commits; the commit's id."""
        file = self.config / path
        before = file.read_text() if file.exists() else ""
        after = change(before)
        with Repo(self.config) as repo:
            if after is None:
                file.unlink()
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(after)
            repo.git.add(all=True)
            return repo.index.commit(message, author=AUTHOR, committer=AUTHOR).hexsha

    def replace(self, path: str, old: str, new: str, message: str = "Edit") -> str:
        def change(text: str) -> str:
            assert old in text, f"{old!r} not in {path}"
            return text.replace(old, new)

        return self.edit(path, change, message)

    def story(self) -> str:
        """Subjects and trailers of the status branch, newest first."""
        with Repo(self.config) as repo:
            return str(repo.git.log("--format=%s%n%b", "detoserve/status"))

    def client(self, ready: Event, *, key: str | None = None) -> OpenAI:
        """Closed with this: left to the collector its sockets may be found open."""
        client = OpenAI(
            base_url=ready["endpoint"], api_key=key or ready["api_key"], max_retries=0, timeout=30
        )
        self._clients.append(client)
        return client

    def metric(self, ready: Event, name: str) -> dict[str, float]:
        """A metric of the router by its replica."""
        with urlopen(ready["admin"] + "/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = [line.partition(" ") for line in lines if line.startswith(f"{name}{{")]
        return {labels.partition('"')[2].rstrip('"}'): float(value) for labels, _, value in found}

    def processes(self, running: str = "") -> list[psutil.Process]:
        """Everything that names this run's folder, the command itself included.

        With `running`, only what has that in its command line.
        """
        found = []
        # What ends while it is being looked at (git's children are short-lived) is passed over.
        for process in psutil.process_iter(["cmdline", "environ"]):
            command = " ".join(process.info["cmdline"] or ())
            text = command + " ".join((process.info["environ"] or {}).values())
            if running in command and str(self.state_dir) in text and process.pid != os.getpid():
                found.append(process)
        return found

    def stop(self, signum: int = signal.SIGINT, *, timeout_s: float = 40) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(timeout_s)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        assert self.process.stdout
        self.process.stdout.close()
        self.stderr.close()
