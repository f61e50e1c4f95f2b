"""The config repo goes away, hangs, loses its branch or its history: what runs stays, and it is said."""

from __future__ import annotations

import base64
import functools
import http.server
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from reconciler.publish.valkey import EmbeddedValkey
from tests.e2e.reconcile_process import Site, engine_function, quick_deployment
from tests.git_repo import GitRepo
from tests.support import eventually, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with EmbeddedValkey(tmp_path / "valkey") as valkey:
        made = Site(tmp_path, valkey.url, owner=f"remotes-{uuid.uuid4().hex[:8]}")
        made.first_commit()
        try:
            yield made
        finally:
            await made.close()


async def test_a_remote_that_vanishes_and_comes_back(site: Site) -> None:
    site.start()
    await site.converged({"chat": 1})
    before = site.engines()
    away = site.repo.path.rename(site.folder / "away")
    await eventually(lambda: "config repo: " in site.log(), timeout_s=20)
    assert site.engines() == before
    away.rename(site.repo.path)
    site.repo.commit({"functions/chat.yaml": engine_function(site.script, replicas=2)})
    await site.converged({"chat": 2})
    assert site.log().count("config repo: ") < 10, "said once, not at every look"


async def test_a_deleted_branch_deletes_nothing(site: Site) -> None:
    site.start()
    await site.converged({"chat": 1})
    before = site.engines()
    site.repo.git("checkout", "--quiet", "-b", "elsewhere")
    site.repo.git("branch", "-D", "main")
    await eventually(lambda: "has no branch 'main'" in site.log(), timeout_s=20)
    await eventually(lambda: "no branch" in site.summary()["source"], timeout_s=20)
    assert site.engines() == before
    site.repo.git("checkout", "--quiet", "-b", "main")
    site.repo.commit({"deployments/more.yaml": quick_deployment("more")})
    await site.converged({"chat": 1, "more": 1})
    assert "source" not in site.summary()


async def test_a_forced_push_prunes_nothing_until_it_is_accepted(site: Site) -> None:
    site.start()
    await site.converged({"chat": 1})
    old = site.repo.head
    site.repo.git("checkout", "--quiet", "--orphan", "fresh")
    site.repo.commit(
        {"deployments/chat.yaml": None, "deployments/more.yaml": quick_deployment("more")}
    )
    site.repo.git("branch", "-M", "fresh", "main")

    async def both() -> bool:
        return {name: len(ids) for name, ids in (await site.routed()).items()} == {
            "chat": 1,
            "more": 1,
        }

    await eventually(both, timeout_s=20)
    await eventually(lambda: old in site.summary()["source"], timeout_s=20)
    assert "history was rewritten" in site.log()
    assert any("history was rewritten" in refusal for refusal in site.summary()["refused"])
    site.repo.commit(message=f"Go on\n\nDetoserve-Accept-History: {old}")
    await site.converged({"more": 1})
    assert "source" not in site.summary()


async def test_an_empty_repo_is_waited_for(site: Site) -> None:
    empty = GitRepo(site.folder / "empty")
    process = site.start(repo=str(empty.path))
    await eventually(lambda: "has no commit yet" in site.log(), timeout_s=20)
    empty.commit(
        {
            name: (site.repo.path / name).read_text()
            for name in site.repo.git("ls-files").splitlines()
        }
    )
    site.repo = empty
    await site.converged({"chat": 1})
    assert process.poll() is None


@contextmanager
def git_daemon(base: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    daemon = subprocess.Popen(
        [
            *("git", "daemon", "--reuseaddr", "--listen=127.0.0.1", f"--port={port}"),
            *(f"--base-path={base}", "--export-all", "--enable=receive-pack", str(base)),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        yield daemon, f"git://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            daemon.send_signal(signal.SIGCONT)
        daemon.kill()
        daemon.wait()


async def test_a_remote_that_hangs_holds_up_nothing_else(site: Site) -> None:
    with git_daemon(site.folder) as (daemon, url):
        process = site.start(repo=f"{url}/repo")
        await site.converged({"chat": 1})
        daemon.send_signal(signal.SIGSTOP)

        def fetching() -> bool:
            return any(
                "fetch" in p.cmdline() for p in psutil.Process(process.pid).children(recursive=True)
            )

        await eventually(fetching, timeout_s=20)
        ((replica, pid),) = site.engines().items()
        os.kill(pid, signal.SIGKILL)

        async def routed_again() -> bool:
            routed = (await site.routed())["chat"]
            return replica not in routed and routed == site.engines().keys() and len(routed) == 1

        await eventually(routed_again, timeout_s=20)
        daemon.send_signal(signal.SIGCONT)
        site.repo.commit({"functions/chat.yaml": engine_function(site.script, replicas=2)})
        await site.converged({"chat": 2})


async def test_sigterm_does_not_wait_for_a_remote_that_hangs(site: Site) -> None:
    with git_daemon(site.folder) as (daemon, url):
        process = site.start(repo=f"{url}/repo")
        await site.converged({"chat": 1})
        daemon.send_signal(signal.SIGSTOP)
        await eventually(
            lambda: any(
                "fetch" in p.cmdline() for p in psutil.Process(process.pid).children(recursive=True)
            ),
            timeout_s=20,
        )
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(40) == 0
        assert time.monotonic() - started < 20
        assert len(site.engines()) == 1


class _Private(http.server.SimpleHTTPRequestHandler):
    """A Git repo as plain files, for whoever has the password; pushing is not possible."""

    password = ""
    answered = 0

    def do_GET(self) -> None:
        expected = "Basic " + base64.b64encode(f"bot:{self.password}".encode()).decode()
        if self.headers.get("Authorization") != expected:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        type(self).answered += 1
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


async def test_a_credential_in_the_remote_is_never_repeated(site: Site) -> None:
    canary = f"canary{uuid.uuid4().hex}"
    handler = type("Handler", (_Private,), {"password": canary})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(site.folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    seen: set[str] = set()
    try:
        site.repo.git("update-server-info")
        url = f"http://bot:{canary}@127.0.0.1:{server.server_port}/repo/.git"
        process = site.start("state", "--verbose", repo=url)

        async def routed() -> bool:
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    # A child that has not become git yet still shows what the user typed.
                    if "reconcile" not in (argv := child.cmdline()):
                        seen.add(" ".join(argv))
            return len((await site.routed())["chat"]) == 1

        await eventually(routed, timeout_s=30)
        assert handler.answered > 0  # type: ignore[attr-defined]
        # Plain files take no push: the failure names the remote, without the password.
        await eventually(lambda: "status not written" in site.log(), timeout_s=30)
        server.shutdown()
        server.server_close()
        await eventually(lambda: "config repo: " in site.log(), timeout_s=30)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    needle = canary.encode()
    assert canary not in site.log()
    assert needle not in await everything_in_redis(site)
    for file in (site.folder / "state").rglob("*"):
        if file.is_file():
            assert needle not in file.read_bytes(), file
    assert any("fetch" in argv for argv in seen)
    assert not [argv for argv in seen if canary in argv]


async def everything_in_redis(site: Site) -> bytes:
    found = []
    async for key in site.redis.scan_iter():
        found += [key, await site.redis.dump(key) or b""]
    return b"\n".join(found)
