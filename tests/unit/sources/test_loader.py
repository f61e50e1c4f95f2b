from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.config import Location, ObjectKey, Problem
from reconciler.errors import SourceInvalid
from reconciler.sources.loader import Loader
from reconciler.sources.yaml_document import Limits
from schemas import api_keys
from tests.config_text import cluster, deployment, function, platform, tenant
from tests.memory_source import MemorySource

GOOD = {
    "functions/chat.yaml": function(),
    "clusters.yml": cluster() + "---\n" + cluster("west"),
    "tenants/acme.yaml": tenant(),
    "deployments/chat.yaml": deployment(),
}
NAMES = {"Function/chat", "Cluster/local", "Cluster/west", "Tenant/acme", "Deployment/chat"}


def load(source: MemorySource, loader: Loader | None = None):
    return (loader or Loader()).load(source.fetch(), source)


def names(loaded) -> set[str]:
    return {str(key) for key in loaded.objects}


def test_all_yaml_files_are_desired_and_nothing_else_is():
    source = MemorySource(
        GOOD
        | {
            "README.md": "kind: nothing\n",
            ".github/workflows/check.yaml": "on: push\n",
            ".schemas/function.yaml": "x: [",
            ".hidden.yaml": "x: [",
            "notes.yaml.txt": "x: [",
            "UPPER.YAML": "x: [",
        }
    )
    loaded = load(source)
    assert names(loaded) == NAMES
    assert loaded.problems == ()
    assert loaded.failed_paths == frozenset()
    assert loaded.revision == "r1"


def test_a_file_that_fails_does_not_stop_the_others():
    source = MemorySource(GOOD | {f"d/{n}.yaml": deployment(f"d{n}") for n in range(49)})
    source.commit(
        GOOD | {f"d/{n}.yaml": deployment(f"d{n}") for n in range(48)} | {"d/48.yaml": "["}
    )
    loaded = load(source)
    assert len(loaded.objects) == len(NAMES) + 48
    assert loaded.failed_paths == {"d/48.yaml"}
    (problem,) = loaded.problems
    assert str(problem.location) == "d/48.yaml:1:2"


def test_the_ignore_file_leaves_out_files_and_their_keys():
    key = api_keys.create().text
    files = {
        "kustomization.yaml": "resources: []\n",
        "charts/a/values.yaml": "x: 1\n",
        "charts/keep.yaml": platform(),
        "fixtures/key.txt": key,
    }
    assert load(MemorySource(GOOD | files)).failed_paths == {
        "kustomization.yaml",
        "charts/a/values.yaml",
    }
    ignore = "# not ours\n/kustomization.yaml\ncharts/**\n!charts/keep.yaml\nfixtures/\n"
    loaded = load(MemorySource(GOOD | files | {".detoserveignore": ignore}))
    assert loaded.problems == ()
    assert names(loaded) == NAMES | {"Platform/main"}


def test_the_ignore_file_is_the_one_at_the_root():
    files = {f"prod/{path}": text for path, text in GOOD.items()}
    files |= {"prod/x/values.yaml": "[", "prod/.detoserveignore": "x/\n"}
    loaded = load(MemorySource(files, root="prod"))
    assert names(loaded) == NAMES
    assert loaded.problems == ()
    assert {o.location.path.split("/")[0] for o in loaded.objects.values()} == {"prod"}


@pytest.mark.parametrize(
    ("ignore", "place"),
    [("ok/\n[z-a]\n", ":2:1"), (b"\xff", ":1:1"), ("x\n" * 40_000, ":1:1")],
)
def test_an_ignore_file_that_cannot_be_read_stops_everything(ignore, place):
    with pytest.raises(SourceInvalid, match=f"^.detoserveignore{place}"):
        load(MemorySource(GOOD | {".detoserveignore": ignore}))


@pytest.mark.parametrize("files", [{}, {"README.md": "x"}, {".schemas/a.yaml": "x"}])
def test_a_repo_without_yaml_is_an_error_and_never_empty(files):
    with pytest.raises(SourceInvalid, match="never deletes"):
        load(MemorySource(files))


def test_two_objects_of_one_name_are_both_named_and_neither_loads():
    loaded = load(MemorySource(GOOD | {"more/again.yaml": deployment(more="  weight: 1\n")}))
    assert names(loaded) == NAMES - {"Deployment/chat"}
    assert loaded.failed_paths == {"deployments/chat.yaml", "more/again.yaml"}
    first, second = loaded.problems
    assert str(first) == (
        "deployments/chat.yaml:3:12: Deployment/chat stands twice, also at more/again.yaml:1:1; "
        "rename or delete one of them"
    )
    assert second.location.path == "more/again.yaml"
    assert "deployments/chat.yaml:1:1" in second.message
    assert {first.key, second.key} == {ObjectKey("Deployment", "chat")}


def test_one_name_may_be_of_two_kinds():
    assert load(MemorySource(GOOD)).objects.keys() >= {
        ObjectKey("Function", "chat"),
        ObjectKey("Deployment", "chat"),
    }


@pytest.mark.parametrize(
    "path", ["README.md", ".env", ".github/x.yaml", "bin/tool", "tenants/a.yaml"]
)
def test_a_key_anywhere_in_the_repo_is_an_error_that_does_not_repeat_it(path):
    key = api_keys.create().text
    loaded = load(MemorySource(GOOD | {path: f"token = {key}\n"}))
    assert any(p.location.path == path and p.severity == "error" for p in loaded.problems)
    assert key not in repr(loaded)
    assert names(loaded) == NAMES
    assert loaded.failed_paths == ({path} if path == "tenants/a.yaml" else set())


def test_large_files_are_not_read():
    source = MemorySource(
        GOOD | {"big.yaml": "# x\n" * 1000, "model.bin": b"\0" * (8 * 1024 * 1024 + 1)}
    )
    loaded = Loader(Limits(size_bytes=2000)).load(source.fetch(), source)
    assert names(loaded) == NAMES
    assert {(p.location.path, p.severity) for p in loaded.problems} == {
        ("big.yaml", "error"),
        ("model.bin", "warning"),
    }
    assert loaded.failed_paths == {"big.yaml"}
    assert not {"big.yaml", "model.bin"} & set(source.reads)


def test_what_the_source_refuses_fails_unless_it_is_ignored():
    source = MemorySource(GOOD | {".detoserveignore": "docs\n"})
    source.problems = (
        Problem(Location("tenants/link.yaml"), "symlinks are not followed"),
        Problem(Location("docs/link"), "symlinks are not followed"),
    )
    loaded = load(source)
    assert loaded.problems == (source.problems[0],)
    assert loaded.failed_paths == {"tenants/link.yaml"}


def test_an_unchanged_file_is_never_read_again():
    source, loader = MemorySource(GOOD), Loader()
    first = load(source, loader)
    assert sorted(source.reads) == sorted(GOOD)
    source.reads.clear()
    again = load(source, loader)
    assert (again.objects, again.digest) == (first.objects, first.digest)
    source.commit(GOOD | {"tenants/acme.yaml": tenant(more="  priority: 1\n")})
    changed = load(source, loader)
    assert source.reads == ["tenants/acme.yaml"]
    assert changed.digest != first.digest
    assert changed.revision == "r2"


def test_a_commit_that_touches_nothing_desired_has_the_same_digest():
    source, loader = MemorySource(GOOD), Loader()
    first = load(source, loader)
    source.commit(GOOD | {"README.md": "news", ".github/a.yaml": "x: 1"})
    second = load(source, loader)
    assert second.digest == first.digest
    assert second.revision == "r2"


def test_a_moved_file_has_another_digest_and_place():
    source, loader = MemorySource(GOOD), Loader()
    first = load(source, loader)
    moved = {("x/" + path if path.startswith("t") else path): t for path, t in GOOD.items()}
    source.commit(moved)
    second = load(source, loader)
    assert second.digest != first.digest
    assert second.objects[ObjectKey("Tenant", "acme")].location.path == "x/tenants/acme.yaml"


def test_what_is_remembered_is_bounded_by_the_tree():
    source, loader = MemorySource(), Loader()
    for n in range(20):
        source.commit(GOOD | {f"d/{n}.yaml": deployment(f"d{n}")})
        load(source, loader)
    source.reads.clear()
    source.commit(GOOD | {"d/3.yaml": deployment("d3")})
    load(source, loader)
    assert source.reads == ["d/3.yaml"]


def test_the_last_good_version_of_a_broken_file_is_found():
    source, loader = MemorySource({"d.yaml": deployment(more="  weight: 1\n")}), Loader()
    for text in (deployment(more="  weight: 2\n"), "a: [", deployment(more="  wait: 3\n"), "]"):
        source.commit({"d.yaml": text})
    assert load(source, loader).failed_paths == {"d.yaml"}
    (found,) = loader.last_good(source, "d.yaml")
    assert found.value.spec.weight == 2
    assert str(found.location) == "d.yaml:1:1"


def test_a_file_that_never_was_good_has_no_last_good_version():
    source = MemorySource({"d.yaml": "["})
    source.commit({"d.yaml": "]", "key.yaml": f"# {api_keys.create().text}\n{tenant()}"})
    source.commit({"d.yaml": "}", "key.yaml": "["})
    assert Loader().last_good(source, "d.yaml") == ()
    assert Loader().last_good(source, "key.yaml") == ()
    assert Loader().last_good(source, "none.yaml") == ()


FILES = st.dictionaries(
    st.sampled_from([f"{folder}{n}.yaml" for folder in ("", "x/", ".y/") for n in "abc"]),
    st.sampled_from(
        [function(), deployment(), deployment("other"), tenant(), cluster(), "[", "", "a"]
    ),
    min_size=1,
)


@given(st.lists(FILES, min_size=1, max_size=5), st.randoms())
def test_a_loader_that_remembers_says_what_a_fresh_one_says(commits, random):
    source, loader = MemorySource(commits[0]), Loader()
    for files in commits:
        shuffled = list(files.items())
        random.shuffle(shuffled)
        source.commit(dict(shuffled))
        outcomes = []
        for one in (loader, Loader()):
            try:
                outcomes.append(load(source, one))
            except SourceInvalid as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
