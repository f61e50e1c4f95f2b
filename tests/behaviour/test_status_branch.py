from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

from reconciler.errors import Fenced, ReconcileError, Stalled, Transient
from reconciler.publish import status_branch
from reconciler.publish.lease import LeaseLost
from reconciler.publish.status_branch import StatusBranch
from tests.behaviour.publish_fixtures import git, lease

REF = "detoserve/status"
REVISION = "9f3c1ab" + "0" * 33


def documents(count: int, mark: str = "a") -> dict[str, bytes]:
    made = {f"status/deployment/d{n}.yaml": f"mark: {mark}\n".encode() for n in range(count)}
    return {**made, "status/summary.yaml": f"count: {count}\n".encode()}


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A config repo with a work tree, main checked out."""
    path = tmp_path / "config"
    path.mkdir()
    git(path, "init", "--quiet", "--initial-branch=main")
    (path / "a.yaml").write_text("a: 1\n")
    git(path, "add", ".")
    git(path, "commit", "--quiet", "-m", "Add a")
    return path


@pytest.fixture
def bare(repo: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.git"
    git(tmp_path, "clone", "--quiet", "--bare", str(repo), str(path))
    return path


def branch(
    tmp_path: Path, remote: Path | str, name: str = "mirror", **options: object
) -> StatusBranch:
    return StatusBranch(tmp_path / f"{name}.git", str(remote), REF, **options)  # type: ignore[arg-type]


async def write(
    status: StatusBranch, docs: dict[str, bytes], generation: int = 1, revision: str = REVISION
) -> str | None:
    return await status.write(docs, revision=revision, plan_digest="p1", lease=lease(generation))


def count(repo: Path) -> int:
    return int(git(repo, "rev-list", "--count", REF))


async def test_documents_stand_on_an_orphan_branch_with_their_story(
    repo: Path, tmp_path: Path
) -> None:
    status = branch(tmp_path, repo)
    assert await status.read() == {}
    main = git(repo, "rev-parse", "main")
    sha = await write(status, documents(2), generation=7)
    assert sha == git(repo, "rev-parse", REF)
    assert git(repo, "log", "-1", "--format=%an <%ae>|%cn|%P|%B", REF) == (
        "DetoServe reconciler <reconciler@detoserve.invalid>|DetoServe reconciler||"
        "status: 2 objects changed at main@9f3c1ab\n\n"
        f"Detoserve-Source-Revision: {REVISION}\nDetoserve-Plan-Digest: p1\nDetoserve-Lease: 7"
    )
    assert git(repo, "show", f"{REF}:status/deployment/d1.yaml") == "mark: a"
    assert await status.read() == documents(2)
    assert git(repo, "rev-parse", "main") == main
    assert git(repo, "status", "--porcelain") == ""


async def test_nothing_new_makes_no_commit(repo: Path, tmp_path: Path) -> None:
    status = branch(tmp_path, repo)
    assert await write(status, documents(3)) is not None
    assert await write(status, documents(3)) is None
    assert await write(branch(tmp_path, repo, "other"), documents(3), 2) is None
    assert count(repo) == 1


async def test_what_is_not_named_goes_and_what_others_keep_stays(
    repo: Path, tmp_path: Path
) -> None:
    status = branch(tmp_path, repo)
    await write(status, documents(3))
    seen = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--branch", REF, str(repo), str(seen))
    (seen / "README.md").write_text("by hand\n")
    (seen / "status" / "deployment" / "note.txt").write_text("by hand\n")
    (seen / "status" / "deployment" / "d0.yaml").write_text("edited: by hand\n")
    git(seen, "add", ".")
    git(seen, "commit", "--quiet", "-m", "Write by hand")
    git(seen, "push", "--quiet")

    assert await write(status, documents(2, "b")) is not None
    files = git(repo, "ls-tree", "-r", "--name-only", REF).split()
    assert files == [
        "README.md",
        "status/deployment/d0.yaml",
        "status/deployment/d1.yaml",
        "status/deployment/note.txt",
        "status/summary.yaml",
    ]
    assert git(repo, "show", f"{REF}:status/deployment/d0.yaml") == "mark: b"
    assert await status.read() == documents(2, "b")
    assert count(repo) == 3
    assert git(repo, "log", "-1", "--format=%s", REF) == (
        "status: 3 objects changed at main@9f3c1ab"
    )


async def test_a_deleted_branch_is_made_anew(repo: Path, tmp_path: Path) -> None:
    status = branch(tmp_path, repo)
    await write(status, documents(1))
    git(repo, "branch", "-D", REF)
    assert await write(status, documents(1, "b")) is not None
    assert count(repo) == 1
    git(repo, "branch", "-D", REF)
    assert await status.read() == {}


async def test_a_file_in_the_way_of_a_folder_gives_way(repo: Path, tmp_path: Path) -> None:
    tree = git(
        repo, "mktree", stdin="100644 blob " + git(repo, "rev-parse", "main:a.yaml") + "\tstatus\n"
    )
    git(repo, "update-ref", f"refs/heads/{REF}", git(repo, "commit-tree", tree, "-m", "odd"))
    status = branch(tmp_path, repo)
    await write(status, documents(1))
    assert await status.read() == documents(1)


async def test_an_older_lease_is_refused(repo: Path, tmp_path: Path) -> None:
    old, new = branch(tmp_path, repo, "old"), branch(tmp_path, repo, "new")
    await write(old, documents(1), generation=3)
    await write(new, documents(1, "new"), generation=4)
    with pytest.raises(Fenced, match="lease generation 4 came after ours, 3"):
        await write(old, documents(1, "old"), generation=3)
    assert old.newest_lease == 4
    # Also when somebody's commit without our trailers stands above the newer one's.
    tip = git(repo, "rev-parse", REF)
    above = git(repo, "commit-tree", f"{tip}^{{tree}}", "-p", tip, "-m", "By hand")
    git(repo, "update-ref", f"refs/heads/{REF}", above)
    with pytest.raises(Fenced):
        await write(branch(tmp_path, repo, "late"), documents(1, "late"), generation=3)
    assert git(repo, "rev-parse", REF) == above
    with pytest.raises(LeaseLost):
        await old.write(documents(1), revision=REVISION, plan_digest="", lease=lease(9, ttl_s=-1))


RACING_HOOK = """#!/bin/sh
# Somebody else is always faster: for each push of ours they make eight commits, up to `limit`.
unset GIT_QUARANTINE_PATH GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES
read old new ref
tip=$(git rev-parse -q --verify $ref) || exit 0
made=$(cat made)
[ $((made + 8)) -le "$(cat limit)" ] || exit 0
{
  for n in 1 2 3 4 5 6 7 8; do
    made=$((made + 1))
    echo "commit $ref"
    echo "committer Bot <b@x> 0 +0000"
    printf 'data <<.\nother %s\n.\n' $made
    [ $n -gt 1 ] || echo "from $tip"
    printf 'M 100644 inline other-%s\ndata <<.\nx\n.\n' $made
  done
} | git fast-import --quiet || exit 1
echo $((made + 8)) > made
"""


def racing(bare: Path, limit: int) -> None:
    """How many commits others have made, and may make, while we push."""
    hook = bare / "hooks" / "pre-receive"
    if not hook.exists():
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(RACING_HOOK)
        hook.chmod(0o755)
        (bare / "made").write_text("0")
    (bare / "limit").write_text(str(limit))


async def test_two_hundred_commits_of_others_while_we_write_are_all_kept(
    bare: Path, tmp_path: Path
) -> None:
    status = branch(tmp_path, bare, attempts=20, jitter=lambda: 0.0)
    await write(status, documents(1, "first"))
    for limit in (40, 80, 120, 160, 200):
        racing(bare, limit)
        assert await write(status, documents(1, str(limit))) is not None
    subjects = git(bare, "log", "--format=%s", "--first-parent", REF).splitlines()
    assert len(subjects) == count(bare) == 200 + 6
    assert {s for s in subjects if s.startswith("other ")} == {f"other {n + 1}" for n in range(200)}
    assert git(bare, "show", f"{REF}:status/deployment/d0.yaml") == "mark: 200"
    names = git(bare, "ls-tree", "--name-only", REF).split()
    assert sum(name.startswith("other-") for name in names) == 200


async def test_a_branch_that_never_stands_still_is_given_up(bare: Path, tmp_path: Path) -> None:
    status = branch(tmp_path, bare, attempts=3)
    await write(status, documents(1))
    racing(bare, 1000)
    with pytest.raises(Transient, match=r"no quiet moment .* in 3 attempts; last: \[re"):
        await write(status, documents(1, "b"))
    racing(bare, 0)
    assert await write(status, documents(1, "b")) is not None
    assert count(bare) == 1 + 3 * 8 + 1


async def test_two_writers_and_a_human_on_main_lose_nothing(bare: Path, tmp_path: Path) -> None:
    human = tmp_path / "human"
    git(tmp_path, "clone", "--quiet", str(bare), str(human))
    writers = [branch(tmp_path, bare, f"w{n}", attempts=50) for n in range(2)]

    async def bot(status: StatusBranch, name: str) -> list[str | None]:
        return [await write(status, documents(1, f"{name}{n}")) for n in range(8)]

    def push() -> None:
        for n in range(8):
            (human / "a.yaml").write_text(f"a: {n}\n")
            git(human, "commit", "--quiet", "-am", f"Edit {n}")
            git(human, "push", "--quiet", "origin", "main")

    a, b, _ = await asyncio.gather(
        bot(writers[0], "a"), bot(writers[1], "b"), asyncio.to_thread(push)
    )
    assert None not in [*a, *b]
    on_branch = set(git(bare, "rev-list", REF).split())
    assert on_branch == set(filter(None, [*a, *b]))
    assert int(git(bare, "rev-list", "--count", "main")) == 9


async def test_a_hook_that_says_no_is_for_a_human(bare: Path, tmp_path: Path) -> None:
    hook = bare / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho 'only Ada may push here' >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(Stalled, match=r"pre-receive hook declined.*only Ada may push here"):
        await write(branch(tmp_path, bare), documents(1))


async def test_a_hook_of_the_mirror_or_the_user_never_runs(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = branch(tmp_path, repo)
    await status.read()
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "pre-push").write_text("#!/bin/sh\nexit 1\n")
    (hooks / "pre-push").chmod(0o755)
    (tmp_path / "gitconfig").write_text(
        f"[core]\n\thooksPath = {hooks}\n[commit]\n\tgpgSign = true\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    assert await write(status, documents(1)) is not None


async def test_a_hanging_remote_is_bounded(bare: Path, tmp_path: Path) -> None:
    status = branch(tmp_path, bare, timeout_s=0.5)
    await write(status, documents(1))
    hook = bare / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexec sleep 30\n")
    hook.chmod(0o755)
    async with asyncio.timeout(5):
        with pytest.raises(Transient, match=r"no end after 0\.5 s"):
            await write(status, documents(1, "b"))
    hook.unlink()
    assert await write(status, documents(1, "b")) is not None


async def test_an_unreachable_remote_is_transient_and_recovers(bare: Path, tmp_path: Path) -> None:
    status = branch(tmp_path, bare)
    await write(status, documents(1))
    away = bare.rename(tmp_path / "away")
    for attempt in (write(status, documents(1, "b")), status.read()):
        with pytest.raises(Transient, match="status on detoserve/status of"):
            await attempt
    away.rename(bare)
    assert await write(status, documents(1, "b")) is not None


async def test_a_mirror_that_was_removed_is_made_again(bare: Path, tmp_path: Path) -> None:
    status = branch(tmp_path, bare)
    await write(status, documents(1))
    shutil.rmtree(tmp_path / "mirror.git")
    with pytest.raises(Transient):
        await write(status, documents(1, "b"))
    assert await write(status, documents(1, "b")) is not None
    assert count(bare) == 2


async def test_no_credential_reaches_a_message(tmp_path: Path) -> None:
    canary = "canary-77aa"
    for remote in (
        f"https://user:{canary}@127.0.0.1:1/x.git",
        f"https://127.0.0.1:1/x.git?access_token={canary}",
        f"ssh://git:{canary}@127.0.0.1:1/x.git",
    ):
        status = branch(tmp_path, remote, timeout_s=5)
        for attempt in (status.read(), write(status, documents(1))):
            with pytest.raises(ReconcileError) as error:
                await attempt
            shown: BaseException | None = error.value
            while shown is not None:
                assert canary not in f"{shown!r} {shown} {shown.args}"
                shown = shown.__context__


async def test_commits_can_be_signed(repo: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    public = key.with_suffix(".pub").read_text()
    (tmp_path / "allowed").write_text(f"reconciler@detoserve.invalid {public}")
    await write(branch(tmp_path, repo, signing_key=key), documents(1))
    git(repo, "-c", f"gpg.ssh.allowedSignersFile={tmp_path}/allowed", "verify-commit", REF)


async def test_a_repo_with_sha256_names_works(tmp_path: Path) -> None:
    for name in ("config", "mirror"):
        git(tmp_path, "init", "--quiet", "--bare", "--object-format=sha256", f"{name}.git")
    status = branch(tmp_path, tmp_path / "config.git")
    assert len(await write(status, documents(2)) or "") == 64
    assert await write(status, documents(2)) is None
    assert await status.read() == documents(2)


def test_settings_that_cannot_work_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(Stalled, match="that is where the config is"):
        StatusBranch(tmp_path, "/x", "main")
    with pytest.raises(Stalled, match="Name <address>"):
        StatusBranch(tmp_path, "/x", author="me")
    with pytest.raises(Stalled, match="use https://"):
        StatusBranch(tmp_path, "ext::sh -c true")


async def test_a_branch_that_cannot_exist_is_for_a_human(repo: Path, tmp_path: Path) -> None:
    with pytest.raises(Stalled, match="no name that Git allows"):
        await write(StatusBranch(tmp_path / "m.git", str(repo), "a..b"), documents(1))
    git(repo, "branch", "detoserve")
    with pytest.raises(Stalled, match="'refs/heads/detoserve' exists"):
        await write(branch(tmp_path, repo), documents(1))


async def test_upkeep_of_the_mirror_loses_nothing(
    repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(status_branch, "_MAINTAIN_EVERY_COMMITS", 2)
    monkeypatch.setattr(status_branch, "_LOOSE_OBJECTS_MAX", 1)
    status = branch(tmp_path, repo)
    for n in range(5):
        # So many small objects that git's estimate finds some.
        different = {path: f"{n} {path}".encode() for path in documents(90)}
        assert await write(status, different) is not None
    assert caplog.text == ""
    assert "in-pack: 0" not in git(tmp_path / "mirror.git", "count-objects", "-v")
    git(tmp_path / "mirror.git", "fsck")
    assert await write(status, different) is None
    assert await status.read() == different
    assert count(repo) == 5
