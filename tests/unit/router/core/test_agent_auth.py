"""Who may speak for a cluster's engines: its agent, once, now."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.agent_auth import (
    NOT_AUTHENTICATED,
    AgentGate,
    AgentKeys,
    AgentRefused,
    replicas_of,
)
from schemas.wire import agent_signature
from schemas.wire.routing import Arm, Cluster, Function, Replica, RoutingTable

KEY, OTHER = b"k" * 32, b"o" * 32
NOW = 1_790_000_000.0


def sha(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def table(**hashes: str) -> RoutingTable:
    clusters = tuple(Cluster(name=name, agent_key_sha256=h) for name, h in hashes.items())
    arms = tuple(
        Arm(deployment="d", cluster=name, replicas=(Replica(id=f"{name}-r", url=f"http://{name}"),))
        for name in hashes
    )
    function = Function(name="f", served_name="f", arms=arms)
    return RoutingTable(
        generation=1, revision="r", published_at=1.0, clusters=clusters, functions=(function,)
    )


TABLE = table(east=sha(KEY), west=sha(OTHER), open="")


def headers(key: bytes = KEY, body: bytes = b"body", **parts: Any) -> dict[str, str]:
    signed = {"cluster": "east", "timestamp": f"{NOW:.3f}", "nonce": "0" * 32, **parts}
    return {
        agent_signature.CLUSTER_HEADER: signed["cluster"],
        agent_signature.TIMESTAMP_HEADER: signed["timestamp"],
        agent_signature.NONCE_HEADER: signed["nonce"],
        agent_signature.SIGNATURE_HEADER: agent_signature.sign(key, body=body, **signed),
    }


def gate(*keys: bytes) -> AgentGate:
    return AgentGate(AgentKeys(keys or (KEY, OTHER)))


def refusal(
    gate: AgentGate, headers: dict[str, str], table: RoutingTable = TABLE, **given: Any
) -> str:
    with pytest.raises(AgentRefused) as caught:
        gate.check(headers, given.get("body", b"body"), table, given.get("now", NOW))
    return str(caught.value)


def test_a_signed_post_passes_once() -> None:
    door = gate()
    assert door.check(headers(), b"body", TABLE, NOW) == "east"
    assert "before" in refusal(door, headers())
    assert door.check(headers(nonce="1" * 32), b"body", TABLE, NOW) == "east"
    # Long after, its time refuses it where its nonce is forgotten.
    assert "clocks" in refusal(door, headers(), now=NOW + 1000)


@pytest.mark.parametrize(
    "changed",
    [
        headers(OTHER),  # the key of another cluster
        headers(cluster="open"),
        headers(cluster="nowhere"),
        headers(sha(KEY).encode()),  # what stands in Git makes no signature
        headers(bytes.fromhex(sha(KEY))),
        headers(body=b"another body"),
        {**headers(), agent_signature.NONCE_HEADER: "2" * 32},
        {**headers(), agent_signature.TIMESTAMP_HEADER: f"{NOW + 1:.3f}"},
        {**headers(), agent_signature.CLUSTER_HEADER: "west"},
        {**headers(), agent_signature.SIGNATURE_HEADER: ""},
        {**headers(), agent_signature.SIGNATURE_HEADER: "v1=\udce4"},
        {},
    ],
)
def test_everything_else_is_refused_alike(changed: dict[str, str]) -> None:
    assert refusal(gate(), changed) == NOT_AUTHENTICATED


@pytest.mark.parametrize("timestamp", ["0", "nan", "inf", "", "soon", f"{NOW + 61:.3f}"])
def test_another_time_is_refused(timestamp: str) -> None:
    assert "clocks" in refusal(gate(), headers(timestamp=timestamp))


def test_a_key_counts_as_long_as_git_names_it() -> None:
    door = gate()
    assert door.check(headers(), b"body", TABLE, NOW) == "east"
    rotated = table(east=sha(OTHER))
    assert refusal(door, headers(nonce="1" * 32), rotated) == NOT_AUTHENTICATED
    assert door.check(headers(OTHER, nonce="2" * 32), b"body", rotated, NOW) == "east"
    # A hash that no router has the key of opens nothing.
    assert refusal(gate(OTHER), headers()) == NOT_AUTHENTICATED


def test_nonces_are_forgotten_when_their_time_refuses_them() -> None:
    door = gate()
    for i in range(50):
        stamp = NOW + 10 * i
        door.check(headers(nonce=f"{i:032}", timestamp=f"{stamp:.3f}"), b"body", TABLE, stamp)
    assert len(door._seen) <= 13


def test_an_agent_speaks_of_its_own_cluster() -> None:
    assert replicas_of(TABLE, "east") == {"east-r": "http://east"}
    assert replicas_of(TABLE, "nowhere") == {}


@given(body=st.binary(), other=st.binary(), cluster=st.text(), nonce=st.text())
def test_a_signature_is_of_one_body(body: bytes, other: bytes, cluster: str, nonce: str) -> None:
    cluster, nonce = (t.encode("utf-8", "replace").decode() for t in (cluster, nonce))
    parts = {"cluster": cluster, "timestamp": "1", "nonce": nonce}
    signature = agent_signature.sign(KEY, body=body, **parts)
    assert agent_signature.verify(KEY, signature, body=other, **parts) == (body == other)
    assert not agent_signature.verify(OTHER, signature, body=body, **parts)
