"""A corpus of mistakes: refused by the models with a sentence, and by JSON Schema where it can."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from schemas.kinds import MODELS
from tests.unit.schemas.objects import Plain
from tests.unit.schemas.test_json_schema import verdicts

MODEL = {"uri": "hf://org/name"}
RUNTIME = {"engine": "vllm"}
HASH = "0" * 64
OTHER_HASH = "1" * 64


def document(kind: str, spec: Any, **envelope: Any) -> Plain:
    return {
        "apiVersion": "detoserve.ai/v1alpha1",
        "kind": kind,
        "metadata": {"name": "a"},
        "spec": spec,
        **envelope,
    }


def function(**spec: Any) -> Plain:
    return document("Function", {"model": MODEL, "runtime": RUNTIME, **spec})


def deployment(**spec: Any) -> Plain:
    base = {"function": "chat", "shared": True, "placement": {"cluster": "local"}}
    return document("Deployment", {**base, **spec})


def tenant(**spec: Any) -> Plain:
    return document("Tenant", spec)


def cluster(provider: Any = None, **spec: Any) -> Plain:
    return document("Cluster", {"provider": provider or {"type": "local"}, **spec})


def platform(**spec: Any) -> Plain:
    return document("Platform", spec)


def engine(url: str) -> Plain:
    return cluster({"type": "external", "endpoints": [{"url": url, "function": "chat"}]})


GATES = {"strategy": "canary", "steps": [{"weightPercent": 10, "hold": "5m"}]}

# What JSON Schema refuses too: (name, document, words of the model's message).
SHAPE: list[tuple[str, Plain, str]] = [
    ("api version", function() | {"apiVersion": "v1"}, "detoserve.ai/v1alpha1"),
    ("upper-case name", function() | {"metadata": {"name": "Chat"}}, "pattern"),
    ("long name", function() | {"metadata": {"name": "a" * 64}}, "pattern|63"),
    ("name ends in dash", function() | {"metadata": {"name": "a-"}}, "pattern"),
    ("unknown field in metadata", function() | {"metadata": {"name": "a", "uid": "1"}}, "Extra"),
    ("label value", function() | {"metadata": {"name": "a", "labels": {"k": "a b"}}}, "pattern"),
    ("number as label", function() | {"metadata": {"name": "a", "labels": {"k": 1}}}, "string"),
    ("label key", function() | {"metadata": {"name": "a", "labels": {"a b": "c"}}}, "pattern"),
    ("no spec", {k: v for k, v in function().items() if k != "spec"}, "required"),
    ("snake case", function(runtime=RUNTIME | {"tensor_parallel": 2}), "Extra"),
    ("unknown engine", function(runtime={"engine": "vLLM"}), "vllm"),
    ("custom without command", function(runtime={"engine": "custom"}), "needs a command"),
    (
        "disaggregation on vllm",
        function(runtime=RUNTIME | {"disaggregation": {"prefill": {}, "decode": {}}}),
        "no disaggregation",
    ),
    ("bare model name", function(model={"uri": "org/name"}), "no model URI"),
    ("uri with a newline", function(model={"uri": "hf://org/name\n/x"}), "no model URI"),
    ("env not text", function(runtime=RUNTIME | {"env": {"A": 1}}), "string"),
    ("env name", function(runtime=RUNTIME | {"env": {"A-B": "1"}}), "pattern"),
    ("args not a list", function(runtime=RUNTIME | {"args": "--x"}), "list"),
    ("secret inline", function(runtime=RUNTIME | {"secrets": {"A": "s3cr3t"}}), "SecretRef"),
    ("secret without source", function(runtime=RUNTIME | {"secrets": {"A": {}}}), "exactly one"),
    (
        "secret of two sources",
        function(runtime=RUNTIME | {"secrets": {"A": {"fromEnv": "A", "fromFile": "/a"}}}),
        "exactly one",
    ),
    ("text as number", function(scaling={"minReplicas": "2"}), "integer"),
    ("boolean as number", function(scaling={"minReplicas": True}), "integer"),
    ("negative replicas", function(scaling={"minReplicas": -1}), "greater"),
    ("metric alone", function(scaling={"metric": "qps", "maxReplicas": 2}), "belong together"),
    ("target alone", function(scaling={"target": 2.0, "maxReplicas": 2}), "belong together"),
    ("metric without maximum", function(scaling={"metric": "qps", "target": 2}), "maxReplicas"),
    ("duration without unit", function(readiness={"timeout": 15}), "like 15s"),
    ("duration with a space", function(readiness={"timeout": "15 s"}), "no duration"),
    ("duration backwards", function(readiness={"timeout": "30s1h"}), "no duration"),
    ("zero timeout", function(readiness={"timeout": "0s"}), "above 0"),
    ("readiness path", function(readiness={"path": "health"}), "pattern"),
    ("size without unit", function(resources={"memory": 16}), "like 16Gi"),
    ("size zero", function(resources={"memory": "0Gi"}), "no size"),
    ("gpu without types", function(resources={"gpu": {"types": []}}), "at least 1"),
    ("gpu type twice", function(resources={"gpu": {"types": ["H100", "H100"]}}), "twice"),
    ("policy", function(routing={"policy": "random"}), "expected-latency"),
    ("negative price", function(price={"inputPerMillion": -1}), "greater"),
    ("no task", function(model=MODEL | {"tasks": []}), "at least 1"),
    ("key in the clear", tenant(keys=[{"id": "a", "key": "x", "sha256": HASH}]), "Extra"),
    ("short hash", tenant(keys=[{"id": "a", "sha256": "abc"}]), "pattern"),
    ("upper-case hash", tenant(keys=[{"id": "a", "sha256": "A" * 64}]), "pattern"),
    ("scope", tenant(keys=[{"id": "a", "sha256": HASH, "scopes": ["admin"]}]), "inference"),
    (
        "local time",
        tenant(keys=[{"id": "a", "sha256": HASH, "expires": "2027-01-01T00:00:00"}]),
        "time zone",
    ),
    (
        "date alone",
        tenant(keys=[{"id": "a", "sha256": HASH, "expires": "2027-01-01"}]),
        "time zone",
    ),
    ("unix time", tenant(keys=[{"id": "a", "sha256": HASH, "expires": 1800000000}]), "time zone"),
    ("wrong case of USD", tenant(budget={"monthlyUsd": 5}), "Extra"),
    ("model with a space", tenant(models=["a b"]), "pattern"),
    ("priority", tenant(priority=101), "less"),
    ("shadow of nothing", deployment(shadow={"percent": 0}), "greater"),
    ("weight zero", tenant(weight=0), "greater"),
    ("no provider", document("Cluster", {}), "required"),
    ("unknown provider", cluster({"type": "nomad"}), "kubernetes"),
    ("provider without its field", cluster({"type": "kubernetes"}), "context"),
    ("field of another provider", cluster({"type": "local", "context": "x"}), "Extra"),
    ("zone without region", cluster({"type": "cloud", "cloud": "aws", "zone": "a"}), "region"),
    ("no endpoints", cluster({"type": "external", "endpoints": []}), "at least 1"),
    ("endpoint without scheme", engine("10.0.0.1:8000"), "no endpoint"),
    ("endpoint by file", engine("file:///etc/passwd"), "no endpoint"),
    ("endpoint with credentials", engine("https://u:p@host"), "credentials"),
    ("endpoint with half a password", engine("http://u:p@[bad"), "before @"),
    ("endpoint with query", engine("https://host/?key=x"), "no query"),
    ("endpoint with backslash", engine("http://host\\@evil"), "no endpoint|credentials"),
    ("for nobody", deployment(shared=False), "tenants"),
    ("for some and all", deployment(tenants=["a"]), "tenants"),
    ("nowhere", deployment(placement={}), "anyOf"),
    ("here and anywhere", deployment(placement={"cluster": "a", "anyOf": ["b"]}), "anyOf"),
    ("any of none", deployment(placement={"anyOf": []}), "anyOf"),
    ("canary without steps", deployment(rollout={"strategy": "canary"}), "needs steps"),
    ("steps without canary", deployment(rollout={"steps": GATES["steps"]}), "belong to strategy"),
    ("tenant twice", deployment(shared=False, tenants=["a", "a"]), "twice"),
    (
        "spot as boolean",
        deployment(placement={"cluster": "a", "constraints": {"spot": True}}),
        "never",
    ),
    ("poll without pause", platform(intervals={"poll": "0s"}), "above 0"),
    ("branch with a space", platform(status={"branch": "a b"}), "pattern"),
    ("branch from the root", platform(status={"branch": "/a"}), "pattern"),
    ("percent over 100", platform(prune={"maxDeletionsPercent": 101}), "less"),
]

# What only the models can say.
SENSE: list[tuple[str, Plain, str]] = [
    ("expires before it begins", tenant(keys=[{"id": "a", "sha256": HASH, "notBefore": "2027-01-01T00:00:00Z", "expires": "2026-01-01T00:00:00Z"}]), "later than notBefore"),
    ("key id twice", tenant(keys=[{"id": "a", "sha256": HASH}, {"id": "a", "sha256": OTHER_HASH}]), "stands twice"),
    ("key twice", tenant(keys=[{"id": "a", "sha256": HASH}, {"id": "b", "sha256": HASH}]), "one sha256"),
    ("GPU limit below quota", tenant(gpus={"quota": 4, "limit": 2}), "below quota"),
    ("maximum below minimum", function(scaling={"minReplicas": 3, "maxReplicas": 2}), "below minReplicas"),
    ("KV use above one", function(scaling={"metric": "kvUsage", "target": 80, "maxReplicas": 2}), "between 0 and 1"),
    ("more parallel than GPUs", function(runtime=RUNTIME | {"tensorParallel": 8}, resources={"gpu": {"types": ["H100"], "count": 4}}), "over 8 GPUs"),
    ("simulated model on vllm", function(model={"uri": "sim://chat"}), "use simulated"),
    ("variable twice", function(runtime=RUNTIME | {"env": {"A": "1"}, "secrets": {"A": {"fromEnv": "A"}}}), "keep one"),
    ("all weights zero", platform(routing={"weights": {"kvCache": 0, "session": 0, "load": 0, "latency": 0}}), "all four"),
    ("huge duration", platform(intervals={"poll": "999999999d"}), "less"),
    ("huge size", function(resources={"memory": "999999999999999Ti"}), "less"),
    ("network with host bits", cluster(endpointCidrs=["10.0.0.1/8"]), "no network"),
    ("port of an endpoint", engine("http://host:99999"), "no endpoint"),
    ("GPU type listed twice", cluster(gpus=[{"type": "H100", "count": 1}, {"type": "H100", "count": 2}]), "stands twice"),
    ("KAI without Kubernetes", cluster(kai={"enabled": True}), "provider kubernetes"),
    ("KAI set but off", cluster({"type": "kubernetes", "context": "c"}, kai={"parentQueue": "q"}), "enabled"),
    ("canary goes back", deployment(rollout={"strategy": "canary", "steps": [{"weightPercent": 50}, {"weightPercent": 10}]}), "must grow"),
    ("branch that Git refuses", platform(status={"branch": "a..b"}), "no branch name"),
    ("more stages than GPUs", function(runtime={"engine": "dynamo", "disaggregation": {"prefill": {"gpus": 2}, "decode": {"gpus": 4}}}, resources={"gpu": {"types": ["H100"], "count": 4}}), "over 6 GPUs"),
    ("stage wider than its GPUs", function(runtime={"engine": "dynamo", "disaggregation": {"prefill": {"tensorParallel": 2}, "decode": {}}}), "needs as many gpus"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("document", "words"), [case[1:] for case in SHAPE + SENSE], ids=[c[0] for c in SHAPE + SENSE]
)
def test_the_model_refuses_it_in_words(document: Plain, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MODELS[document["kind"]].model_validate(document)


@pytest.mark.parametrize("document", [case[1] for case in SHAPE], ids=[case[0] for case in SHAPE])
def test_json_schema_refuses_it_under_both_drafts(document: Plain) -> None:
    assert verdicts(document) == {False}


@pytest.mark.parametrize("document", [function(), deployment(), tenant(), cluster(), platform()])
def test_what_the_corpus_starts_from_is_valid(document: Plain) -> None:
    MODELS[document["kind"]].model_validate(document)
    assert verdicts(document) == {True}


def test_an_unknown_kind_is_refused() -> None:
    assert verdicts(document("Model", {})) == {False}
