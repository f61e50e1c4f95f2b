"""docs/cli.md names every field of the JSON that scripts rely on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reconciler.cli.plan_view import view_json
from reconciler.cli.problem_lines import problem_json
from reconciler.cli.status_view import status_json, status_view
from reconciler.cli.usage_view import UsageView, usage_json
from reconciler.core.config import Location, Problem
from reconciler.core.ledger import Row, Sums
from tests.unit.cli.config_repo import BASE, planned

DOCS = (Path(__file__).resolve().parents[3] / "docs" / "cli.md").read_text()


def names(value: Any) -> Iterator[str]:
    match value:
        case dict():
            for name, item in value.items():
                yield name
                # What people wrote in their repo is theirs, and status is documented in Git.
                if name not in ("before", "after", "status"):
                    yield from names(item)
        case list():
            for item in value:
                yield from names(item)
        case _:
            pass


@pytest.mark.parametrize(
    ("form", "data"),
    [
        ("plan --format json", view_json(planned(BASE, BASE.replace("=1", "=3")))),
        (
            "status --output json",
            status_json(
                status_view(
                    "c",
                    [{"kind": "Tenant", "metadata": {"name": "a"}, "status": {"conditions": []}}],
                )
            ),
        ),
        (
            "usage --output json",
            usage_json(
                UsageView("2026-11", "c", {"2026-11-23": {Row("t", "k", "f"): Sums(1)}}), "key"
            ),
        ),
        ("validate --output json", {"problems": [problem_json(Problem(Location("x"), "bad"))]}),
    ],
)
def test_every_field_is_documented(form: str, data: dict[str, Any]) -> None:
    section = DOCS.split(f"`{form}`\n", 1)[1].split("\n`", 1)[0]
    missing = [
        name
        for name in names(data)
        if f"`{name}`" not in section
        and f".{name}`" not in section
        and f"`{name}[]`" not in section
    ]
    assert missing == []
