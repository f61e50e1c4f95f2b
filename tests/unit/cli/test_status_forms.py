"""Status documents as tables, in full and as JSON: golden, whole."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from reconciler.cli.status_view import (
    StatusView,
    object_lines,
    status_json,
    status_view,
    table_lines,
)
from reconciler.cli.terminal import plain

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
REVISION = "0123456789abcdef0123456789abcdef01234567"


def condition(kind: str, status: str, reason: str, message: str) -> dict[str, Any]:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": "2026-11-23T11:55:00Z",
    }


def document(kind: str, name: str, *conditions: dict[str, Any], **status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "detoserve.ai/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "status": {"observedRevision": REVISION, **status, "conditions": list(conditions)},
    }


def summary(**more: Any) -> dict[str, Any]:
    routing = {"generation": 7, "revision": REVISION, "routers": 1}
    return {"kind": "Summary", "revision": REVISION, "routing": routing, **more}


SERVING = condition("Ready", "True", "Serving", "2 of 2 replicas ready")
WAITING = condition("Ready", "False", "Progressing", "0 of 1 replicas ready")
ACCEPTED = condition("Ready", "True", "Accepted", "in effect")
CHAT = document("Deployment", "chat", SERVING, replicas={"wanted": 2, "ready": 2, "updated": 2})
EMBED = document(
    "Deployment",
    "embed",
    WAITING,
    condition("Reconciling", "True", "Progressing", "converging"),
    condition("Degraded", "True", "ReplicasFailing", "embed-1 failed: no such model"),
    replicas={"wanted": 1, "ready": 0, "updated": 0},
)
SPARE = document(
    "Function",
    "spare",
    condition("Ready", "False", "NotDeployed", "no Deployment runs it"),
    deployments=[],
)


def table(view: StatusView, width: int | None = None) -> str:
    return "\n".join(table_lines(view, NOW, plain, width))


def test_table() -> None:
    tenant = document("Tenant", "acme", ACCEPTED)
    view = status_view("c", [tenant, SPARE, EMBED, summary(), CHAT])
    assert (
        table(view)
        == """\
0123456789: 3 of 4 objects as wanted; routing table 7 on 1 router

NAME              READY  REPLICAS  REVISION    AGE  MESSAGE
Deployment/chat   yes    2/2       0123456789  5m   2 of 2 replicas ready
Deployment/embed  no     0/1       0123456789  5m   embed-1 failed: no such model
Function/spare    idle   -         0123456789  5m   no Deployment runs it
Tenant/acme       yes    -         0123456789  5m   in effect"""
    )
    assert not view.fine


def test_trouble_stands_on_top() -> None:
    view = status_view(
        "c",
        [
            CHAT,
            summary(
                source="the remote does not answer",
                refused=["5 of 5 workloads would be deleted"],
                problems=["a.yaml:1:2: bad"],
            ),
        ],
    )
    assert table(view).splitlines()[1:4] == [
        "config repo: the remote does not answer",
        "refused: 5 of 5 workloads would be deleted",
        "problem: a.yaml:1:2: bad",
    ]
    assert not view.fine


def test_messages_are_cut_to_the_terminal() -> None:
    lines = table(status_view("c", [summary(), EMBED]), 80).splitlines()
    assert max(len(line) for line in lines[2:]) <= 80
    assert lines[-1].endswith("...")


def test_an_invalid_object_is_not_fine_though_its_last_good_version_serves() -> None:
    stalled = condition("Stalled", "True", "Invalid", "the last good version stays in effect; x")
    view = status_view("c", [document("Deployment", "chat", SERVING, stalled)])
    assert not view.fine
    assert view.objects[0].ready is True
    assert "the last good version stays" in table(view)


def test_a_function_waits_for_its_deployments() -> None:
    no_replicas = condition("Ready", "False", "NoReplicas", "no replica is ready")
    waiting = document("Function", "embed", no_replicas, deployments=["embed"])
    suspended = document(
        "Deployment", "embed", condition("Ready", "True", "Suspended", "0 of 0 replicas ready")
    )
    assert not status_view("c", [waiting, EMBED]).fine
    assert status_view("c", [waiting, suspended]).fine


def test_unknown_is_neither() -> None:
    unknown = condition("Ready", "Unknown", "BackendUnknown", "cannot be asked")
    view = status_view("c", [document("Deployment", "chat", unknown)])
    assert "unknown" in table(view)
    assert not view.fine


def test_foreign_documents_are_left_out() -> None:
    view = status_view("c", [{"kind": "Deployment"}, {"a": 1}, CHAT])
    assert [one.key for one in view.objects] == ["Deployment/chat"]
    assert view.revision == ""


def test_one_object_in_full() -> None:
    chat = document(
        "Deployment",
        "chat",
        SERVING,
        source="deployments/chat.yaml:3:1",
        workload="chat--local",
        cluster="local",
        replicas={"wanted": 2, "ready": 2, "updated": 2},
        endpoints=[{"replica": "chat-1", "url": "http://127.0.0.1:4001", "phase": "ready"}],
        notActedOnYet=["spec.rollout.gates"],
    )
    one = status_view("c", [chat]).find("deployment", "chat")
    assert one is not None
    assert (
        "\n".join(object_lines(one, NOW, plain))
        == """\
Deployment/chat  yes
  source       deployments/chat.yaml:3:1
  revision     0123456789ab
  workload     chat--local
  cluster      local
  replicas     2 wanted, 2 ready, 2 updated
  idle fields  spec.rollout.gates
  endpoints
    chat-1  ready  http://127.0.0.1:4001
  conditions
    Ready  True  Serving  5m
      2 of 2 replicas ready"""
    )


def test_json() -> None:
    data = status_json(status_view("abc", [summary(), CHAT, EMBED]))
    assert data["commit"] == "abc"
    assert data["ready"] is False
    assert [(o["object"], o["ready"], o["fine"]) for o in data["objects"]] == [
        ("Deployment/chat", True, True),
        ("Deployment/embed", False, False),
    ]
    assert data["objects"][0]["since"] == "2026-11-23T11:55:00Z"
