"""A plan as text, as a pull request's comment and as JSON: golden, whole."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from reconciler.cli.plan_markdown import MAX_CHARACTERS, plan_markdown
from reconciler.cli.plan_text import plan_lines, value_text
from reconciler.cli.plan_view import PlanView, Row, view_json
from reconciler.cli.terminal import plain
from reconciler.core.action import Change
from reconciler.core.config import Location, Problem
from reconciler.core.observed import Unknown
from tests.unit.cli.config_repo import BASE, planned

CHANGED = (
    BASE.replace("minReplicas: 2", "minReplicas: 3")
    .replace("tensorParallel: 4", "tensorParallel: 8, maxModelLen: 4096")
    .replace("count: 4}", "count: 8}")
    .replace("models: [", "limits: {requestsPerMinute: 60}\n  models: [")
)


def text(view: PlanView) -> str:
    return "\n".join(plan_lines(view, plain))


def test_no_changes() -> None:
    assert (
        text(planned(BASE, BASE))
        == """\
From main
to   the files in .

Plan: no changes; 2 unchanged."""
    )


def test_roll_scale_and_what_restarts_nothing() -> None:
    assert (
        text(planned(BASE, CHANGED))
        == """\
From main
to   the files in .

  ~ Deployment/big in west: roll, 2 replicas replaced, rolling, with at most 1 more than wanted; 8 GPUs more meanwhile
      runtime.tensorParallel: 4 -> 8
      runtime.maxModelLen: 4096 (new)
      resources.gpu.count: 4 -> 8
  ~ Deployment/chat in here: scale, 1 replica started
      replicas: 2 -> 3

Without a restart:
  ~ Tenant/acme
      spec.limits: {"requestsPerMinute": 60} (new)

Replicas  4 -> 5
GPUs      8 -> 16 of 32 H100 in west
Price     $20.00 -> $40.00 an hour (about +$14,600 a month)

Plan: 1 to roll, 1 to scale, 1 changed without a restart; 0 unchanged."""
    )


def test_create_and_delete() -> None:
    without = BASE.rsplit("---", 1)[0]
    assert (
        text(planned(without, BASE))
        == """\
From main
to   the files in .

  + Deployment/big in west: create, 2 replicas started

Replicas  0 -> 2
GPUs      0 -> 8 of 32 H100 in west
Price     $0.00 -> $20.00 an hour (about +$14,600 a month)

Plan: 1 to create; 1 unchanged."""
    )
    assert (
        text(planned(BASE, without))
        == """\
From main
to   the files in .

  - Deployment/big in west: delete, 2 replicas drained and stopped
      Deployment/big no longer places it here

Replicas  2 -> 0
GPUs      8 -> 0 of 32 H100 in west
Price     $20.00 -> $0.00 an hour (about -$14,600 a month)

Plan: 1 to delete; 1 unchanged."""
    )


def test_keys_show_by_id_and_never_whole() -> None:
    more = BASE.replace('"}]', f'"}}, {{id: batch, sha256: "{"b" * 64}"}}]')
    shown = text(planned(BASE, more))
    assert 'spec.keys.batch: {"sha256": "bbbbbbbbbbbb..."} (new)' in shown
    assert "b" * 13 not in shown
    assert "spec.keys.web" not in shown


def test_held_back_by_the_prune_policy() -> None:
    nothing_left = BASE.split("---\napiVersion: detoserve.ai/v1alpha1\nkind: Deployment", 1)[0]
    view = planned(BASE, nothing_left)
    shown = text(view)
    assert "  ! Deployment/big in west: held, left as it is" in shown
    assert "refused: " in shown
    assert "Detoserve-Confirm-Deletions: 2 0123456789ab" in shown
    assert not view.changes_anything
    assert view.gpus[0].after == 8


def test_a_backend_that_cannot_be_asked() -> None:
    down = [Unknown("local", "no answer"), Unknown("skypilot", "no answer")]
    view = planned(BASE, BASE, observed=down)
    assert [row.verb for row in view.rows] == ["held", "held"]
    assert "backend local cannot be asked: no answer" in text(view)


def test_a_function_that_nobody_deploys_shows_its_fields() -> None:
    alone = BASE.replace("function: big", "function: chat")
    view = planned(alone, alone.replace("engine: vllm", "engine: sglang"))
    assert [(str(c.key), c.changes[0].path) for c in view.objects] == [
        ("Function/big", "spec.runtime.engine")
    ]


def test_markdown() -> None:
    problem = Problem(Location("a.yaml", 3, 1), "no `<b>` *here* @team | x")
    view = replace(planned(BASE, CHANGED), problems=(problem,), notes=("all is well",))
    assert (
        plan_markdown(view)
        == """\
<!-- detoserve plan -->
### Plan: 1 to roll, 1 to scale, 1 changed without a restart; 0 unchanged; 1 error in the repo

From `main` to `the files in .`.

**Problems**

- `a.yaml:3:1` error: no \\`&lt;b&gt;\\` \\*here\\* @\u200bteam \\| x

| | Deployment | Cluster | What | Replicas |
|---|---|---|---|---|
| `~` | `big` | `west` | roll: 2 replicas replaced, rolling, with at most 1 more than wanted; 8 GPUs more meanwhile | 2 |
| `~` | `chat` | `here` | scale: 1 replica started | 2 → 3 |

- Replicas 4 → 5
- GPUs 8 → 16 of 32 H100 in west
- Price $20.00 → $40.00 an hour (about +$14,600 a month)

<details><summary>Deployment/big in west: 3 fields</summary>

```diff
- runtime.tensorParallel: 4
+ runtime.tensorParallel: 8
+ runtime.maxModelLen: 4096
- resources.gpu.count: 4
+ resources.gpu.count: 8
```
</details>

<details><summary>Deployment/chat in here: 1 field</summary>

```diff
- replicas: 2
+ replicas: 3
```
</details>

<details><summary>1 changed without a restart</summary>

```diff
! Tenant/acme
    spec.limits: {"requestsPerMinute": 60} (new)
```
</details>

_all is well_
"""
    )


def test_markdown_fits_a_comment() -> None:
    changes = tuple(Change(f"runtime.args[{i}]", "x" * 90, "y" * 90) for i in range(50))
    rows = tuple(
        Row("roll", f"d{i}--west", f"d{i}", "west", "changed", "rolled", 1, 1, changes)
        for i in range(20)
    )
    comment = plan_markdown(PlanView("a", "b", rows))
    assert len(comment) <= MAX_CHARACTERS
    assert "Fields are left out" in comment
    assert "`d19`" in comment
    many = tuple(replace(rows[0], deployment=f"name-of-{i}") for i in range(2000))
    longer = plan_markdown(PlanView("a", "b", many))
    assert len(longer) <= MAX_CHARACTERS + 200
    assert longer.endswith("run `detoserve plan`.\n")


@given(st.text(), st.text())
def test_no_value_ends_the_block_it_stands_in(before: str, after: str) -> None:
    row = Row("roll", "d--c", "d", "c", "r", "e", 1, 1, (Change("p", before, after),))
    comment = plan_markdown(PlanView("a", "b", (row,)))
    assert sum(line.startswith("```") for line in comment.splitlines()) == 2


def test_json_is_complete_and_plain() -> None:
    data = json.loads(json.dumps(view_json(planned(BASE, CHANGED))))
    assert data["changes"] is True
    assert data["counts"] == {
        "create": 0,
        "roll": 1,
        "scale": 1,
        "delete": 0,
        "held": 0,
        "unchanged": 0,
    }
    assert data["workloads"][1] == {
        "verb": "scale",
        "workload": "chat--here",
        "deployment": "chat",
        "cluster": "here",
        "reason": "replicas 2 -> 3",
        "effect": "1 replica started",
        "replicas": {"before": 2, "after": 3},
        "changes": [{"path": "replicas", "before": 2, "after": 3}],
        "placement": "",
    }
    assert data["gpus"] == [
        {
            "cluster": "west",
            "type": "H100",
            "before": 8,
            "after": 16,
            "listed": 32,
            "pricePerHour": 2.5,
        }
    ]
    assert data["pricePerHour"] == {"before": 20.0, "after": 40.0}


def test_long_values_are_cut() -> None:
    assert value_text("x" * 1000).endswith("x...")
    assert value_text(None) == "null"
    assert value_text("é") == '"é"'
