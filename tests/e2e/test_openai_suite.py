"""OpenAI's own client tests, straight at a mock of OpenAI's API and through the router to it.

They prove that requests and answers pass untouched. No test streams: the mock answers JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.e2e import foreign_suites
from tests.e2e.ready_process import ready_process
from tests.support import eventually_sync, free_port

KEY = "My API Key"
"""What the suite sends: a key from elsewhere, known by its hash alone."""
MODELS = (
    "gpt-3.5-turbo-instruct",
    "gpt-4o",
    "gpt-4o-mini",
    "gpt-5.1",
    "gpt-5.4",
    "gpt-5.6-sol",
    "model",
    "text-embedding-3-small",
)
REQUIREMENTS = (
    f"openai[aiohttp]=={foreign_suites.OPENAI_VERSION}",
    *("pytest==9.2.0", "pytest-asyncio==1.5.0", "pytest-xdist==3.8.0", "inline-snapshot==0.36.1"),
    *("respx==0.23.1", "dirty-equals==0.11", "rich==15.0.0", "trio==0.35.0"),
)
TESTS = (
    "chat",
    "test_completions.py",
    "test_embeddings.py",
    "test_models.py",
    "responses",
    "test_responses.py",
)


@contextmanager
def mock_of_openai(command: Path, description: Path, log: Path) -> Iterator[str]:
    port = free_port()
    formats = [
        f"--validator-{place}-{kind}-format=brackets"
        for place in ("query", "form")
        for kind in ("array", "object")
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [command, "--quiet", "--host", "127.0.0.1", "-p", str(port), *formats, description],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        assert process.poll() is None, log.read_text()[-2000:]
        with urllib.request.urlopen(f"{url}/_x-steady/health", timeout=2) as answer:
            return bool(answer.status == 200)

    try:
        eventually_sync(healthy, timeout_s=30)
        yield url
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def router(engine_url: str, folder: Path) -> Iterator[str]:
    """Our router, to which the mock is an engine whose paths have no `/v1`."""
    function = {
        "name": "openai",
        "served_name": MODELS[0],
        "aliases": MODELS[1:],
        "tasks": ["chat", "completions", "embeddings", "responses"],
        "arms": [
            {
                "deployment": "openai",
                "cluster": "elsewhere",
                # One tenant's own, so that it may see what is stored there.
                "tenants": ["team"],
                "replicas": [{"id": "openai-0", "url": engine_url, "api_path": ""}],
            }
        ],
    }
    tenant = {
        "name": "team",
        "models": ["*"],
        "keys": [{"id": "imported", "sha256": sha256(KEY.encode()).hexdigest()}],
    }
    routes = folder / "routes.json"
    routes.write_text(json.dumps({"functions": [function], "tenants": [tenant]}))
    with ready_process(
        "router", "--port", 0, "--admin-port", 0, "--routes", routes, "--probe-interval-s", 0
    ) as url:
        yield url


def outcomes(python: Path, suite: Path, base_url: str, report: Path) -> dict[str, str]:
    """Test -> passed, or how it did not."""
    done = subprocess.run(
        [
            *(python, "-m", "pytest", "-q", "--tb=short", "-n", "2", f"--junitxml={report}"),
            *(f"tests/api_resources/{name}" for name in TESTS),
        ],
        cwd=suite,
        env={**os.environ, "TEST_API_BASE_URL": base_url},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found = {}
    for case in ET.parse(report).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = f"{bad[0].tag}: {(bad[0].get('message') or '')[:300]}" if bad else "passed"
    return found


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_no_test_fewer_passes_through_the_router_than_straight_at_the_mock(tmp_path):
    command = foreign_suites.steady()
    python = foreign_suites.environment(
        f"openai-{foreign_suites.OPENAI_VERSION}-tests", *REQUIREMENTS
    )
    suite = foreign_suites.openai_tests(python)
    description = foreign_suites.openai_openapi(python)
    with mock_of_openai(command, description, tmp_path / "mock.log") as mock:
        straight = outcomes(python, suite, mock, tmp_path / "straight.xml")
        with router(mock, tmp_path) as url:
            through = outcomes(python, suite, f"{url}/v1", tmp_path / "through.xml")
    passed = {name for name, outcome in straight.items() if outcome == "passed"}
    print(f"{len(passed)} of {len(straight)} tests pass straight at the mock")
    # The package's file is younger than the client; the client's own file answers all of its tests.
    least = 430 if foreign_suites.OPENAPI_VARIABLE in os.environ else 380
    assert len(passed) >= least, [o for o in straight.values() if o != "passed"][:5]
    assert {name: through.get(name) for name in passed if through.get(name) != "passed"} == {}
