"""Each package imports only what its extra installs: the router stays light, and nothing is missing."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"schemas", "reconciler", "router", "agent"}
EXTENSIONS = {"_ruamel_yaml": "ruamel-yaml-clib", "pydantic_core": "pydantic"}
"""Imported by a name that its distribution does not list, or part of one that is declared."""


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {plain(re.split(r"[\[<>=~! ;]", line)[0]) for line in lines}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(package: str) -> set[str]:
    names = set()
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - OURS - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        ("schemas", ()),
        ("router", ("router", "otel")),
        ("agent", ("agent", "agent-kubernetes")),
        ("reconciler", ("reconciler",)),
    ],
)
def test_imports_are_declared(package: str, extras: tuple[str, ...]) -> None:
    distributions = packages_distributions()
    wanted = {
        module: {EXTENSIONS[module]}
        if module in EXTENSIONS
        else {plain(d) for d in distributions.get(module, [module])}
        for module in imported(package)
    }
    missing = {m for m, dists in wanted.items() if not dists & declared(*extras)}
    assert not missing
    used = set().union(*wanted.values())
    own = declared(*extras) - declared() if extras else declared()
    assert own <= used | {"ruamel-yaml-clib"}, "declared, but never imported"
