"""schemathesis against the router, by the router's own OpenAPI document: right and wrong requests."""

from __future__ import annotations

import json
import subprocess
import urllib.request

import pytest

from schemas import api_keys
from tests.e2e import foreign_suites
from tests.e2e.ready_process import ready_process

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
)


def with_model(document: dict[str, object], name: str) -> dict[str, object]:
    """The same document, of an API that has just this model: else hardly any would be met."""
    text = json.dumps(document)
    description = '{"type": "string", "description": "A function\'s name, served name or alias."}'
    assert description in text
    return json.loads(text.replace(description, json.dumps({"enum": [name]})))


@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["all", "positive"])
def test_what_the_openapi_document_says_is_so(tmp_path, mode):
    """All of it as it stands; then right requests for a model that there is, up to the engine."""
    python = foreign_suites.environment("schemathesis-4.32.5", "schemathesis==4.32.5")
    key = api_keys.create()
    with ready_process("agent.simulated", "--port", 0, "--itl-s", "0.0001") as engine:
        arm = {
            "deployment": "sim",
            "cluster": "here",
            "tenants": ["team"],
            "replicas": [{"id": "sim-0", "url": engine}],
        }
        table = {
            "functions": [{"name": "sim", "served_name": "simulated", "arms": [arm]}],
            "tenants": [
                {"name": "team", "models": ["*"], "keys": [{"id": key.id, "sha256": key.sha256}]}
            ],
        }
        routes = tmp_path / "routes.json"
        routes.write_text(json.dumps(table))
        with ready_process("router", "--port", 0, "--admin-port", 0, "--routes", routes) as url:
            with urllib.request.urlopen(f"{url}/openapi.json", timeout=5) as answer:
                document = json.load(answer)
            if mode == "positive":
                document = with_model(document, "sim")
            described = tmp_path / "openapi.json"
            described.write_text(json.dumps(document))
            done = subprocess.run(
                [
                    *(python.parent / "schemathesis", "run", described, "--url", url),
                    *("-H", f"Authorization: Bearer {key.text}", "--checks", ",".join(CHECKS)),
                    *("--mode", mode, "--phases", "examples,coverage,fuzzing"),
                    *("--max-examples", "12", "--generation-deterministic"),
                    *("--continue-on-failure", "--warnings", "off", "--no-color"),
                ],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
