"""DetoServe over two vLLM engines: config repo, reconciler, agent and router, as on servers.

The engines are external ones: somebody else starts and kills them, which here is the test.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from reconciler.publish.valkey import EmbeddedValkey
from schemas import api_keys
from schemas.wire import redis_keys
from schemas.wire.events import EngineReport
from tests.config_text import HEAD, cluster, tenant
from tests.e2e.ready_process import ready_line
from tests.e2e.real.vllm_engine import SERVED_NAME, VllmEngine
from tests.e2e.reconcile_process import PLATFORM, Site
from tests.support import eventually

AGENT = str(Path(sys.executable).parent / "detoserve-agent")
TENANTS = {"acme": api_keys.create(), "other": api_keys.create()}

FUNCTION = (
    HEAD.format(kind="Function", name=SERVED_NAME)
    + """\
  model: {uri: "hf://HuggingFaceTB/SmolLM2-135M-Instruct"}
  runtime: {engine: vllm}
  readiness: {timeout: 5s, interval: 500ms}
"""
)
RULES = "\n".join(
    f"Rule {number}: answer questions about topic {number} in plain words, and never guess."
    for number in range(1, 71)
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer. `engine` is the name of the one that gave it."""

    engine: str
    decision: str
    ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int


class VllmSite(Site):
    """`engines` by name; a router listens at `url`."""

    def __init__(self, folder: Path, redis_url: str, engines: list[VllmEngine]) -> None:
        super().__init__(folder, redis_url, owner="vllm")
        self.engines_by_name = {engine.name: engine for engine in engines}
        self.url = self.admin_url = ""
        self._names: dict[str, str] = {}
        endpoints = ", ".join(f"{{url: '{e.url}', function: {SERVED_NAME}}}" for e in engines)
        keys = {
            name: f"  keys: [{{id: {key.id}, sha256: {key.sha256}}}]\n"
            for name, key in TENANTS.items()
        }
        self.repo.commit(
            {
                "platform.yaml": PLATFORM,
                "clusters/here.yaml": cluster(
                    "here", provider=f"type: external, endpoints: [{endpoints}]"
                ),
                "functions/model.yaml": FUNCTION,
                "deployments/model.yaml": HEAD.format(kind="Deployment", name=SERVED_NAME)
                + f"  function: {SERVED_NAME}\n  shared: true\n  placement: {{cluster: here}}\n",
                **{f"tenants/{name}.yaml": tenant(name, more=keys[name]) for name in TENANTS},
            }
        )

    async def replicas(self) -> dict[str, str]:
        """Replica -> name of its engine, of those that are routed to."""
        arms = [arm for f in (await self.table()).functions for arm in f.arms]
        by_url = {engine.url: name for name, engine in self.engines_by_name.items()}
        found = {r.id: by_url[r.url] for arm in arms for r in arm.replicas if r.state == "ready"}
        self._names |= found
        return found

    def name_of(self, replica: str) -> str:
        return self._names[replica]

    async def reports(self) -> dict[str, EngineReport]:
        """What the agent says of each engine."""
        found = {}
        for replica, name in (await self.replicas()).items():
            if raw := await self.redis.get(redis_keys.engine(replica)):
                found[name] = msgspec.msgpack.decode(raw, type=EngineReport)
        return found

    async def router_says(self, metric: str) -> dict[str, float]:
        """One of the router's metrics: engine -> value, "" where it is of no replica."""
        async with (
            aiohttp.ClientSession(self.admin_url) as client,
            client.get("/metrics") as answer,
        ):
            text = await answer.text()
        samples = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"detoserve_router_{metric}"
        ]
        return {
            self._names.get(s.labels["replica"], "") if "replica" in s.labels else "": s.value
            for s in samples
        }

    async def message(self, name: str, *, tenant: str, **body: Any) -> int:
        """Sends one prompt as Anthropic's clients do; tokens of it that were in a cache."""
        asked = {
            "model": SERVED_NAME,
            "system": f"You serve {name}.\n{RULES}",
            "messages": [{"role": "user", "content": "Hello!"}],
            "max_tokens": 4,
            **body,
        }
        headers = {"x-api-key": TENANTS[tenant].text, "anthropic-version": "2023-06-01"}
        async with (
            aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(120)) as client,
            client.post("/v1/messages", json=asked, headers=headers) as answer,
        ):
            said = await answer.json()
            assert answer.status == 200, said
            return int(said["usage"].get("cache_read_input_tokens") or 0)

    async def both_followed(self) -> dict[str, EngineReport]:
        async def both() -> dict[str, EngineReport]:
            reports = await self.reports()
            assert len(reports) == len(self.engines_by_name), reports
            assert all(report.events for report in reports.values()), reports
            return reports

        return await eventually(both, timeout_s=60, what="the agent follows every engine")


class Conversation:
    """One user's messages, sent through the router turn by turn."""

    def __init__(self, site: VllmSite, name: str, *, tenant: str = "acme", **body: Any) -> None:
        self._site = site
        self._key = TENANTS[tenant].text
        self._body = body
        # What differs stands first, so that conversations share no cache.
        self._messages = [{"role": "system", "content": f"You serve {name}.\n{RULES}"}]

    async def say(self, text: str) -> Turn:
        self._messages.append({"role": "user", "content": text})
        body = {
            "model": SERVED_NAME,
            "messages": self._messages,
            "max_tokens": 12,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._body,
        }
        headers = {"Authorization": f"Bearer {self._key}"}
        ttft_s, usage, words = None, None, []
        timeout = aiohttp.ClientTimeout(120)
        async with aiohttp.ClientSession(self._site.url, timeout=timeout) as client:
            began = time.monotonic()
            async with client.post("/v1/chat/completions", json=body, headers=headers) as answer:
                route = answer.headers.get("x-detoserve-route", "")
                lines = []
                async for raw in answer.content:
                    line = raw.decode().rstrip()
                    lines.append(line)
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices", ()):
                        if choice["delta"].get("content"):
                            ttft_s = ttft_s or time.monotonic() - began
                            words.append(choice["delta"]["content"])
        assert answer.status == 200, lines
        assert ttft_s is not None, lines
        assert usage is not None, lines
        self._messages.append({"role": "assistant", "content": "".join(words)})
        return Turn(
            engine=self._site.name_of(route.partition(";")[0]),
            decision=route.rpartition("d=")[2],
            ttft_s=ttft_s,
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            answer_tokens=usage["completion_tokens"],
        )


@contextmanager
def _agent(site: VllmSite) -> Iterator[None]:
    with (site.folder / "agent.log").open("ab") as log:
        agent = subprocess.Popen(
            [
                *(AGENT, "run", "--redis-url", site.redis_url, "--id", "agent"),
                *("--routes-public-key", site.public_key(), "--poll-interval-s", "0.5"),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield
    finally:
        agent.terminate()
        agent.wait(20)


@asynccontextmanager
async def vllm_site(folder: Path, engines: list[VllmEngine]) -> AsyncIterator[VllmSite]:
    """All of it, once the router sends to every engine and the agent follows each."""
    async with EmbeddedValkey(folder / "valkey") as valkey:
        site = VllmSite(folder, valkey.url, engines)
        router = ready_line(
            *("router", "--port", 0, "--admin-port", 0, "--redis-url", valkey.url),
            *("--routes-public-key", site.public_key(), "--state-dir", folder / "router"),
        )
        try:
            site.start()
            with router as line, _agent(site):
                site.url, site.admin_url = line["url"], line["admin_url"]

                async def all_routed() -> bool:
                    return len(await site.replicas()) == len(engines)

                await eventually(all_routed, timeout_s=60, what="both engines are routed to")
                await site.both_followed()
                yield site
        finally:
            await site.close()
