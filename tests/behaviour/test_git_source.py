from __future__ import annotations

import asyncio
import base64
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

from reconciler.errors import SourceInvalid, SourceUnreachable, Stalled, Transient
from reconciler.sources.base import Snapshot
from reconciler.sources.git_source import GitSource
from reconciler.sources.loader import Loader
from tests.config_text import cluster, deployment, function
from tests.git_repo import GitRepo, git
from tests.support import eventually_sync, free_port

CANARY = "canary5f1dcanary"
FILES = {"f.yaml": function(), "prod/c.yaml": cluster(), "prod/d.yaml": deployment()}


@pytest.fixture
def repo(tmp_path: Path) -> GitRepo:
    made = GitRepo(tmp_path / "config")
    made.commit(FILES)
    return made


@pytest.fixture
def open_source(tmp_path: Path, repo: GitRepo) -> Callable[..., GitSource]:
    """A source on the one mirror: opened again it is a reconciler that was restarted."""

    def opened(remote: object = None, **options: object) -> GitSource:
        return GitSource(str(remote or repo.path), tmp_path / "state" / "config.git", **options)  # type: ignore[arg-type]

    return opened


@pytest.fixture
def source(open_source: Callable[..., GitSource]) -> GitSource:
    return open_source()


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return tmp_path / "state" / "config.git"


def paths(snapshot: Snapshot) -> list[str]:
    return [entry.path for entry in snapshot.entries]


def contents(source: GitSource, snapshot: Snapshot) -> dict[str, bytes]:
    return {entry.path: raw for entry, raw in source.read(snapshot.entries)}


def test_the_newest_commit_is_read(repo, source):
    first = source.fetch()
    assert (first.revision, first.branch, first.root) == (repo.head, "main", "")
    assert contents(source, first) == {path: text.encode() for path, text in FILES.items()}
    repo.commit({"f.yaml": None, "g.yaml": "x: 1\n"})
    second = source.fetch()
    assert second.revision == repo.head
    assert paths(second) == ["g.yaml", "prod/c.yaml", "prod/d.yaml"]
    assert not second.rewritten


def test_nothing_new_is_the_same_snapshot(repo, source):
    first = source.fetch()
    assert source.fetch() is first
    repo.git("branch", "other")
    repo.git("tag", "v1")
    assert source.fetch() is first
    repo.commit(message="Nothing in it")
    assert source.fetch().entries is first.entries


def test_a_folder_of_the_repo(repo, open_source):
    source = open_source(path="/prod/")
    first = source.fetch()
    assert (first.root, paths(first)) == ("prod", ["prod/c.yaml", "prod/d.yaml"])
    repo.commit({"f.yaml": "changed: 1\n", "production/x.yaml": "x: 1\n"})
    assert source.fetch().entries == first.entries


def test_a_folder_whose_name_is_a_pattern(repo, open_source):
    repo.commit({"p*/a.yaml": "a: 1\n", "pq/b.yaml": "b: 1\n"})
    assert paths(open_source(path="p*").fetch()) == ["p*/a.yaml"]


@pytest.mark.parametrize("path", ["none", "f.yaml", "prod/none"])
def test_a_missing_folder_is_an_error_and_never_empty(open_source, path):
    with pytest.raises(SourceInvalid, match="missing folder never deletes"):
        open_source(path=path).fetch()


@pytest.mark.parametrize("path", ["../x", "a/./b", "a\nb", "a//b"])
def test_a_folder_outside_is_refused_at_once(open_source, path):
    with pytest.raises(Stalled, match="no folder of a repo"):
        open_source(path=path)


@pytest.mark.parametrize("remote", ["ext::sh -c touch% x", "ftp://h/x", "http::x"])
def test_transports_that_run_commands_are_refused_at_once(open_source, remote):
    with pytest.raises(Stalled, match="use https://"):
        open_source(remote)


def test_a_remote_is_no_option(open_source, tmp_path):
    with pytest.raises((SourceInvalid, SourceUnreachable)):
        open_source(f"--upload-pack=touch {tmp_path}/owned").fetch()
    assert not (tmp_path / "owned").exists()


def test_a_bare_repo_by_url_and_by_path(repo, tmp_path):
    bare = repo.bare_clone(tmp_path / "bare.git")
    for n, remote in enumerate((str(bare), bare.as_uri())):
        source = GitSource(remote, tmp_path / f"m{n}")
        assert source.fetch().revision == repo.head


def test_a_shallow_clone_can_be_read(repo, tmp_path):
    repo.commit({"f.yaml": "a: 1\n"})
    git(tmp_path, "clone", "--quiet", "--depth=1", repo.path.as_uri(), "shallow")
    source = GitSource(str(tmp_path / "shallow"), tmp_path / "m")
    assert source.fetch().revision == repo.head
    assert list(source.earlier_versions("f.yaml")) == []


def test_files_are_read_in_batches(repo, open_source, monkeypatch):
    monkeypatch.setattr("reconciler.sources.git_source._READ_AT_ONCE_BYTES", 5000)
    large = {f"b/{n}.bin": os.urandom(2000) for n in range(7)}
    repo.commit(large | {"b/empty.yaml": ""})
    source = open_source(path="b")
    assert contents(source, source.fetch()) == large | {"b/empty.yaml": b""}
    assert list(source.read([])) == []


# What is not there


def test_an_empty_repo_is_an_error(tmp_path):
    GitRepo(tmp_path / "empty")
    with pytest.raises(SourceInvalid, match="no commit yet; an empty repo never deletes"):
        GitSource(str(tmp_path / "empty"), tmp_path / "m").fetch()


def test_another_branch_is_suggested(open_source):
    with pytest.raises(SourceInvalid, match="no branch 'mian', did you mean \"main\""):
        open_source(branch="mian").fetch()


def test_a_deleted_branch_is_an_error_until_it_is_back(repo, source):
    first = source.fetch()
    repo.git("checkout", "--quiet", "-b", "other")
    repo.git("branch", "-D", "main")
    for _ in range(2):
        with pytest.raises(SourceInvalid, match="no branch 'main'"):
            source.fetch()
    assert contents(source, first)
    repo.git("branch", "main")
    assert source.fetch().revision == first.revision


def test_no_repo_is_an_error_until_there_is_one(repo, source, tmp_path):
    source.fetch()
    repo.path.rename(tmp_path / "away")
    with pytest.raises(SourceInvalid, match="does not appear to be a git repository"):
        source.fetch()
    (tmp_path / "away").rename(repo.path)
    assert source.fetch().revision == repo.head


def test_a_remote_that_refuses_the_connection(open_source, repo):
    source = open_source()
    good = source.fetch()
    down = open_source(f"git://127.0.0.1:{free_port()}/config")
    with pytest.raises(SourceUnreachable, match="cannot be read"):
        down.fetch()
    assert source.fetch().revision == good.revision


@pytest.fixture
def daemon(repo: GitRepo) -> Iterator[tuple[psutil.Process, str]]:
    port = free_port()
    process = subprocess.Popen(
        [
            *("git", "daemon", "--export-all", "--listen=127.0.0.1", f"--port={port}"),
            f"--base-path={repo.path.parent}",
        ],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def listening() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True

    try:
        eventually_sync(listening)
        yield psutil.Process(process.pid), f"git://127.0.0.1:{port}/{repo.path.name}"
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_remote_that_hangs_is_given_up_and_leaves_no_process(daemon, repo, tmp_path):
    process, url = daemon
    source = GitSource(url, tmp_path / "m", timeout_s=10)
    assert source.fetch().revision == repo.head
    for part in (process, *process.children()):
        part.suspend()
    hasty = GitSource(url, tmp_path / "m", timeout_s=0.5)
    before = set(psutil.Process().children(recursive=True))
    began = time.monotonic()
    with pytest.raises(SourceUnreachable, match=r"did not answer within 0\.5 s"):
        hasty.fetch()
    assert time.monotonic() - began < 5
    assert set(psutil.Process().children(recursive=True)) <= before
    for part in (process, *process.children()):
        part.resume()
    repo.commit({"f.yaml": "a: 1\n"})
    assert source.fetch().revision == repo.head


# What must not act


def test_symlinks_and_submodules_are_refused_where_they_stand(repo, source):
    blob, commit = repo.blob("a: 1\n"), repo.head
    repo.commit_tree(
        f"100644 blob {blob}\ta.yaml",
        f"120000 blob {repo.blob('/etc/passwd')}\tlink.yaml",
        f"160000 commit {commit}\tmodule",
    )
    snapshot = source.fetch()
    assert paths(snapshot) == ["a.yaml"]
    assert [(p.location.path, p.message.split()[0]) for p in snapshot.problems] == [
        ("link.yaml", "symlinks"),
        ("module", "submodules"),
    ]
    loaded = Loader().load(snapshot, source)
    assert {"link.yaml", "module"} <= loaded.failed_paths


@pytest.mark.parametrize("name", ["..", ".git", "."])
def test_trees_that_reach_out_are_not_even_fetched(repo, source, name):
    good = source.fetch()
    inner = repo.git("rev-parse", "HEAD^{tree}")
    repo.commit_tree(f"040000 tree {inner}\t{name}")
    with pytest.raises(SourceInvalid, match="cannot be used"):
        source.fetch()
    repo.git("update-ref", "refs/heads/main", good.revision)
    assert source.fetch().revision == good.revision


def test_names_that_people_misread_are_refused(repo, source):
    blob = repo.blob("a: 1\n")
    repo.commit_tree(
        f"100644 blob {blob}\ta\nb.yaml",
        f"100644 blob {blob}\ta\\b.yaml",
        f"100644 blob {blob}\tc\udcff.yaml",
        f"100644 blob {blob}\tok.yaml",
    )
    snapshot = source.fetch()
    assert paths(snapshot) == ["ok.yaml"]
    assert len(snapshot.problems) == 3
    assert all("\n" not in str(problem) for problem in snapshot.problems)


def test_hooks_of_the_mirror_do_not_run(repo, source, mirror, tmp_path):
    source.fetch()
    for name in ("reference-transaction", "post-update", "pre-auto-gc", "post-checkout"):
        hook = mirror / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        hook.chmod(hook.stat().st_mode | stat.S_IXUSR)
    repo.commit({"f.yaml": "a: 1\n"})
    source.fetch()
    assert not (tmp_path / "ran").exists()


# History


def force_push(repo: GitRepo) -> str:
    repo.git("reset", "--quiet", "--hard", "HEAD~1")
    return repo.commit({"g.yaml": "b: 1\n"}, "Force-pushed")


def test_a_rewritten_branch_says_so_until_it_descends_again(repo, source, open_source):
    lost = repo.commit({"f.yaml": "a: 1\n"})
    source.fetch()
    new = force_push(repo)
    assert (source.fetch().revision, source.fetch().rewritten_from) == (new, lost)
    repo.commit({"h.yaml": "c: 1\n"}, "An ordinary commit on top")
    assert source.fetch().rewritten_from == lost
    assert open_source().fetch().rewritten_from == lost
    repo.git("merge", "--quiet", "--strategy=ours", "-m", "Join the histories", lost)
    assert not source.fetch().rewritten
    assert not open_source().fetch().rewritten


def test_a_rewritten_branch_that_is_put_back_is_ordinary(repo, source):
    lost = repo.commit({"f.yaml": "a: 1\n"})
    source.fetch()
    force_push(repo)
    assert source.fetch().rewritten
    repo.git("reset", "--quiet", "--hard", lost)
    assert not source.fetch().rewritten


def test_a_commit_accepts_the_new_history_also_when_others_follow(repo, source, open_source):
    lost = repo.commit({"f.yaml": "a: 1\n"})
    source.fetch()
    force_push(repo)
    repo.commit(message=f"Mean something else\n\nDetoserve-Accept-History: {'0' * 40}")
    assert source.fetch().rewritten
    repo.commit(message=f"Mean it\n\nDetoserve-Accept-History: {lost[:12]}")
    last = repo.commit({"h.yaml": "c: 1\n"})
    assert not source.fetch().rewritten
    repo.git("reset", "--quiet", "--hard", "HEAD~1")
    assert open_source().fetch().rewritten_from == last


def test_a_first_look_is_no_rewriting(source, open_source, mirror):
    assert not source.fetch().rewritten
    shutil.rmtree(mirror)
    assert not open_source().fetch().rewritten


def test_earlier_versions_come_newest_first_and_follow_renames(repo, source):
    same = "long enough to be recognised: 1\n" * 9
    texts = [f"{same}version: {n}\n" for n in range(4)]
    repo.commit({"old [1].yaml": texts[0]})
    repo.commit({"old [1].yaml": texts[1]})
    repo.git("mv", "old [1].yaml", "new*.yaml")
    repo.commit({"new*.yaml": texts[2], "newer.yaml": "other: 1\n"})
    repo.commit({"new*.yaml": texts[1]})
    repo.commit({"new*.yaml": texts[3]})
    source.fetch()
    found = list(source.earlier_versions("new*.yaml"))
    assert [raw.decode() for _, raw in source.read(found)] == [texts[1], texts[2], texts[0]]
    assert {entry.path for entry in found} == {"new*.yaml"}
    assert len(list(source.earlier_versions("new*.yaml", limit=2))) == 2
    assert list(source.earlier_versions("none.yaml")) == []
    assert list(source.earlier_versions("prod")) == []


def test_earlier_versions_are_what_the_branch_pointed_at(repo, source):
    repo.git("checkout", "--quiet", "-b", "feature")
    repo.commit({"f.yaml": "never: on main\n"})
    repo.commit({"f.yaml": "merged: 1\n"})
    repo.git("checkout", "--quiet", "main")
    repo.git("merge", "--quiet", "--no-ff", "-m", "Merge", "feature")
    repo.commit({"f.yaml": "["})
    source.fetch()
    found = [raw.decode() for _, raw in source.read(source.earlier_versions("f.yaml"))]
    assert found == ["merged: 1\n", FILES["f.yaml"]]


def test_earlier_versions_of_what_is_a_link_now(repo, source):
    repo.commit_tree(f"120000 blob {repo.blob('x')}\tf.yaml")
    source.fetch()
    found = [raw.decode() for _, raw in source.read(source.earlier_versions("f.yaml"))]
    assert found == [FILES["f.yaml"]]


def test_commits_tell_their_story(repo, source):
    first = repo.head
    second = repo.commit(message="Subject\n\nBody, ünd more.\nA-Trailer: x")
    source.fetch()
    assert source.commit_message(second) == "Subject\n\nBody, ünd more.\nA-Trailer: x"
    assert source.parents(second) == (first,)
    assert source.parents(first) == ()
    assert source.is_ancestor(first, second)
    assert source.is_ancestor(first, first)
    assert not source.is_ancestor(second, first)
    assert not source.is_ancestor("1" * 40, second)
    with pytest.raises(SourceUnreachable):
        source.commit_message("1" * 40)
    with pytest.raises(SourceUnreachable):
        source.commit_message("--output=x")


# A mirror that was damaged


def truncate_head(mirror: Path) -> None:
    (mirror / "HEAD").write_text("")


def drop_head(mirror: Path) -> None:
    (mirror / "HEAD").unlink()


def drop_config_and_refs(mirror: Path) -> None:
    (mirror / "config").write_text("[core\n")


def drop_objects(mirror: Path) -> None:
    shutil.rmtree(mirror / "objects")


def empty_objects(mirror: Path) -> None:
    for file in (mirror / "objects").rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            file.write_bytes(b"")


def garble_objects(mirror: Path) -> None:
    for file in (mirror / "objects").rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            file.write_bytes(b"x" * file.stat().st_size)


def garble_refs(mirror: Path) -> None:
    (mirror / "refs" / "detoserve" / "fetched").write_text("nonsense\n")


def leave_a_lock(mirror: Path) -> None:
    (mirror / "refs" / "detoserve" / "fetched.lock").write_text("")
    (mirror / "refs" / "detoserve" / "accepted.lock").write_text("")


def make_it_a_file(mirror: Path) -> None:
    shutil.rmtree(mirror)
    mirror.write_text("")


@pytest.mark.parametrize(
    "damage",
    [
        truncate_head,
        drop_head,
        drop_config_and_refs,
        drop_objects,
        empty_objects,
        garble_objects,
        garble_refs,
        leave_a_lock,
        make_it_a_file,
    ],
)
@pytest.mark.parametrize("moved", [False, True], ids=["same commit", "new commit"])
def test_a_damaged_mirror_heals(repo, source, open_source, mirror, damage, moved):
    source.fetch()
    damage(mirror)
    if moved:
        repo.commit({"f.yaml": "a: 1\n"})
    again = open_source()

    def whole() -> bool:
        # A damage may show only when contents are asked for; then the next fetch heals.
        snapshot = again.fetch()
        assert snapshot.revision == repo.head
        try:
            return "f.yaml" in contents(again, snapshot)
        except Transient:
            return False

    assert whole() or whole()
    repo.commit({"g.yaml": "b: 1\n"})
    assert paths(again.fetch()) == ["f.yaml", "g.yaml", "prod/c.yaml", "prod/d.yaml"]


def test_a_missing_content_is_noticed_and_fetched_again(repo, source, mirror):
    snapshot = source.fetch()
    for pack in (mirror / "objects" / "pack").glob("*.pack"):
        packed = pack.read_bytes()
        for file in pack.parent.glob(f"{pack.stem}.*"):
            file.unlink()
        git(mirror, "unpack-objects", "-q", stdin=packed)
    blob = next(entry.blob for entry in snapshot.entries if entry.path == "prod/d.yaml")
    (mirror / "objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(Transient, match=r"prod/d\.yaml"):
        contents(source, snapshot)
    assert len(contents(source, source.fetch())) == 3


def test_a_damaged_mirror_stays_while_the_remote_is_away(repo, source, mirror, tmp_path):
    source.fetch()
    (mirror / "refs" / "detoserve" / "fetched").write_text("nonsense\n")
    repo.path.rename(tmp_path / "away")
    with pytest.raises(SourceInvalid):
        source.fetch()
    assert mirror.exists()
    (tmp_path / "away").rename(repo.path)
    assert source.fetch().revision == repo.head


def test_history_rewritten_while_the_mirror_broke_is_still_noticed(
    repo, source, open_source, mirror
):
    lost = repo.commit({"f.yaml": "a: 1\n"})
    source.fetch()
    force_push(repo)
    repo.git("reflog", "expire", "--expire=now", "--all")
    repo.git("gc", "--quiet", "--prune=now")
    (mirror / "refs" / "detoserve" / "fetched").write_text("nonsense\n")
    assert open_source().fetch().rewritten_from == lost
    repo.commit({"h.yaml": "a: 1\n"})
    assert open_source().fetch().rewritten_from == lost
    repo.commit(message=f"Mean it\n\nDetoserve-Accept-History: {lost}")
    assert not open_source().fetch().rewritten
    repo.commit()
    assert not open_source().fetch().rewritten


def test_only_one_process_fetches_into_a_mirror(source, open_source, mirror):
    source.fetch()
    other = open_source()
    with (
        other._mirror.alone(),
        pytest.raises(SourceUnreachable, match="state directory of its own"),
    ):
        source.fetch()
    assert source.fetch()


def test_a_state_directory_that_cannot_be_written_is_said(open_source, tmp_path, repo):
    (tmp_path / "state").write_text("a file is in the way")
    with pytest.raises(SourceUnreachable, match="no mirror can be made"):
        open_source().fetch()


def test_many_fetches_do_not_pile_up_packs(repo, source, mirror, monkeypatch):
    monkeypatch.setattr("reconciler.sources.git_mirror._FETCHES_PER_PACK", 2)
    monkeypatch.setattr(
        "reconciler.sources.git_mirror._PACK_SETTINGS",
        ("gc.auto=1000", "gc.autoPackLimit=2", "gc.autoDetach=false"),
    )
    for n in range(8):
        repo.commit({"f.yaml": f"n: {n}\n"})
        assert contents(source, source.fetch())["f.yaml"] == f"n: {n}\n".encode()
    assert len(list((mirror / "objects" / "pack").glob("*.pack"))) <= 4


# Credentials


def test_a_password_in_the_url_is_in_no_message(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    for remote in (
        f"https://user:{CANARY}@127.0.0.1:{free_port()}/x.git",
        f"https://{CANARY}@127.0.0.1:{free_port()}/x.git",
        f"ssh://user:{CANARY}@127.0.0.1:{free_port()}/x.git",
        f"https://127.0.0.1:{free_port()}/x.git?private_token={CANARY}",
    ):
        with pytest.raises((SourceUnreachable, SourceInvalid)) as caught:
            GitSource(remote, tmp_path / "m", timeout_s=5).fetch()
        assert CANARY not in str(caught.value)
        assert CANARY not in repr(caught.value.__context__)
    with pytest.raises(Stalled) as stalled:
        GitSource(f"ftp://user:{CANARY}@h/x", tmp_path / "m")
    assert CANARY not in str(stalled.value)
    assert CANARY not in caplog.text


async def serve_with_password(repo: GitRepo, bare: Path) -> tuple[web.AppRunner, int]:
    """The repo over HTTP for whoever knows the password."""
    repo.bare_clone(bare)
    git(bare, "update-server-info")

    password = base64.b64encode(f"ada:{CANARY}".encode()).decode()

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Basic {password}":
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="git"'})
        return await handler(request)

    app = web.Application(middlewares=[authenticate])
    app.router.add_static("/config.git", bare)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, runner.addresses[0][1]


async def test_credentials_open_a_remote_and_are_asked_for_by_nobody(repo, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    runner, port = await serve_with_password(repo, tmp_path / "bare.git")
    try:
        for user in ("", "ada@", "ada:wrong@"):
            closed = GitSource(f"http://{user}127.0.0.1:{port}/config.git", tmp_path / f"m{user}")
            with pytest.raises(SourceInvalid, match="refuses access; check the credentials"):
                await asyncio.to_thread(closed.fetch)
        by_url = GitSource(f"http://ada:{CANARY}@127.0.0.1:{port}/config.git", tmp_path / "by-url")
        assert (await asyncio.to_thread(by_url.fetch)).revision == repo.head
        (tmp_path / ".gitconfig").write_text("[credential]\n\thelper = store\n")
        (tmp_path / ".git-credentials").write_text(f"http://ada:{CANARY}@127.0.0.1%3a{port}\n")
        by_helper = GitSource(f"http://127.0.0.1:{port}/config.git", tmp_path / "by-helper")
        assert (await asyncio.to_thread(by_helper.fetch)).revision == repo.head
    finally:
        await runner.cleanup()
    for mirror in ("by-url", "by-helper"):
        for file in (tmp_path / mirror).rglob("*"):
            assert file.is_dir() or CANARY.encode() not in file.read_bytes()
