"""effective: bad edits never take away what was good, and never stay once they are mended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.core import last_good
from reconciler.core.compile import compile_workloads
from reconciler.core.config import ConfigObject, Loaded, Location, ObjectKey, Problem
from reconciler.core.last_good import Objects, effective
from reconciler.core.references import check_references
from tests.unit.core.worlds import (
    by_key,
    config_object,
    deployment,
    external,
    function,
    local,
    platform,
    reading,
    tenant,
)

PATHS = ("a.yaml", "b.yaml", "c.yaml")
NAMES = ("f", "g", "h")
HASHES = {"k": "1" * 64, "l": "2" * 64}


def pick(*items: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(items)


@st.composite
def any_object(draw: st.DrawFn) -> ConfigObject:
    path = draw(pick(*PATHS))
    name = draw(pick(*NAMES))
    match draw(pick("Function", "Function", "Deployment", "Deployment", "Cluster", "Tenant")):
        case "Function":
            return function(
                name,
                path=path,
                model={"uri": "sim://m", "aliases": draw(pick([], [], ["m"], ["n"], ["f"]))},
                routing={"fallbacks": draw(pick([], [], ["f"], ["g"], ["h"]))},
                scaling={"minReplicas": draw(pick(1, 2))},
            )
        case "Deployment":
            audience: dict[str, Any] = draw(pick({"shared": True}, {"tenants": ["t"]}))
            return deployment(
                name, draw(pick(*NAMES)), draw(pick("c", "c", "x")), path=path, **audience
            )
        case "Cluster" if draw(st.booleans()):
            return external("x", sorted(draw(st.sets(pick(*NAMES), min_size=1))))
        case "Cluster":
            return local(draw(pick("c", "d")), path=path, region=draw(pick("eu", "us")))
        case _:
            keys = [{"id": i, "sha256": HASHES[i]} for i in draw(pick([], ["k"], ["l"]))]
            clusters = draw(pick(["*"], ["c"], ["d", "c"]))
            return tenant(draw(pick("t", "u")), path=path, keys=keys, clusters=clusters)


def _names(objects: list[ConfigObject]) -> Objects:
    return {obj.key: obj for obj in objects}


@st.composite
def readings(draw: st.DrawFn, *, whole: bool = False) -> Loaded:
    objects = _names(draw(st.lists(any_object(), max_size=12)))
    failed = [] if whole else draw(st.lists(pick(*PATHS, "new.yaml"), unique=True, max_size=2))
    problems = []
    left = {}
    for key, obj in objects.items():
        lost = obj.location.path in failed and draw(st.booleans())
        if lost:
            told = key if draw(st.booleans()) else None
            problems.append(Problem(obj.location, "does not load", key=told))
        else:
            left[key] = obj
    return reading(*left.values(), failed=failed, problems=problems)


def errors(objects: Objects) -> list[Problem]:
    return [p for p in check_references(objects) if p.severity == "error"]


@dataclass
class Repo:
    """A reconciler's memory over a sequence of readings."""

    known: Objects | None = None

    def step(self, loaded: Loaded) -> Any:
        result = effective(loaded, self.known)
        self.known = result.objects
        return result


@given(history=st.lists(readings(), min_size=1, max_size=6))
def test_what_is_in_effect_is_valid_and_was_once_written(history):
    repo, written = Repo(), set()
    for loaded in history:
        written |= {(key, obj.digest) for key, obj in loaded.objects.items()}
        before = repo.known or {}
        result = repo.step(loaded)
        assert errors(result.objects) == []
        assert {(key, obj.digest) for key, obj in result.objects.items()} <= written
        compile_workloads(result)
        told = {p.key for p in result.problems if p.severity == "error"}
        for key in {*loaded.objects, *before} - told:
            assert result.objects.get(key) == loaded.objects.get(key)
        for key in result.held:
            assert result.objects[key].digest == before[key].digest
        fell = {k.name for k in loaded.objects.keys() - result.objects if k.kind == "Deployment"}
        assert fell <= result.shielded.keys()


@given(history=st.lists(readings(), max_size=4), last=readings(whole=True))
def test_a_repo_that_is_valid_again_is_in_effect_exactly(history, last):
    repo = Repo()
    for loaded in history:
        repo.step(loaded)
    if errors(last.objects):
        last = reading()
    result = repo.step(last)
    assert result.objects == last.objects
    assert result.held == frozenset()
    assert result.shielded == {}
    assert result.prune_blocked == ""
    assert all(p.severity == "warning" for p in result.problems)


@settings(max_examples=50)
@given(history=st.lists(readings(), min_size=2, max_size=3), data=st.data())
def test_order_of_the_files_is_irrelevant(history, data):
    known = Repo().step(history[0]).objects
    last = history[-1]
    result = effective(last, known)
    objects = dict(data.draw(st.permutations(sorted(last.objects.items()))))
    turned = dict(reversed(known.items()))
    again = effective(
        Loaded(last.revision, last.digest, objects, last.problems, last.failed_paths), turned
    )
    assert again == result


@given(loaded=readings(), before=st.lists(any_object(), max_size=12))
def test_it_ends_whatever_was_known_and_never_asks_for_what_is_not_there(loaded, before):
    """A state file of another version may hold what is not valid by today's rules."""
    compile_workloads(effective(loaded, _names(before)))


@settings(max_examples=50)
@given(history=st.lists(readings(), min_size=1, max_size=3))
def test_the_same_reading_again_changes_nothing(history):
    repo = Repo()
    for loaded in history:
        result = repo.step(loaded)
    again = repo.step(history[-1])
    assert again.objects == result.objects


GOOD = (function("f"), local("c"), deployment("a"))


def test_one_bad_file_of_fifty_keeps_its_last_and_the_others_go_on():
    before = by_key(*GOOD, *(deployment(f"n{i}") for i in range(49)))
    after = [deployment(f"n{i}", replicas=5) for i in range(49)]
    result = effective(reading(*GOOD[:2], *after, failed=["deployments/a.yaml"]), before)
    assert result.objects == by_key(*GOOD, *after)
    assert result.held == {GOOD[2].key}
    assert result.prune_blocked == ""


def test_an_edit_that_names_what_does_not_exist_is_held_back():
    result = effective(reading(*GOOD[:2], deployment("a", "nope")), by_key(*GOOD))
    assert result.objects == by_key(*GOOD)
    assert [str(p.key) for p in result.problems] == ["Deployment/a"]


def test_what_is_deleted_while_it_is_needed_stays_until_it_is_not():
    held = effective(reading(*GOOD[1:]), by_key(*GOOD))
    assert held.objects == by_key(*GOOD)
    assert held.held == {GOOD[0].key}
    assert "Deployment/a still needs it" in held.problems[-1].message
    freed = effective(reading(GOOD[1]), held.objects)
    assert freed.objects == by_key(GOOD[1])


def test_a_conflict_costs_the_newcomer_not_who_was_there():
    other = function("g", model={"uri": "sim://m", "aliases": ["f"]})
    result = effective(reading(*GOOD, other), by_key(*GOOD))
    assert result.objects == by_key(*GOOD)
    assert result.held == frozenset()


def test_a_change_that_breaks_what_nobody_edited_is_taken_back():
    before = by_key(
        function("f"), function("g"), external("x", ["f", "g"]), deployment("a", at="x")
    )
    narrowed = external("x", ["g"])
    result = effective(reading(*(before | by_key(narrowed)).values()), before)
    assert result.objects == before
    assert result.held == {narrowed.key}
    assert any(p.key == narrowed.key and "held back" in p.message for p in result.problems)


def test_a_revoked_key_never_comes_back_because_of_somebody_elses_error():
    key = {"id": "k", "sha256": HASHES["k"]}
    place = config_object(
        "Cluster",
        "c",
        {"provider": {"type": "local"}, "gpus": [{"type": "H100", "count": 8}]},
    )
    model = function("f", resources={"gpu": {"types": ["H100"], "count": 8}})
    before = by_key(model, place, tenant("t", keys=[key]), deployment("a", tenants=["t"]))
    smaller = config_object(
        "Cluster",
        "c",
        {"provider": {"type": "local"}, "gpus": [{"type": "H100", "count": 1}]},
    )
    revoked = tenant("t", keys=[])
    result = effective(reading(*(before | by_key(smaller, revoked)).values()), before)
    assert result.objects[revoked.key] == revoked
    assert result.objects[smaller.key] == place


def test_what_moves_to_a_new_file_that_does_not_load_is_not_deleted():
    syntax = Problem(Location("new.yaml", 3, 1), "no YAML")
    result = effective(reading(*GOOD[:2], failed=["new.yaml"], problems=[syntax]), by_key(*GOOD))
    assert result.objects.keys() == by_key(*GOOD).keys()
    assert result.held == {GOOD[2].key}
    assert "new.yaml" in result.prune_blocked
    again = effective(reading(*GOOD[:2], failed=["new.yaml"], problems=[syntax]), result.objects)
    assert again.objects == result.objects
    mended = effective(reading(*GOOD[:2]), again.objects)
    assert mended.objects == by_key(*GOOD[:2])


def test_what_moves_to_another_file_with_a_typo_is_not_deleted():
    typo = Problem(Location("deployments/b.yaml", 9, 3), "typo", key=GOOD[2].key)
    b = deployment("b")
    result = effective(
        reading(*GOOD[:2], b, failed=["deployments/b.yaml"], problems=[typo]), by_key(*GOOD, b)
    )
    assert result.objects == by_key(*GOOD, b)
    assert result.prune_blocked == ""


def test_a_typo_in_a_new_deployment_delays_no_deletion():
    typo = Problem(Location("new.yaml", 9, 3), "typo", key=ObjectKey("Deployment", "new"))
    result = effective(reading(*GOOD[:2], failed=["new.yaml"], problems=[typo]), by_key(*GOOD))
    assert result.objects == by_key(*GOOD[:2])
    assert result.prune_blocked == ""
    assert result.shielded.keys() == {"new"}


def test_a_renamed_file_is_no_change():
    moved = [function("f", path="x/1.yaml"), local("c"), deployment("a", path="x/1.yaml")]
    result = effective(reading(*moved), by_key(*GOOD))
    assert result.objects == by_key(*moved)
    assert result.held == frozenset()
    assert compile_workloads(result).workloads.keys() == {"a--c"}


def test_a_second_platform_does_not_replace_the_first():
    first = platform()
    second = config_object("Platform", "other", {})
    assert effective(reading(first, second), by_key(first)).objects == by_key(first)
    assert effective(reading(first, second), None).objects == {}


def test_long_chains_fall_and_come_back_at_once(monkeypatch):
    """Each round costs a look at the whole repo; a chain must not cost one a link."""
    looks = []

    def counted(objects, invalid):
        looks.append(None)
        return check_references(objects, invalid)

    monkeypatch.setattr(last_good, "check_references", counted)
    chain = [function(f"f{i}", routing={"fallbacks": [f"f{i + 1}"]}) for i in range(200)]
    assert effective(reading(*chain), None).objects == {}
    before = by_key(*chain, function("f200"))
    assert effective(reading(chain[0]), before).objects == before
    assert len(looks) < 10


def test_who_needs_what_does_not_load_is_told_so() -> None:
    key = ObjectKey("Function", "f")
    problem = Problem(Location("f.yaml", 3, 1), "broken", key=key)
    user = deployment("d", "f", "c", shared=True)
    loaded = Loaded("r1", "x", by_key(user, local("c")), (problem,), frozenset({"f.yaml"}))
    said = [p.message for p in effective(loaded, None).problems if p.key == user.key]
    assert said[0] == "Function/f does not load; mend it first"


def test_of_a_state_that_was_never_valid_nothing_stays_that_names_what_is_dropped():
    user, other = deployment("a", at="x"), function("g")
    before = by_key(function("f", routing={"fallbacks": ["gone"]}), user, other)
    place = external("x", ["g"])
    result = effective(reading(function("f"), user, other, place), before)
    assert result.objects == by_key(other, place)
    assert result.shielded.keys() == {"a"}
    compile_workloads(result)
