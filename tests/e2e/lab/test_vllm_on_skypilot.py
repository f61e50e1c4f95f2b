"""Once with a real engine: vLLM as a replica on SkyPilot, from a commit to words through the router."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config_text import HEAD
from tests.e2e.lab.lab import Lab
from tests.e2e.lab.lab_site import deployment, lab_site, routed_traffic
from tests.e2e.real.vllm_install import install

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skypilot,
    pytest.mark.vllm,
    pytest.mark.timeout(3600),
]


def smollm2(model: Path) -> str:
    return (
        HEAD.format(kind="Function", name="smollm2")
        + f"""\
  model: {{uri: {model}}}
  runtime:
    engine: vllm
    maxModelLen: 2048
    args: [--dtype=bfloat16, --block-size=32, --max-num-seqs=8, --enforce-eager]
    env:
      HF_HUB_OFFLINE: "1"
      TRANSFORMERS_OFFLINE: "1"
      VLLM_NO_USAGE_STATS: "1"
      DO_NOT_TRACK: "1"
      VLLM_CPU_KVCACHE_SPACE: "1"
      PYTHONHASHSEED: "0"
  resources: {{gpu: {{types: [H100], count: 1}}}}
  readiness: {{initialDelay: 10m, timeout: 5s, interval: 2s, failureThreshold: 5}}
"""
    )


async def test_a_commit_becomes_words_of_a_real_model(lab: Lab, tmp_path: Path) -> None:
    installed = install()
    async with lab_site(tmp_path, lab) as site, routed_traffic(site) as clients:
        site.repo.commit(
            {
                "functions/smollm2.yaml": smollm2(installed.model),
                "deployments/smollm2.yaml": deployment("smollm2"),
            }
        )
        site.reconcile()
        await site.reaches(
            "a replica of vLLM is routed to",
            lambda r: len(r.get("smollm2", ())) == 1,
            timeout_s=1200,
        )
        answer = await clients.say("smollm2", "What is the capital of France?")
        assert not answer.wrong
        assert "Paris" in answer.text
        site.repo.commit({"deployments/smollm2.yaml": None})
        await site.emptied("smollm2")
