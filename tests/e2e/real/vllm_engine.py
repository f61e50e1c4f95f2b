"""One real vLLM engine as a process, which a test may kill and start again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.real.vllm_install import VllmInstall
from tests.support import eventually_sync, free_port

SERVED_NAME = "smollm2"
BLOCK_TOKENS = 32
BLOCKS = 1024
"""Some 32,000 tokens: what the tests ask is never evicted."""
MAX_MODEL_LEN = 4096


@dataclass
class VllmEngine:
    """`url` stays the same over restarts, as do the addresses of its KV events."""

    install: VllmInstall
    folder: Path
    name: str
    port: int = field(default_factory=free_port)
    events_port: int = field(default_factory=free_port)
    replay_port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None
    _started_at: float = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")

    def start(self) -> None:
        """Returns at once; `wait_ready` waits, so that two engines can start side by side."""
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "topic": f"kv@{self.name}",
            "endpoint": f"tcp://*:{self.events_port}",
            "replay_endpoint": f"tcp://*:{self.replay_port}",
            "buffer_steps": 1000,
        }
        self._started_at = time.monotonic()
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self.install.program, "serve", self.install.model),
                    *("--host", "127.0.0.1", "--port", str(self.port)),
                    *("--served-model-name", SERVED_NAME, "--dtype", "bfloat16"),
                    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8"),
                    *("--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(BLOCKS)),
                    *("--enforce-eager", "--enable-prompt-tokens-details"),
                    *("--kv-events-config", json.dumps(events)),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.install.environ,
                cwd=self.folder,
                start_new_session=True,
            )

    def wait_ready(self) -> float:
        """Seconds from its start until it answered /health."""

        def ready() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise SystemExit(f"vLLM ended with {self._process.returncode}: {self.log[-3000:]}")
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)

        eventually_sync(ready, timeout_s=600, what=f"{self.name} healthy")
        return time.monotonic() - self._started_at

    def kill(self) -> None:
        """All of its processes at once, with no word to anybody."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
