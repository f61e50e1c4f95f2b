"""What crosses processes: read as it was written, refused when it is not what it claims to be."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.wire import decisions, envelope, events, redis_keys, routing
from schemas.wire.envelope import EnvelopeInvalid, public_key_from_hex, public_key_hex, seal, unseal

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key()

text = st.text(max_size=12)
unix_s = st.floats(0, 4e9)
counts = st.integers(0, 2**53)
ceilings = st.none() | counts


def tuples(of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=2).map(tuple)


limits = st.builds(
    routing.Limits,
    requests_per_minute=ceilings,
    tokens_per_minute=ceilings,
    concurrent=ceilings,
)
tables = st.builds(
    routing.RoutingTable,
    generation=counts,
    revision=text,
    lease=counts,
    published_at=unix_s,
    max_table_age_s=unix_s,
    functions=tuples(
        st.builds(
            routing.Function,
            name=text,
            served_name=text,
            aliases=tuples(text),
            policy=st.builds(routing.Policy, name=text, retry_attempts=counts),
            price=st.builds(routing.Price, input=unix_s, cached_input=st.none() | unix_s),
            max_model_len=st.none() | counts,
            limits=limits,
            arms=tuples(
                st.builds(
                    routing.Arm,
                    deployment=text,
                    cluster=text,
                    weight=counts,
                    replicas=tuples(
                        st.builds(
                            routing.Replica,
                            id=text,
                            url=text,
                            state=st.sampled_from(["ready", "draining"]),
                        )
                    ),
                )
            ),
        )
    ),
    tenants=tuples(
        st.builds(
            routing.Tenant,
            name=text,
            keys=tuples(
                st.builds(
                    routing.Key,
                    id=text,
                    sha256=st.binary(min_size=32, max_size=32),
                    expires=st.none() | unix_s,
                    limits=limits,
                )
            ),
            limits=limits,
            suspended=st.booleans(),
        )
    ),
    clusters=tuples(st.builds(routing.Cluster, name=text, rtt_s=st.none() | unix_s)),
)

TABLE = routing.RoutingTable(
    generation=7,
    revision="9f3c1ab",
    lease=2,
    published_at=1_790_000_000.0,
    functions=(routing.Function(name="chat", served_name="chat"),),
)
FRESHNESS = routing.Freshness(generation=7, at=1_790_000_000.0)

EVENTS = [
    events.KvBatch(epoch=1, seq=2, cleared=True, removed=b"\x00" * 8, stored=b"\x01" * 16),
    events.EngineReport(replica="r", at=1.5, epoch=3, running=1, waiting=2, kv_usage=0.5),
    events.LoadBatch(
        router="a",
        seq=9,
        full=True,
        to="b",
        loads=(events.ReplicaLoad("r", 1, 2.0, 3.0, 4.0, 5.0, 6.0),),
        cached=(events.Cached("r", b"\x01" * 16),),
        samples=(events.PrefillSample("r", 0.0, 1000.0, 0.25),),
    ),
    events.AgentHeartbeat(id="a", at=1.5, cluster="c", replicas=("r",), problems={"r": "gone"}),
    events.AgentPost(
        heartbeat=events.AgentHeartbeat(id="a", at=1.5),
        reports=(events.EngineReport(replica="r", at=1.5),),
    ),
    events.AgentAnswer(replicas={"r": "http://r"}, refused={"s": "of another cluster"}),
    events.MonthToDate(requests=1, input_tokens=2, cost_nano_usd=3),
    events.RouterHeartbeat(id="a", at=1.0, generation=7, in_flight={"r": 1}, draining=True),
    events.SessionBatch(
        process="p", pins=(events.SessionPin(b"\x07" * 16, "r", 9.0),), released=(b"\x01",)
    ),
    decisions.Decision(
        id="d",
        at=1.0,
        router="a",
        tenant="t",
        function="f",
        operation="chat",
        generation=7,
        revision="9f3c1ab",
        policy="linear",
        chosen="r",
        candidates=(decisions.Considered("r", "d", "c", 0.1, 1.0, 1.0, 2.0, 0.5, 3, 64.0),),
        removed=(decisions.Removed("s", "draining"),),
        session=2**64 - 1,
        chain=b"\x00" * 16,
        outcome=decisions.Outcome(status=200, outcome="ok", ttft_s=0.5),
    ),
]


USED = events.UsageRecord(
    journal="j",
    seq=1,
    id="x",
    tenant="t",
    key="k",
    function="f",
    revision="9f3c1ab",
    replica="r",
    input_tokens=10,
    cached_tokens=5,
    output_tokens=3,
    cost_nano_usd=1_000_000,
    started_at=1.0,
    ttft_s=None,
    duration_s=2.0,
    outcome="ok",
)


@given(tables)
@settings(deadline=None)
def test_a_table_is_read_as_it_was_written(table: routing.RoutingTable) -> None:
    assert unseal(seal(table, KEY), routing.RoutingTable, PUBLIC) == table


def test_freshness_is_read_as_it_was_written() -> None:
    assert unseal(seal(FRESHNESS, KEY), routing.Freshness, PUBLIC) == FRESHNESS


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_is_read_as_it_was_written(event: events.Event) -> None:
    data = msgspec.msgpack.encode(event)
    assert msgspec.msgpack.decode(data, type=type(event)) == event


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_a_reader_ignores_fields_of_a_newer_writer(event: events.Event) -> None:
    newer = msgspec.to_builtins(event, builtin_types=(bytes,)) | {"colour": "blue", "extra": [1]}
    data = msgspec.msgpack.encode(newer)
    assert msgspec.msgpack.decode(data, type=type(event)) == event


def test_a_replicas_load_may_grow_at_its_end() -> None:
    data = msgspec.msgpack.encode(["r", 1, 2.0, 3.0, 4.0, 5.0, 6.0, "of a newer writer"])
    assert msgspec.msgpack.decode(data, type=events.ReplicaLoad) == events.ReplicaLoad(
        "r", 1, 2.0, 3.0, 4.0, 5.0, 6.0
    )


def test_a_usage_record_is_read_as_it_was_written_and_may_grow_at_its_end() -> None:
    data = msgspec.msgpack.encode(USED)
    assert events.usage_record(data) == USED
    more = [*msgspec.msgpack.decode(data), "of a newer writer"]
    assert events.usage_record(msgspec.msgpack.encode(more)) == USED


def test_a_usage_record_of_an_older_router_has_names() -> None:
    said = {name: getattr(USED, name) for name in USED.__struct_fields__}
    assert events.usage_record(msgspec.msgpack.encode(said)) == USED
    for absent, default in (("version", 1), ("ttft_s", None), ("outcome", "ok"), ("replica", "")):
        fewer = {name: value for name, value in said.items() if name != absent}
        expected = msgspec.structs.replace(USED, **{absent: default})
        assert events.usage_record(msgspec.msgpack.encode(fewer)) == expected
    for spoilt in ({"seq": "one"}, {"tenant": None}):
        with pytest.raises(msgspec.DecodeError):
            events.usage_record(msgspec.msgpack.encode(said | spoilt))


@given(st.binary(max_size=64), st.integers(0, 64))
def test_bytes_that_are_no_usage_record_are_refused(noise: bytes, cut: int) -> None:
    whole = msgspec.msgpack.encode(USED)
    for spoilt in (noise, whole[:cut], whole[:cut] + noise):
        try:
            found = events.usage_record(spoilt)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        assert isinstance(found.seq, int)


def sealed_by_hand(payload: Any, *, purpose: str, version: int = 1, extra: Any = ()) -> bytes:
    """As a newer or hostile writer with the right key would seal it."""
    data = msgspec.msgpack.encode(payload)
    signature = KEY.sign(purpose.encode() + b"\0" + data)
    return msgspec.msgpack.encode([version, purpose, data, signature, *extra])


def test_a_table_of_a_newer_writer_may_say_more() -> None:
    newer = msgspec.to_builtins(TABLE, builtin_types=(bytes,)) | {"experiments": ["a"]}
    newer["functions"][0]["colour"] = "blue"
    data = sealed_by_hand(newer, purpose="detoserve/RoutingTable", extra=["more"])
    assert unseal(data, routing.RoutingTable, PUBLIC) == TABLE


def test_another_version_of_the_table_is_refused() -> None:
    newer = msgspec.structs.replace(TABLE, version=routing.VERSION + 1)
    with pytest.raises(EnvelopeInvalid, match="version 2"):
        unseal(seal(newer, KEY), routing.RoutingTable, PUBLIC)


def test_another_version_of_the_envelope_is_refused() -> None:
    data = sealed_by_hand(TABLE, purpose="detoserve/RoutingTable", version=2)
    with pytest.raises(EnvelopeInvalid, match="envelope version 2"):
        unseal(data, routing.RoutingTable, PUBLIC)


def test_bytes_signed_for_one_use_prove_nothing_for_another() -> None:
    with pytest.raises(EnvelopeInvalid, match="sealed as 'detoserve/Freshness'"):
        unseal(seal(FRESHNESS, KEY), routing.RoutingTable, PUBLIC)
    # The same bytes under the other name: the signature covers the name.
    version, _, payload, signature = msgspec.msgpack.decode(seal(FRESHNESS, KEY))
    renamed = msgspec.msgpack.encode([version, "detoserve/RoutingTable", payload, signature])
    with pytest.raises(EnvelopeInvalid, match="signature"):
        unseal(renamed, routing.RoutingTable, PUBLIC)
    # And the border between name and payload cannot be moved.
    _, purpose, payload, signature = msgspec.msgpack.decode(seal(TABLE, KEY))
    moved = msgspec.msgpack.encode([1, purpose, b"\0" + payload, signature])
    with pytest.raises(EnvelopeInvalid, match="signature"):
        unseal(moved, routing.RoutingTable, PUBLIC)


def test_the_key_of_somebody_else_is_refused() -> None:
    data = seal(TABLE, Ed25519PrivateKey.generate())
    with pytest.raises(EnvelopeInvalid, match="not the reconciler's"):
        unseal(data, routing.RoutingTable, PUBLIC)


SEALED = seal(TABLE, KEY)


@given(place=st.integers(0, len(SEALED) - 1), flipped=st.integers(1, 255))
@settings(max_examples=200)
def test_no_byte_can_be_changed(place: int, flipped: int) -> None:
    bad = SEALED[:place] + bytes([SEALED[place] ^ flipped]) + SEALED[place + 1 :]
    with pytest.raises(EnvelopeInvalid):
        unseal(bad, routing.RoutingTable, PUBLIC)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(EnvelopeInvalid):
        unseal(noise, routing.RoutingTable, PUBLIC)


def test_endless_nesting_is_refused() -> None:
    start = msgspec.msgpack.encode([1, "detoserve/RoutingTable", b"", b""])
    nested = b"\x95" + start[1:] + b"\x91" * 100_000 + b"\xc0"
    with pytest.raises(EnvelopeInvalid, match="not an envelope"):
        unseal(nested, routing.RoutingTable, PUBLIC)


@pytest.mark.parametrize("payload", [[], {"generation": "x"}, None, {}])
def test_signed_nonsense_is_refused(payload: Any) -> None:
    data = sealed_by_hand(payload, purpose="detoserve/RoutingTable")
    with pytest.raises(EnvelopeInvalid, match="not a RoutingTable"):
        unseal(data, routing.RoutingTable, PUBLIC)


def test_a_payload_over_the_cap_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "MAX_PAYLOAD_BYTES", 10)
    with pytest.raises(EnvelopeInvalid, match="over the cap"):
        unseal(seal(TABLE, KEY), routing.RoutingTable, PUBLIC)


def test_public_keys_travel_as_hex() -> None:
    assert public_key_from_hex(f" {public_key_hex(KEY)}\n") == PUBLIC
    for wrong in ("", "zz" * 32, "ab" * 31, public_key_hex(KEY) + "00"):
        with pytest.raises(ValueError, match="64 hex characters"):
            public_key_from_hex(wrong)


@given(tables, counts, counts, unix_s, text)
@settings(deadline=None)
def test_the_content_digest_does_not_depend_on_who_published_it_and_when(
    table: routing.RoutingTable, generation: int, lease: int, at: float, revision: str
) -> None:
    again = msgspec.structs.replace(
        table, generation=generation, lease=lease, published_at=at, revision=revision
    )
    assert routing.content_digest(again) == routing.content_digest(table)
    read = unseal(seal(table, KEY), routing.RoutingTable, PUBLIC)
    assert routing.content_digest(read) == routing.content_digest(table)


@given(tables, tables)
@settings(deadline=None)
def test_the_content_digest_tells_contents_apart(
    one: routing.RoutingTable, other: routing.RoutingTable
) -> None:
    def content(table: routing.RoutingTable) -> Any:
        return table.max_table_age_s, table.functions, table.tenants, table.clusters

    same = routing.content_digest(one) == routing.content_digest(other)
    assert same == (content(one) == content(other))


def test_replicas_of_one_name_have_keys_of_their_own() -> None:
    made = [
        redis_keys.kv("r"),
        redis_keys.kv_snapshot("r"),
        redis_keys.engine("r"),
        redis_keys.router("r"),
        redis_keys.session("r"),
        redis_keys.decisions("r"),
        redis_keys.routes(7),
        redis_keys.ROUTES_CURRENT,
        redis_keys.LEASE,
    ]
    assert len(set(made)) == len(made)
    assert all(key.startswith("detoserve:") for key in made)
