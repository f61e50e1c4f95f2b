"""One file of the repo -> its objects and its problems. Pure: bytes in, records out.

Not here: which files are read (desired_paths), or what spans files (loader, core.references).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, get_args

from pydantic import ValidationError

from reconciler.core.config import ConfigObject, Location, ObjectKey, Problem
from reconciler.core.suggest import closest, suggestion
from reconciler.sources.desired_paths import IGNORE_FILE
from reconciler.sources.field_errors import field_errors
from reconciler.sources.yaml_document import (
    Document,
    Limits,
    YamlError,
    parse_documents,
    position,
)
from schemas.api_keys import find_keys
from schemas.base import API_VERSION
from schemas.kinds import MODELS, Kind

_KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
_ELSEWHERE: Final = f"move it out of the config repo, or list it in {IGNORE_FILE}"
_KIND_LINE: Final = re.compile(rf"kind:\s*['\"]?({'|'.join(_KINDS)})\b")
_NAME: Final = r"\bname['\"]?:\s*['\"]?([a-z0-9][-a-z0-9]{0,62})"
_NAME_LINE: Final = re.compile(rf"([ \t]+){_NAME}")
_FLOW_NAME: Final = re.compile(rf"metadata:\s*{{.*?{_NAME}")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What one file says. `problems` and `objects` both, where only some documents are right."""

    objects: tuple[ConfigObject, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def failed(self) -> bool:
        return any(problem.severity == "error" for problem in self.problems)


def parse_config_file(path: str, raw: bytes, limits: Limits) -> ConfigFile:
    """Every document of a YAML file, valid or not.

    A file that holds a key gives no object at all; neither does one that is no YAML, but the objects
    it most likely meant are named in its problems, so that nothing that runs for them is deleted.
    """
    if leaked := key_problems(path, raw):
        return ConfigFile(problems=(*leaked, *_not_loaded(path, raw, leaked[0].location.line)))
    try:
        documents = parse_documents(raw, limits)
    except YamlError as error:
        problem = Problem(Location(path, error.line, error.column), error.message)
        return ConfigFile(problems=(problem, *_not_loaded(path, raw, error.line)))
    objects: list[ConfigObject] = []
    problems: list[Problem] = []
    for document in documents:
        if document.data is not None:
            outcome = _parse_object(path, document)
            if isinstance(outcome, ConfigObject):
                objects.append(outcome)
            else:
                problems += outcome
    if not objects and not problems:
        problems.append(
            Problem(Location(path, 1, 1), "the file holds no object; delete it", "warning")
        )
    return ConfigFile(tuple(objects), tuple(problems))


def key_problems(path: str, raw: bytes) -> tuple[Problem, ...]:
    """Key-shaped strings in any file, each at its place and never repeated."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")  # every byte is a character: the key's own are ASCII
    return tuple(
        Problem(
            Location(path, *position(text, offset)),
            f"this looks like {what}; revoke it, take it out of the repo, "
            "and refer to secrets by name (runtime.secrets) or by hash (detoserve keys create)",
        )
        for offset, what in find_keys(text)
    )


def _parse_object(path: str, document: Document) -> ConfigObject | list[Problem]:
    data, marks = document.data, document.marks
    start = Location(path, *marks[()])
    if not isinstance(data, dict):
        return [
            Problem(start, "a document must be a mapping with apiVersion, kind, metadata, spec")
        ]
    key = _object_key(data)

    def problem(field: str, message: str) -> Problem:
        return Problem(Location(path, *marks.get((field,), marks[()])), message, key=key)

    if envelope := _envelope_error(path, data):
        return [problem(*envelope)]
    kind: Kind = data["kind"]
    model = MODELS[kind]
    try:
        value = model.model_validate(data)
    except ValidationError as error:
        return sorted(
            Problem(Location(path, *mark), message, key=key)
            for mark, message in field_errors(error, model, document)
        )
    canonical = json.dumps(
        value.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":")
    )
    return ConfigObject(
        key=ObjectKey(kind, value.metadata.name),
        value=value,
        location=start,
        digest=hashlib.sha256(canonical.encode()).hexdigest(),
        marks=marks,
    )


def _envelope_error(path: str, data: dict[str, Any]) -> tuple[str, str] | None:
    """(field, message) where a document is not of this API at all."""
    version, kind = data.get("apiVersion"), data.get("kind")
    name = path.rpartition("/")[2]
    if name in ("kustomization.yaml", "kustomization.yml") or (
        isinstance(version, str) and version.startswith("kustomize.")
    ):
        return "apiVersion", (
            "this is a Kustomization, which is not run here: commit what `kustomize build` prints "
            f"instead, and list this file in {IGNORE_FILE}"
        )
    if version is None:
        return "apiVersion", f"apiVersion is missing; add `apiVersion: {API_VERSION}`"
    if version != API_VERSION:
        if isinstance(version, str) and (
            version.startswith("detoserve") or closest(version, [API_VERSION])
        ):
            return "apiVersion", f"apiVersion must be {API_VERSION}"
        return (
            "apiVersion",
            f"this is no DetoServe object (apiVersion: {API_VERSION}); {_ELSEWHERE}",
        )
    if kind is None:
        return "kind", f"kind is missing; write one of {', '.join(_KINDS)}"
    if kind not in _KINDS:
        shown = kind if isinstance(kind, str) else ""
        return "kind", f"there is no such kind; {suggestion(shown, _KINDS)}"
    return None


def _object_key(data: dict[str, Any]) -> ObjectKey | None:
    """Whom a document is about, as far as it says, valid or not."""
    kind, metadata = data.get("kind"), data.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if kind in _KINDS and isinstance(name, str):
        return ObjectKey(kind, name[:63])
    return None


def _not_loaded(path: str, raw: bytes, error_line: int) -> Iterator[Problem]:
    """The objects that a file which cannot be read was most likely meant to hold.

    A guess only ever shields: it keeps what runs from being deleted, and loads nothing.
    """
    for line, key in _likely_objects(raw.decode("utf-8", "replace")):
        yield Problem(
            Location(path, line, 1),
            f"not loaded, because of the error on line {error_line} of this file",
            key=key,
        )


def _likely_objects(text: str) -> Iterator[tuple[int, ObjectKey]]:
    """(line, key) of each document that has a `kind:` and a `metadata:` with a name, line by line."""
    kind: Kind | None = None
    name, indent, kind_line = "", "", 0
    in_metadata = False
    for number, line in enumerate([*text.split("\n"), "---"], 1):
        if line.startswith("---"):
            if kind and name:
                yield kind_line, ObjectKey(kind, name)
            kind, name, indent, in_metadata = None, "", "", False
        elif match := _KIND_LINE.match(line):
            kind, kind_line = next(k for k in _KINDS if k == match.group(1)), number
            in_metadata = False
        elif line.startswith("metadata:"):
            in_metadata, indent = True, ""
            if match := _FLOW_NAME.match(line):
                name = match.group(1)
        elif in_metadata and line[:1] in (" ", "\t"):
            indent = indent or line[: len(line) - len(line.lstrip())]
            match = _NAME_LINE.match(line)
            if match and match.group(1) == indent and not name:
                name = match.group(2)
        elif line.strip() and not line.startswith("#"):
            in_metadata = False
