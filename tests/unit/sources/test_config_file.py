from __future__ import annotations

import pytest

from reconciler.core.config import ObjectKey
from reconciler.sources.config_file import ConfigFile, key_problems, parse_config_file
from reconciler.sources.yaml_document import Limits
from schemas import api_keys
from tests.config_text import cluster, deployment, function, tenant

API = "apiVersion: detoserve.ai/v1alpha1"


def parse(text: str | bytes, path: str = "a.yaml") -> ConfigFile:
    return parse_config_file(path, text.encode() if isinstance(text, str) else text, Limits())


def only_error(text: str, path: str = "a.yaml") -> str:
    file = parse(text, path)
    (problem,) = file.problems
    assert file.failed
    assert file.objects == ()
    return str(problem)


def keys(file: ConfigFile) -> list[str]:
    return [str(obj.key) for obj in file.objects]


def test_each_document_is_an_object_with_its_place():
    file = parse(function() + "---\n" + deployment())
    assert keys(file) == ["Function/chat", "Deployment/chat"]
    assert not file.failed
    first, second = file.objects
    assert str(first.location) == "a.yaml:1:1"
    assert str(second.location) == "a.yaml:8:1"
    assert str(second.at("spec", "placement", "cluster")) == "a.yaml:14:15"
    assert str(second.at("spec", "rollout", "strategy")) == "a.yaml:11:1"


def test_digest_is_of_content_not_of_text():
    plain = parse(deployment()).objects[0].digest
    written_otherwise = (
        "# a comment\nkind: Deployment\nspec: {placement: {cluster: local}, weight: 100,\n"
        f'  shared: true, function: "chat"}}\nmetadata:\n  name: chat\n{API}\n'
    )
    assert parse(written_otherwise, "b.yaml").objects[0].digest == plain
    assert parse(deployment(more="  weight: 99\n")).objects[0].digest != plain
    assert parse(deployment("other")).objects[0].digest != plain


def test_one_bad_document_does_not_stop_the_others():
    file = parse(function() + "---\n" + deployment(more="  weigth: 3\n") + "---\n" + cluster())
    assert keys(file) == ["Function/chat", "Cluster/local"]
    assert file.failed
    (problem,) = file.problems
    assert problem.key == ObjectKey("Deployment", "chat")
    assert str(problem) == (
        'a.yaml:15:3: spec.weigth is not a field of spec; did you mean "weight"?'
    )


def test_every_mistake_of_a_document_is_told_in_order_of_place():
    file = parse(deployment("Chat", function="3", more="  weight: much\n"))
    assert [p.location.line for p in file.problems] == [3, 5, 8]
    assert {p.key for p in file.problems} == {ObjectKey("Deployment", "Chat")}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "a.yaml:1:1: a document must be a mapping"),
        ("kind: Tenant\n", f"apiVersion is missing; add `{API}`"),
        ("apiVersion: detoserve.ai/v1\nkind: Tenant\n", "apiVersion must be detoserve.ai/v1alpha1"),
        ("apiVersion: detoserv.ai/v1alpha1\n", "apiVersion must be detoserve.ai/v1alpha1"),
        ("apiVersion: 1\nkind: Tenant\n", "no DetoServe object"),
        ("kind: Pod\napiVersion: v1\n", "a.yaml:2:1: this is no DetoServe object"),
        ("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n", ".detoserveignore"),
        (f"{API}\n", "kind is missing; write one of Function, Tenant"),
        (
            f"{API}\nkind: Deploymnet\n",
            'a.yaml:2:1: there is no such kind; did you mean "Deployment"?',
        ),
        (f"{API}\nkind: [x]\n", "there is no such kind"),
        (f"{API}\nkind: Tenant\nmetadata: {{name: a}}\n", "spec is missing; add `spec:`"),
    ],
)
def test_what_is_no_object_says_what_it_should_be(text, says):
    assert says in only_error(text)


def test_kustomizations_are_named_as_such():
    text = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
    assert "kustomize build" in only_error(text)
    assert "kustomize build" in only_error("resources: [a.yaml]\n", "x/kustomization.yaml")


@pytest.mark.parametrize("text", ["# all of it is commented out\n", "", "---\n---\n"])
def test_a_file_without_objects_is_a_warning(text):
    file = parse(text)
    assert not file.failed
    assert [p.severity for p in file.problems] == ["warning"]


def test_a_file_that_is_no_yaml_names_the_objects_it_was_meant_to_hold():
    text = (
        function("one")
        + "---\n"
        + f"{API}\nkind: Deployment\nmetadata:\n  labels:\n    name: wrong\n  name: two\nspec: [\n"
        + f'---\n{API}\nkind: "Tenant"\nmetadata: {{labels: {{}}, name: three}}\n'
    )
    file = parse(text)
    assert file.objects == ()
    error, *shielded = file.problems
    assert error.key is None
    assert {p.key for p in shielded} == {
        ObjectKey("Function", "one"),
        ObjectKey("Deployment", "two"),
        ObjectKey("Tenant", "three"),
    }
    assert all(f"line {error.location.line}" in p.message for p in shielded)


def test_guessing_what_a_broken_file_held_takes_no_time():
    text = "metadata:\n" + " \n" * 60_000 + "x: [\n" + "kind: Tenant\n" * 5000
    assert parse(text).failed


def test_a_key_is_refused_and_not_repeated():
    key = api_keys.create().text
    file = parse(tenant(more="  namespace: team\n") + f"# {key}\n")
    assert file.objects == ()
    assert file.failed
    assert str(file.problems[0].location) == "a.yaml:7:3"
    assert key not in repr(file)
    assert key[-20:] not in repr(file)
    assert ObjectKey("Tenant", "acme") in {p.key for p in file.problems}


def test_a_key_is_found_in_what_is_no_yaml_and_no_text():
    key = api_keys.create().text
    (problem,) = key_problems("notes.bin", b"\xff\x00\n\xfe " + key.encode())
    assert (problem.location.line, problem.location.column) == (2, 3)
    assert key not in str(problem)


def test_values_that_may_be_secrets_are_not_repeated():
    canary = "hunter2canary"
    text = function(more=f"  password: {canary}\n") + "---\n" + cluster(provider=f"type: {canary}")
    text += "---\n" + deployment(more=f"  replicas: {canary}\n  rollout: {{strategy: {canary}}}\n")
    file = parse(text + f'---\n{API}\nkind: {canary}\n---\n"{canary}"\n')
    assert file.failed
    assert canary not in repr(file.problems)


def test_credentials_in_a_url_are_not_repeated():
    file = parse(function().replace("sim://m", "https://user:canary@host/model"))
    assert file.failed
    assert "canary" not in repr(file.problems)
