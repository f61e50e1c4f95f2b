"""What reading a config repo costs, and how soon a commit is noticed: `python tests/bench/bench_sources.py`.

Times are wall and CPU seconds of this process and of the git processes it started.
"""

from __future__ import annotations

import asyncio
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from reconciler.core.references import check_references
from reconciler.sources.git_source import GitSource
from reconciler.sources.loader import Loader
from reconciler.sources.watch import watch_refs
from tests.config_text import cluster, deployment, function, tenant
from tests.git_repo import GitRepo

COMMITS = 50


def cpu_s() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def row(name: str, n: int, work: Callable[[], Any]) -> Any:
    wall, cpu = time.perf_counter(), cpu_s()
    result = work()
    wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
    print(f"{name:34}{n:>8}{wall:>10.3f}{cpu:>10.3f}", flush=True)
    return result


def bench(folder: Path, n: int) -> None:
    repo = GitRepo(folder / f"repo{n}")
    files = {f"deployments/{i % 100}/{i}.yaml": deployment(f"d{i}") for i in range(n)}
    repo.commit({"f.yaml": function(), "c.yaml": cluster(), "t.yaml": tenant(), **files})
    source, loader = GitSource(str(repo.path), folder / f"mirror{n}"), Loader()

    def read() -> Any:
        return loader.load(source.fetch(), source)

    snapshot = row("fetch, first", n, source.fetch)
    loaded = row("load, first", n, lambda: loader.load(snapshot, source))
    assert len(loaded.objects) == n + 3
    row("references", n, lambda: check_references(loaded.objects))
    row("fetch and load, nothing new", n, read)
    repo.commit({"deployments/0/0.yaml": deployment("d0", more="  weight: 3\n")})
    row("fetch and load, one file changed", n, read)


async def latency(folder: Path) -> None:
    repo = GitRepo(folder / "latency")
    repo.commit({"f.yaml": function(), "d.yaml": deployment()})
    source, loader = GitSource(str(repo.path), folder / "latency.git"), Loader()
    noticed = asyncio.Event()
    task = asyncio.create_task(watch_refs(str(repo.path), "main", noticed.set))
    await asyncio.sleep(3)
    notice_s, loaded_s = [], []
    ref = repo.path / ".git" / "refs" / "heads" / "main"
    for n in range(COMMITS):
        noticed.clear()
        text = deployment(more=f"  weight: {n}\n")
        await asyncio.to_thread(repo.commit, {"d.yaml": text})
        await noticed.wait()
        # The ref's own time, as the commit process ends later than it moves the branch.
        notice_s.append(time.time() - ref.stat().st_mtime)
        snapshot = await asyncio.to_thread(source.fetch)
        await asyncio.to_thread(loader.load, snapshot, source)
        loaded_s.append(time.time() - ref.stat().st_mtime)
    task.cancel()
    for name, values in (("commit to notice", notice_s), ("commit to loaded", loaded_s)):
        p99 = statistics.quantiles(values, n=100)[98]
        print(f"{name:34}median {statistics.median(values) * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(f"{'':34}{'files':>8}{'wall s':>10}{'cpu s':>10}")
        for size in (10, 1_000, 10_000):
            bench(Path(name), size)
        asyncio.run(latency(Path(name)))
