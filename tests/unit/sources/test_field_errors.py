from __future__ import annotations

import pytest
from pydantic import ValidationError

from reconciler.sources.field_errors import field_errors, field_path
from reconciler.sources.yaml_document import parse_documents
from schemas.kinds import MODELS
from tests.config_text import cluster, deployment, function, tenant

KEY = "id: web, sha256: " + "a" * 64


def complaints(text: str) -> list[str]:
    (document,) = parse_documents(text.encode())
    assert isinstance(document.data, dict)
    model = MODELS[document.data["kind"]]
    with pytest.raises(ValidationError) as caught:
        model.model_validate(document.data)
    return [
        f"{line}:{column}: {message}"
        for (line, column), message in field_errors(caught.value, model, document)
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            function(more="  scaling:\n    maxReplica: 3\n"),
            '8:5: spec.scaling.maxReplica is not a field of spec.scaling; did you mean "maxReplicas"?',
        ),
        (
            function(more="  scaling: {max_replicas: 3}\n"),
            '7:13: spec.scaling.max_replicas is not a field of spec.scaling; did you mean "maxReplicas"?',
        ),
        (
            function(more='  scaling: {minReplicas: "1"}\n'),
            "7:13: spec.scaling.minReplicas must be a whole number, not text; leave the quotes out",
        ),
        (
            function(more="  scaling: {minReplicas: 1.5}\n"),
            "7:13: spec.scaling.minReplicas must be a whole number, not a number with a fraction",
        ),
        (
            function(more="  scaling: {minReplicas: }\n"),
            "7:13: spec.scaling.minReplicas must be a whole number, not empty",
        ),
        (
            function(more="  scaling: {minReplicas: 600}\n"),
            "7:13: spec.scaling.minReplicas must be at most 512",
        ),
        (
            function(more="  scaling: [1]\n"),
            "7:3: spec.scaling must be a mapping, not a list",
        ),
        (
            function(model="servedName: 1.10"),
            (
                "5:27: spec.model.servedName must be text, not a number with a fraction; "
                "if it is meant as text, put it in quotes"
            ),
        ),
        (
            function().replace("simulated", "vlm"),
            (
                '6:13: spec.runtime.engine is none of the allowed values; did you mean "vllm"? '
                "Allowed: vllm, sglang, triton, dynamo, llm-d, custom, simulated"
            ),
        ),
        (
            function(more="  readiness: {timeout: 5}\n"),
            "7:15: spec.readiness.timeout: 5 has no unit; write it like 5s",
        ),
        (
            deployment().replace("shared: true", "shared: yes"),
            "6:3: spec.shared must be true or false, not text; in YAML 1.2 yes, no, on and off are text",
        ),
        (
            deployment(tenants="a, 3"),
            (
                "6:16: spec.tenants[1] must be text, not a whole number; "
                "if it is meant as text, put it in quotes"
            ),
        ),
        (
            cluster(provider="cloud: aws"),
            "5:3: spec.provider.type is missing; write one of cloud, external, kubernetes, local, slurm",
        ),
        (
            cluster(provider="type: kubernets"),
            (
                '5:3: spec.provider.type is none of the allowed values; did you mean "kubernetes"? '
                "Allowed: local, kubernetes, slurm, cloud, external"
            ),
        ),
        (
            cluster(provider="type: cloud, cloud: aws, regio: x"),
            '5:39: spec.provider.regio is not a field of spec.provider; did you mean "region"?',
        ),
        (
            cluster(provider="type: cloud, cloud: aws, region: 3"),
            (
                "5:39: spec.provider.region must be text, not a whole number; "
                "if it is meant as text, put it in quotes"
            ),
        ),
        (
            tenant(more=f"  keys: [{{{KEY}}}, {{{KEY}, expire: x}}]\n".replace("web", "b", 1)),
            '6:177: spec.keys[1].expire is not a field of spec.keys[1]; did you mean "expires"?',
        ),
    ],
)
def test_a_mistake_is_told_at_its_field(text, complaint):
    assert complaints(text) == [complaint]


def test_what_is_missing_is_described():
    (complaint,) = complaints(function().replace('uri: "sim://m"', ""))
    assert complaint.startswith("5:3: spec.model.uri is missing; add `uri:` (hf://")


def test_a_rule_over_several_fields_stands_at_their_parent():
    (complaint,) = complaints(deployment(placement=""))
    assert complaint.startswith("7:3: spec.placement: give either cluster: NAME or anyOf")


@pytest.mark.parametrize(
    ("loc", "data", "path"),
    [
        (("spec", "a"), {"spec": {"a": 1}}, ("spec", "a")),
        (("spec", "p", "tag", "x"), {"spec": {"p": {"x": 1}}}, ("spec", "p", "x")),
        (("spec", "p", "x", "x"), {"spec": {"p": {"x": 1}}}, ("spec", "p", "x")),
        (("spec", "p", "tag"), {"spec": {"p": {"x": 1}}}, ("spec", "p", "tag")),
        (("env", "A B", "[key]"), {"env": {"A B": 1}}, ("env", "A B")),
        (("list", 1, "x"), {"list": [{}, {"x": 1}]}, ("list", 1, "x")),
        ((), {}, ()),
    ],
)
def test_union_tags_are_no_part_of_a_place(loc, data, path):
    assert field_path(loc, data) == path
