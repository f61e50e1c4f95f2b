"""docs/kinds.md is what the models say now."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas import reference

PAGE = Path(__file__).parents[3] / "docs" / "kinds.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.render(), "run `just schemas`"


@pytest.mark.parametrize(
    "row",
    [
        "| `spec.model.uri` | string | **required** |",
        "| `spec.readiness.timeout` | duration above 0 | `15s` | Of one probe. |",
        "| `spec.runtime.secrets.*.fromEnv` | string |",
        "| `spec.keys[].notBefore` | instant |",
        "| `spec.provider` | with `type: slurm` |",
        "| `spec.provider.endpoints[].url` | string | **required** |",
        "| `spec.rollout.steps[].weightPercent` | integer 1 to 100 | **required** |",
        "| `spec.resources.memory` | size |  | Main memory, at least. |",
    ],
)
def test_a_row_says_where_what_and_what_otherwise(row: str) -> None:
    assert sum(line.startswith(row) for line in reference.render().splitlines()) == 1


def test_every_row_has_four_cells_and_a_meaning() -> None:
    rows = [line for line in reference.render().splitlines() if line.startswith("| `")]
    for row in rows:
        cells = row.replace("\\|", "").strip("|").split("|")
        assert len(cells) == 4, row
        assert cells[3].strip().endswith("."), row
