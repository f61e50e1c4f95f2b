from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.config import ConfigObject, ObjectKey, Problem
from reconciler.core.references import check_references
from reconciler.core.suggest import closest, suggestion
from reconciler.sources.config_file import parse_config_file
from reconciler.sources.yaml_document import Limits
from tests.config_text import cluster, deployment, function, platform, tenant

GPUS = "  resources: {gpu: {types: [H100, A100], count: 4}}\n"
EXTERNAL = 'type: external, endpoints: [{url: "http://h:1", function: chat}]'
KUBERNETES = "type: kubernetes, context: c"


def objects(*texts: str) -> dict[ObjectKey, ConfigObject]:
    """One file an object, named by its number, so that places tell them apart."""
    found: dict[ObjectKey, ConfigObject] = {}
    for n, text in enumerate(texts):
        file = parse_config_file(f"{n}.yaml", text.encode(), Limits())
        assert not file.failed, file.problems
        found |= {obj.key: obj for obj in file.objects}
    return found


def check(*texts: str) -> list[str]:
    return [str(problem) for problem in check_references(objects(*texts))]


def key_of(problem: Problem) -> str:
    return str(problem.key)


def test_a_repo_that_fits_together_has_no_problem():
    assert not check(
        function(),
        function("small", more="  routing: {fallbacks: [chat]}\n"),
        cluster(),
        tenant(models="chat, sm*", more="  clusters: [local]\n  gpus: {quota: 2}\n"),
        deployment(tenants="acme"),
        deployment("elsewhere", placement="anyOf: [local]"),
        platform(),
    )
    assert check_references({}) == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            deployment(function="chta"),
            '3.yaml:5:3: there is no Function "chta"; did you mean "chat"?',
        ),
        (
            deployment(tenants="acme, acmee"),
            '3.yaml:6:19: there is no Tenant "acmee"; did you mean "acme"?',
        ),
        (
            deployment(placement="cluster: moon"),
            '3.yaml:7:15: there is no Cluster "moon"; there is local',
        ),
        (
            deployment(placement="anyOf: [local, locl]"),
            '3.yaml:7:30: there is no Cluster "locl"; did you mean "local"?',
        ),
        (
            tenant("b", models="chat", more="  clusters: [lokal]\n"),
            '3.yaml:6:14: there is no Cluster "lokal"; did you mean "local"?',
        ),
        (
            function("x", more="  routing: {fallbacks: [chat, chatt]}\n"),
            '3.yaml:7:31: there is no Function "chatt"; did you mean "chat"?',
        ),
        (
            cluster("out", provider=EXTERNAL.replace("chat", "chaat")),
            '3.yaml:5:62: there is no Function "chaat"; did you mean "chat"?',
        ),
    ],
)
def test_a_name_that_does_not_exist_is_told_with_what_was_meant(text, complaint):
    assert check(function(), cluster(), tenant(), text) == [complaint]


def test_globs_that_match_nothing_are_warnings():
    found = check_references(
        objects(
            function(), cluster(), tenant(models="chat, old-*, chatt", more="  clusters: [x*]\n")
        )
    )
    assert [(p.severity, p.location.line) for p in found] == [("warning", 5)] * 2 + [("warning", 6)]
    assert 'did you mean "chat"' in found[1].message


def test_a_tenant_without_clusters_of_its_own_may_use_all_even_when_there_is_none():
    assert not check(function(), tenant())


def test_a_deployment_for_a_tenant_that_may_not_use_it_is_a_warning():
    (found,) = check(
        function(), function("b"), cluster(), tenant(models="b"), deployment(tenants="acme")
    )
    assert found.startswith("4.yaml:6:13: warning: tenant acme may not use function chat")


def test_an_external_cluster_serves_what_its_endpoints_say():
    out = cluster("out", provider=EXTERNAL)
    assert not check(function(), out, deployment(placement="cluster: out"))
    texts = (function(), function("b"), out)
    for place in ("cluster: out", "anyOf: [out]"):
        (found,) = check(*texts, deployment(function="b", placement=place))
        assert "external cluster out has no endpoint for function b; it serves chat" in found


def test_fallbacks_must_not_go_round():
    def to(name: str, *others: str) -> str:
        return function(name, more=f"  routing: {{fallbacks: [{', '.join(others)}]}}\n")

    assert not check(to("a", "b", "c"), to("b", "c"), function("c"))
    found = check_references(objects(to("c", "a"), to("b", "d", "c"), to("a", "b"), function("d")))
    assert [key_of(p) for p in found] == ["Function/c", "Function/b", "Function/a"]
    assert {p.message for p in found} == {
        "fallbacks go round in a circle: a -> b -> c -> a; take one of them out"
    }
    assert "a -> a" in check(to("a", "a"))[0]
    assert len(check(to("a", "b"), to("b", "a"), to("c", "d"), to("d", "c"))) == 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (function("a", model="servedName: m"), function("b", model="servedName: m")),
        (function("a", model="servedName: b"), function("b")),
        (function("a", model="aliases: [b]"), function("b")),
        (function("a", model="aliases: [m]"), function("b", model="aliases: [n, m]")),
        (function("a", model="servedName: m"), function("b", model="aliases: [m]")),
    ],
)
def test_a_model_name_means_one_function(one, other):
    first, second = check_references(objects(one, other))
    assert {key_of(first), key_of(second)} == {"Function/a", "Function/b"}
    assert "is also that of Function/b (1.yaml:" in first.message
    assert "is also that of Function/a (0.yaml:" in second.message


def test_a_function_that_serves_another_name_leaves_its_own_free():
    assert not check(function("a", model="servedName: m"), function("b", model="aliases: [a]"))


def test_keys_are_one_tenants():
    def holder(name: str, key: str, digest: str) -> str:
        return tenant(name, models="", more=f"  keys: [{{id: {key}, sha256: {digest * 64}}}]\n")

    assert not check(holder("x", "web", "a"), holder("y", "job", "b"))
    same_id = check(holder("x", "web", "a"), holder("y", "web", "b"))
    assert len(same_id) == 2
    assert '0.yaml:6:11: key id "web" is also that of Tenant/y (1.yaml:6:11)' in same_id[0]
    same_hash = check(holder("x", "web", "a"), holder("y", "job", "a"))
    assert len(same_hash) == 2
    assert "a" * 64 not in "".join(same_hash)


def test_there_is_one_platform():
    found = check_references(objects(platform("a"), platform("b")))
    assert [key_of(p) for p in found] == ["Platform/a", "Platform/b"]
    assert "there is also Platform/b (1.yaml:1:1)" in found[0].message


def gpu_cluster(*gpus: str, more: str = "", name: str = "local") -> str:
    listed = ", ".join(f"{{type: {g.split()[0]}, count: {g.split()[1]}}}" for g in gpus)
    return cluster(name, provider=KUBERNETES, more=f"  gpus: [{listed}]\n{more}")


@pytest.mark.parametrize(
    ("place", "replicas", "says"),
    [
        (gpu_cluster("H100 8"), 2, None),
        (gpu_cluster("h100 8"), 2, None),
        (gpu_cluster("H100 4", "A100 4", "L4 64"), 2, None),
        (gpu_cluster(), 100, None),
        (gpu_cluster("H100 8"), 0, None),
        (
            gpu_cluster("H100 8", "L4 64"),
            3,
            "3 replicas want 12 GPUs (H100 or A100), but cluster local lists 8",
        ),
        (gpu_cluster("L4 64"), 1, "cluster local lists only L4"),
    ],
)
def test_a_deployment_may_not_want_more_gpus_than_its_cluster_lists(place, replicas, says):
    found = check(function(more=GPUS), place, deployment(more=f"  replicas: {replicas}\n"))
    assert (says is None) == (found == [])
    if says:
        assert found[0].startswith("2.yaml:8:3: ")
        assert says in found[0]


def test_any_of_several_clusters_may_have_the_gpus():
    small, large = gpu_cluster("H100 4", name="small"), gpu_cluster("H100 8", name="large")
    want = deployment(placement="anyOf: [small, large]", more="  replicas: 2\n")
    assert not check(function(more=GPUS), small, large, want)
    (found,) = check(function(more=GPUS), small, gpu_cluster("H100 7", name="large"), want)
    assert "cluster small lists 4, and cluster large lists 7" in found


def test_the_least_number_of_replicas_counts_and_a_suspended_deployment_wants_none():
    scaled = function(more=GPUS + "  scaling: {minReplicas: 3, maxReplicas: 9}\n")
    assert len(check(scaled, gpu_cluster("H100 11"), deployment())) == 1
    assert not check(scaled, gpu_cluster("H100 12"), deployment())
    assert not check(scaled, gpu_cluster("H100 11"), deployment(more="  suspend: true\n"))


def test_prefill_and_decode_workers_count_together():
    split = (
        function()
        .replace("sim://m", "hf://org/m")
        .replace(
            "{engine: simulated}",
            "{engine: dynamo, disaggregation: {prefill: {replicas: 2, gpus: 1}, decode: {gpus: 4}}}",
        )
    )
    assert not check(split, gpu_cluster("H100 6"), deployment())
    assert "want 6 GPUs, but" in check(split, gpu_cluster("H100 5"), deployment())[0]


def test_a_quota_may_not_exceed_what_the_tenants_clusters_list():
    def promised(quota: int, clusters: str = '"*"') -> str:
        return tenant(models="", more=f"  clusters: [{clusters}]\n  gpus: {{quota: {quota}}}\n")

    here = (
        gpu_cluster("H100 8", "L4 4", name="a"),
        gpu_cluster("H100 2", name="b"),
        cluster("here"),
    )
    assert not check(*here, promised(14))
    (found,) = check(*here, promised(15))
    assert found.startswith(
        "3.yaml:7:10: tenant acme is promised 15 GPUs, but its clusters (a, b) list 14"
    )
    assert "list 2" in check(*here, promised(3, "b"))[0]
    unlisted = cluster("c", provider=KUBERNETES)
    assert not check(*here, unlisted, promised(15))
    assert not check(cluster("here"), promised(15))


def test_quotas_may_together_promise_more_than_a_kai_cluster_has_but_it_is_said():
    def promised(name: str, quota: int) -> str:
        return tenant(name, models="", more=f"  gpus: {{quota: {quota}}}\n")

    texts = (promised("x", 5), promised("y", 4))
    assert not check(gpu_cluster("H100 8"), *texts)
    (found,) = check(gpu_cluster("H100 8", more="  kai: {enabled: true}\n"), *texts)
    assert found.startswith(
        "0.yaml:6:3: warning: tenants are promised 9 GPUs in cluster local (x 5, y 4)"
    )


NAMES = st.sampled_from("abc")
OBJECTS = st.one_of(
    st.builds(
        lambda name, to, alias: function(
            name, model=f"aliases: [{alias}]", more=f"  routing: {{fallbacks: [{to}]}}\n"
        ),
        NAMES,
        NAMES,
        st.sampled_from("abcxyz"),
    ),
    st.builds(
        lambda name, models: tenant(name, models=models), NAMES, st.sampled_from(["a", '"*"'])
    ),
    st.builds(
        lambda name, fn, where: deployment(name, function=fn, placement=f"cluster: {where}"),
        NAMES,
        NAMES,
        NAMES,
    ),
    st.builds(cluster, NAMES),
    st.builds(platform, NAMES),
)


@given(st.lists(OBJECTS, max_size=12), st.randoms())
def test_the_order_of_objects_is_irrelevant_and_every_problem_names_one(texts, random):
    found = objects(*texts)
    problems = check_references(found)
    items = list(found.items())
    random.shuffle(items)
    assert check_references(dict(items)) == problems
    assert {p.key for p in problems} <= found.keys()


@pytest.mark.parametrize(
    ("word", "options", "expected"),
    [
        ("chta", ["chat", "code"], 'did you mean "chat"?'),
        ("CHAT", ["chat"], 'did you mean "chat"?'),
        ("zzz", ["b", "a"], "there is a, b"),
        ("x", [], "there is none"),
        ("x", [f"name-{n:02}" for n in range(14)], "and 2 more"),
    ],
)
def test_suggestions(word, options, expected):
    assert expected in suggestion(word, options)


def test_a_suggestion_for_a_very_long_word_takes_no_time():
    assert closest("x" * 1_000_000, ["x" * 50]) in (None, "x" * 50)
