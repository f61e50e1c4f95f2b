"""The generated JSON Schemas say what the models say, under draft-07 and 2020-12 alike."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator
from pydantic import ValidationError
from ruamel.yaml import YAML

from schemas import json_schema
from schemas.kinds import MODELS
from tests.unit.schemas.objects import Plain, any_object

EXAMPLE = Path(__file__).parents[3] / "example-config-repo"
SCHEMAS = json_schema.schemas()
VALIDATORS = {
    (name, draft.META_SCHEMA["$schema"]): draft(schema)
    for name, schema in SCHEMAS.items()
    for draft in (Draft7Validator, Draft202012Validator)
}
EXAMPLES = sorted(
    path
    for path in EXAMPLE.rglob("*.yaml")
    if not any(part.startswith(".") for part in path.relative_to(EXAMPLE).parts)
)


def documents(path: Path) -> list[Plain]:
    return list(YAML(typ="safe").load_all(path.read_text(encoding="utf-8")))


def verdicts(document: Plain) -> set[bool]:
    """What the schema of its kind and that of all kinds say of it, under both drafts."""
    kind = f"{str(document.get('kind')).lower()}.json"
    return {
        validator.is_valid(document)
        for (name, _), validator in VALIDATORS.items()
        if name in (kind, "all.json")
    }


def refused_by_model(document: Plain) -> bool:
    if document.get("kind") not in list(MODELS):
        return True
    try:
        MODELS[document["kind"]].model_validate(document)
    except ValidationError:
        return True
    return False


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_is_a_schema_of_both_drafts_and_holds_nothing_only_one_knows(name: str) -> None:
    schema = SCHEMAS[name]
    Draft7Validator.check_schema(schema)
    Draft202012Validator.check_schema(schema)
    for node in nodes(schema):
        assert not node.keys() & {"$defs", "prefixItems", "dependentRequired", "discriminator"}
        assert "$ref" not in node or len(node) == 1 or "$ref" in node.get("properties", {})


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from nodes(inner)


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "all.json"])
def test_every_field_has_a_description(name: str) -> None:
    schema = SCHEMAS[name]
    records = [schema, *schema["definitions"].values()]
    bare = [
        field
        for record in records
        for field, of in record.get("properties", {}).items()
        if not (of.get("description") or described(of, schema))
    ]
    assert bare == []


def described(of: Plain, schema: Plain) -> bool:
    name = of.get("$ref", "").removeprefix("#/definitions/")
    return "description" in schema["definitions"].get(name, {})


def test_defaults_are_written_as_in_yaml() -> None:
    parts = SCHEMAS["function.json"]["definitions"]
    assert parts["Readiness"]["properties"]["timeout"]["default"] == "15s"
    assert parts["Readiness"]["properties"]["initialDelay"]["default"] == "20m"
    assert parts["Scaling"]["properties"]["minReplicas"]["default"] == 1
    assert parts["Runtime"]["properties"]["args"]["default"] == []
    assert SCHEMAS["tenant.json"]["definitions"]["TenantSpec"]["properties"]["clusters"][
        "default"
    ] == ["*"]


def test_the_generated_files_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "schemas.json_schema", tmp_path], check=True)
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (EXAMPLE / ".schemas").iterdir()}
    assert committed == fresh, "run `just schemas` and commit what it writes"


def test_examples_are_there() -> None:
    kinds = [document["kind"] for path in EXAMPLES for document in documents(path)]
    assert set(kinds) == set(MODELS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(EXAMPLE)))
def test_every_example_is_valid_and_names_its_schema(path: Path) -> None:
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    reference = first.removeprefix("# yaml-language-server: $schema=")
    target = (path.parent / reference).resolve()
    assert target.parent == (EXAMPLE / ".schemas").resolve()
    assert second.startswith("# ")
    for document in documents(path):
        assert target.name == f"{document['kind'].lower()}.json"
        MODELS[document["kind"]].model_validate(document)
        assert verdicts(document) == {True}


@given(any_object)
@settings(max_examples=150, deadline=None)
def test_valid_objects_are_valid_everywhere_and_survive_being_written(document: Plain) -> None:
    value = MODELS[document["kind"]].model_validate(document)
    assert verdicts(document) == {True}
    written = json.loads(value.model_dump_json(by_alias=True))
    assert verdicts(written) == {True}
    assert MODELS[document["kind"]].model_validate(written) == value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


ODD = [
    None,
    "",
    " ",
    "x y",
    "0s",
    "15",
    "-1s",
    -1,
    0,
    1.5,
    10**12,
    True,
    [],
    ["a", "a"],
    {},
    {"a": 1},
]
FREE_KEYS = {"labels", "annotations", "env", "secrets"}


@given(any_object, st.data())
@settings(max_examples=300, deadline=None)
def test_schemas_are_never_stricter_than_the_program(document: Plain, data: st.DataObject) -> None:
    document = copy.deepcopy(document)
    path = data.draw(st.sampled_from([p for p in places(document) if p]))
    at(document, path[:-1])[path[-1]] = data.draw(st.sampled_from(ODD))
    judged = verdicts(document)
    assert len(judged) == 1, "the drafts, or the schemas of one kind and of all, differ"
    if not refused_by_model(document):
        assert judged == {True}


@given(any_object, st.data())
@settings(max_examples=100, deadline=None)
def test_an_unknown_field_is_refused_at_any_depth(document: Plain, data: st.DataObject) -> None:
    document = copy.deepcopy(document)
    path = data.draw(
        st.sampled_from(
            [
                p
                for p in places(document)
                if isinstance(at(document, p), dict) and not (p and p[-1] in FREE_KEYS)
            ]
        )
    )
    at(document, path)["maxReplica"] = 3
    assert refused_by_model(document)
    assert verdicts(document) == {False}


@given(any_object, st.data())
@settings(max_examples=100, deadline=None)
def test_a_missing_field_is_refused(document: Plain, data: st.DataObject) -> None:
    document = copy.deepcopy(document)
    missing = data.draw(st.sampled_from(["apiVersion", "kind", "metadata"]))
    del document[missing]
    assert not any(
        validator.is_valid(document)
        for (name, _), validator in VALIDATORS.items()
        if name == "all.json"
    )
