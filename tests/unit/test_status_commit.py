from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.publish.status_commit import (
    SUMMARY,
    Blob,
    blob_sha,
    delta,
    is_managed,
    message,
    parse_tree,
)

paths = st.sampled_from([f"status/deployment/d{n}.yaml" for n in range(6)] + [SUMMARY])
contents = st.dictionaries(paths, st.binary(max_size=4))


def tree_of(documents: dict[str, bytes]) -> dict[str, Blob]:
    return {path: Blob("100644", blob_sha(data, "sha1")) for path, data in documents.items()}


def shas_of(documents: dict[str, bytes]) -> dict[str, str]:
    return {path: blob_sha(data, "sha1") for path, data in documents.items()}


@given(before=contents, after=contents)
def test_a_delta_names_exactly_what_differs(
    before: dict[str, bytes], after: dict[str, bytes]
) -> None:
    foreign = {"README.md": Blob("100644", "1" * 40), "status/notes.txt": Blob("100755", "2" * 40)}
    change = delta({**foreign, **tree_of(before)}, after, shas_of(after))

    reached = {**before, **dict(change.written)}
    for path in change.deleted:
        del reached[path]
    assert reached == after
    assert all(before.get(path) != data for path, data in change.written)
    assert change.empty == (before == after)


def test_a_document_that_was_made_executable_is_written_again() -> None:
    documents = {SUMMARY: b"x"}
    tree = {SUMMARY: Blob("100755", blob_sha(b"x", "sha1"))}
    assert delta(tree, documents, shas_of(documents)).written == ((SUMMARY, b"x"),)


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "status/../main.yaml",
        "status/deployment/../x.yaml",
        "status/deployment/.yaml",
        "status/deployment/a\nb.yaml",
        "status/deployment/a.yml",
        "/status/deployment/a.yaml",
        "status/deployment/x/a.yaml",
    ],
)
def test_only_status_paths_are_managed(path: str) -> None:
    assert not is_managed(path)
    with pytest.raises(ValueError, match="no path of a status document"):
        delta({}, {path: b""}, {path: "0"})


def test_blob_ids_are_gits() -> None:
    assert blob_sha(b"hello\n", "sha1") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert (
        blob_sha(b"", "sha256")
        == "473a0f4c3be8a93681a267e3b1e9a7dcda1185436fe141f7749120a303721813"
    )


def test_a_tree_listing_is_read_with_odd_names() -> None:
    listing = b"100644 blob aa\tstatus/a b.yaml\x00120000 blob bb\t\xff\x00"
    assert parse_tree(listing) == {
        "status/a b.yaml": Blob("100644", "aa"),
        "\udcff": Blob("120000", "bb"),
    }


def subject(count: int, *, summary: bool = True, branch: str = "main") -> str:
    documents = {f"status/tenant/t{n}.yaml": b"" for n in range(count)}
    if summary:
        documents[SUMMARY] = b""
    change = delta({}, documents, shas_of(documents))
    text = message(
        change, source_branch=branch, revision="9f3c1ab" * 5, plan_digest="p1", lease_generation=7
    )
    return text.splitlines()[0]


def test_subjects_count_objects_and_not_the_summary() -> None:
    assert subject(2) == "status: 2 objects changed at main@9f3c1ab"
    assert subject(1, summary=False) == "status: 1 object changed at main@9f3c1ab"
    assert subject(0) == "status: summary changed at main@9f3c1ab"


def test_a_long_branch_name_leaves_the_subject_within_72_characters() -> None:
    assert (
        subject(12345, branch="feature/" + "x" * 60) == "status: 12345 objects changed at 9f3c1ab"
    )


def test_trailers_follow_the_subject() -> None:
    change = delta({}, {SUMMARY: b""}, {SUMMARY: "0"})
    text = message(change, source_branch="main", revision="abc", plan_digest="", lease_generation=3)
    assert text.endswith("\n\nDetoserve-Source-Revision: abc\nDetoserve-Lease: 3\n")
