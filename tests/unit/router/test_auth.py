from __future__ import annotations

from itertools import product

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from router.core.auth import authenticate, identify
from router.core.errors import INVALID_API_KEY, TABLE_STALE, Refusal, model_not_found
from router.core.snapshot import Principal, snapshot
from schemas import api_keys
from schemas.wire.routing import Arm, Cluster, Function, Key, Replica, RoutingTable, Tenant

KEYS = {name: api_keys.create() for name in ("red", "blue", "green")}
FOREIGN = "My API Key"


def table(tenants, functions=()) -> RoutingTable:
    return RoutingTable(
        generation=1,
        revision="r",
        published_at=0.0,
        tenants=tuple(tenants),
        functions=tuple(functions),
    )


def key(name: str, **more) -> Key:
    return Key(id=KEYS[name].id, sha256=bytes.fromhex(KEYS[name].sha256), **more)


def ask(snap, token: str, now: float = 100.0, fresh_at: float = 100.0):
    return authenticate(snap, identify(snap, token.encode()), now, fresh_at)


def test_our_keys_and_foreign_ones_are_recognised():
    snap = snapshot(
        table(
            [
                Tenant(name="red", keys=(key("red"),)),
                Tenant(name="blue", keys=(Key(id="old", sha256=api_keys.digest(FOREIGN)),)),
            ]
        )
    )
    for token, name in ((KEYS["red"].text, "red"), (FOREIGN, "blue")):
        principal = ask(snap, token)
        assert isinstance(principal, Principal)
        assert principal.tenant.name == name


@given(st.text(max_size=80))
def test_any_other_token_is_the_same_401(token):
    snap = snapshot(table([Tenant(name="red", keys=(key("red"),))]))
    principal = identify(snap, token.encode("utf-8", "replace"))
    assert authenticate(snap, principal, 1.0, 1.0) is INVALID_API_KEY


@given(st.integers(0, len(KEYS["red"].text) - 1), st.characters(codec="ascii"))
def test_one_wrong_character_is_a_wrong_key(at, character):
    text = KEYS["red"].text
    changed = text[:at] + character + text[at + 1 :]
    snap = snapshot(table([Tenant(name="red", keys=(key("red"),))]))
    assert isinstance(ask(snap, changed), Principal) == (changed == text)


@given(st.floats(0, 200), st.floats(0, 200), st.floats(0, 200))
def test_a_key_counts_from_not_before_until_expires(not_before, expires, now):
    snap = snapshot(
        table([Tenant(name="red", keys=(key("red", not_before=not_before, expires=expires),))])
    )
    answer = ask(snap, KEYS["red"].text, now=now, fresh_at=now)
    assert isinstance(answer, Principal) == (not_before <= now < expires)
    assert isinstance(answer, Principal) or answer is INVALID_API_KEY


def test_an_old_table_fails_closed_for_right_and_wrong_keys_alike():
    snap = snapshot(table([Tenant(name="red", keys=(key("red"),))]))
    age = snap.table.max_table_age_s
    assert isinstance(ask(snap, KEYS["red"].text, now=100 + age), Principal)
    for token in (KEYS["red"].text, "wrong"):
        assert ask(snap, token, now=100 + age + 1) is TABLE_STALE


def test_suspended_tenants_and_missing_scopes_are_403():
    snap = snapshot(
        table(
            [
                Tenant(name="red", keys=(key("red"),), suspended=True),
                Tenant(name="blue", keys=(key("blue", scopes=("usage",)),)),
            ]
        )
    )
    codes = [ask(snap, KEYS[name].text).code for name in ("red", "blue")]
    assert codes == ["tenant_suspended", "insufficient_scope"]


def test_two_tenants_with_one_key_id_are_told_apart_by_the_hash():
    twin = Key(id=KEYS["red"].id, sha256=bytes.fromhex(KEYS["blue"].sha256))
    snap = snapshot(
        table([Tenant(name="blue", keys=(twin,)), Tenant(name="red", keys=(key("red"),))])
    )
    assert ask(snap, KEYS["red"].text).tenant.name == "red"


NAMES = ("alpha", "beta", "gamma")


@given(st.lists(st.sets(st.sampled_from([*NAMES, "a*", "*a", "[ab]*"])), min_size=2, max_size=2))
def test_tenants_see_their_own_models_and_all_others_as_missing(allowed):
    functions = [
        Function(name=name, served_name=f"org/{name}", aliases=("shared", f"{name}-latest"))
        for name in NAMES
    ]
    tenants = [
        Tenant(name=name, keys=(key(name),), models=tuple(sorted(models)))
        for name, models in zip(("red", "blue"), allowed, strict=True)
    ]
    snap = snapshot(table(tenants, functions))
    without = {
        t.name: snapshot(table(tenants, [f for f in functions if snap.resolve(t, f.name)]))
        for t in tenants
    }
    asked = [n for f in functions for n in (f.name, f.served_name, *f.aliases)] + ["nothing"]
    for one, model in product(tenants, asked):
        # What is not theirs might as well not be in the table.
        assert snap.resolve(one, model) == without[one.name].resolve(one, model)
    for one in tenants:
        assert list(snap.models(one)) == [f for f in functions if snap.resolve(one, f.name)]


def test_a_missing_model_refusal_depends_on_its_name_alone():
    assert isinstance(model_not_found("x"), Refusal)
    assert model_not_found("x").body() == model_not_found("x").body()


def test_candidates_are_those_of_the_tenants_arms_and_clusters_and_not_draining():
    def arm(deployment, cluster, tenants=(), state="ready"):
        return Arm(
            deployment=deployment,
            cluster=cluster,
            tenants=tenants,
            replicas=(Replica(id=deployment, url="http://h:1", state=state),),
        )

    function = Function(
        name="f",
        served_name="f",
        arms=(
            arm("shared", "eu-1"),
            arm("reds", "eu-1", ("red",)),
            arm("far", "us-1"),
            arm("leaving", "eu-1", (), "draining"),
        ),
    )
    red = Tenant(name="red", models=("*",), clusters=("eu-*",))
    blue = Tenant(name="blue", models=("*",))
    snap = snapshot(table([red, blue], [function]))
    assert [c.id for c in snap.candidates(function, red)] == ["shared", "reds"]
    assert [c.id for c in snap.candidates(function, blue)] == ["shared", "far"]
    assert set(snap.replicas) == {"shared", "reds", "far", "leaving"}


def test_a_tenants_residency_keeps_it_in_clusters_that_carry_all_its_labels():
    places = {"eu": ("gdpr",), "lab": ("gdpr", "health"), "us": ("health",), "unlabelled": ()}
    names = [*places, "not-in-the-table"]
    arms = tuple(
        Arm(deployment=c, cluster=c, replicas=(Replica(id=c, url="http://h:1"),)) for c in names
    )
    function = Function(name="f", served_name="f", arms=arms)
    clusters = tuple(Cluster(name=name, residency=labels) for name, labels in places.items())
    for residency, expected in (
        ((), names),
        (("gdpr",), ["eu", "lab"]),
        (("gdpr", "health"), ["lab"]),
        (("nowhere",), []),
    ):
        tenant = Tenant(name="t", models=("*",), residency=residency)
        snap = snapshot(msgspec.structs.replace(table([tenant], [function]), clusters=clusters))
        assert [c.id for c in snap.candidates(function, tenant)] == expected


def test_replicas_no_request_could_be_sent_to_are_left_out_and_named():
    urls = [
        "http://h:1", "https://h", "http://[::1]:80/base/", "ftp://h", "http://h:99999", "http://",
        "http://a:b@h", "http://h/\r\nx", "http://h?x=1",
    ]  # fmt: skip
    arm = Arm(
        deployment="d",
        cluster="c",
        replicas=tuple(Replica(id=f"r{i}", url=url) for i, url in enumerate(urls)),
    )
    snap = snapshot(table([], [Function(name="f", served_name="f", arms=(arm,))]))
    assert sorted(snap.replicas) == ["r0", "r1", "r2"]
    assert len(snap.unusable) == 6
    assert snap.replicas["r1"].port == 443
    assert snap.replicas["r2"].base_path == "/base"
    assert snap.replicas["r2"].host_header == "[::1]:80"


def test_an_id_cannot_break_a_header():
    arm = Arm(
        deployment="d", cluster="c", replicas=(Replica(id="a\r\nX: 1;g=9", url="http://h:1"),)
    )
    snap = snapshot(table([], [Function(name="f", served_name="f", arms=(arm,))]))
    header = snap.replicas["a\r\nX: 1;g=9"].route_header
    assert b"\r" not in header
    assert header.count(b";") == 2


def test_clusters_hand_their_allowlist_to_their_replicas():
    arm = Arm(deployment="d", cluster="c", replicas=(Replica(id="r", url="http://h:1"),))
    bare = table([], [Function(name="f", served_name="f", arms=(arm,))])
    fenced = msgspec.structs.replace(
        bare, clusters=(Cluster(name="c", endpoint_cidrs=("10.0.0.0/8",)),)
    )
    assert snapshot(fenced).replicas["r"].cidrs == ("10.0.0.0/8",)
