"""What deploy/compile_router.py compiles keeps the rules that make it the same program."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
_spec = importlib.util.spec_from_file_location("compile_router", ROOT / "deploy/compile_router.py")
compile_router = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compile_router)
MODULES = compile_router.modules()


def test_every_module_that_is_named_exists():
    assert len(MODULES) > 40
    assert [m for m in (*MODULES, *compile_router.INTERPRETED) if not (ROOT / m).exists()] == []


@pytest.mark.parametrize("module", MODULES)
def test_what_msgspec_decodes_is_not_compiled(module):
    # Its annotations would be gone: it would decode anything at all.
    tree = ast.parse((ROOT / module).read_text())
    bases = [
        ast.unparse(base) for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for base in c.bases
    ]
    assert not {"msgspec.Struct", "Struct", "TypedDict"} & set(bases)


@pytest.mark.parametrize("module", MODULES)
def test_none_begins_as_nothing_where_a_protocol_is_meant(module):
    # mypyc leaves such an attribute without any value: it belongs into __init__.
    tree = ast.parse((ROOT / module).read_text())
    classes = [c for c in ast.walk(tree) if isinstance(c, ast.ClassDef)]
    protocols = {c.name for c in classes if any("Protocol" in ast.unparse(b) for b in c.bases)}
    protocols |= {"Reader", "Owner", "Receiver", "Handler", "Ongoing", "Chance", "Channel"}
    wrong = [
        f"{c.name}.{ast.unparse(line.target)}"
        for c in classes
        for line in c.body
        if isinstance(line, ast.AnnAssign)
        and line.value is not None
        and {n.id for n in ast.walk(line.annotation) if isinstance(n, ast.Name)} & protocols
    ]
    assert wrong == []
