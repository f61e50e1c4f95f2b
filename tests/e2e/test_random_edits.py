"""200 commits of random edits, many of them broken: what is in effect is always the last valid one."""

from __future__ import annotations

import random
import shutil
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from reconciler.core.compile import compile_workloads
from reconciler.core.config import ConfigObject, ObjectKey
from reconciler.core.last_good import Effective
from reconciler.publish.valkey import EmbeddedValkey
from reconciler.sources.loader import Loader
from tests.behaviour.loop_fixtures import Bench, running_bench
from tests.config_text import HEAD, cluster, deployment, tenant
from tests.e2e.reconcile_process import PLATFORM, Site
from tests.memory_source import MemorySource

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

COMMITS = 200

Content = str | bytes | None
Breakage = Callable[[str], str | bytes]

BREAKAGES: dict[str, Breakage] = {
    "duplicate key": lambda text: text + "kind: Function\n",
    "alias bomb": lambda text: (
        text + "x:\n  a: &a [1,1,1,1,1,1,1,1,1]\n  b: &b [*a,*a,*a,*a,*a]\n  c: [*b,*b,*b,*b,*b]\n"
    ),
    "bad UTF-8": lambda text: text.encode() + b"# \xff\xfe\n",
    "NUL": lambda text: text.encode() + b"# \x00\n",
    "deep nesting": lambda text: text + "x: " + "[" * 500 + "]" * 500 + "\n",
    "tab": lambda text: text + "\tx: 1\n",
    "unknown field": lambda text: text + "colour: blue\n",
    "unknown kind": lambda text: text.replace("kind: ", "kind: Space"),
    "wrong type": lambda text: text.replace("spec:\n", "spec: 7\nwas:\n"),
    "no apiVersion": lambda text: text.partition("\n")[2],
    "merge conflict": lambda text: f"<<<<<<< ours\n{text}=======\n{text}>>>>>>> theirs\n",
    "cut off": lambda text: text[: text.index("spec:")] + "spec: {model: {uri: 's",
    "too large": lambda text: text + "# " + "x" * 2_000_000 + "\n",
    "a tag": lambda text: text + "x: !!python/object/apply:os.system ['true']\n",
}


def function(name: str, rng: random.Random) -> str:
    return (
        HEAD.format(kind="Function", name=name)
        + f'  model: {{uri: "sim://{name}"}}\n'
        + f'  runtime: {{engine: simulated, args: ["--itl-s=0.0{rng.randint(1, 9)}"]}}\n'
        + f"  scaling: {{minReplicas: {rng.randint(0, 2)}}}\n"
        + "  readiness: {initialDelay: 30s, timeout: 2s, interval: 200ms}\n"
    )


@dataclass
class Edits:
    """`valid` is what should be in effect; `broken` lies over it in the repo."""

    rng: random.Random
    valid: dict[str, str] = field(default_factory=dict)
    broken: dict[str, Content] = field(default_factory=dict)
    count: int = 0

    def start(self) -> None:
        self.valid = {
            "platform.yaml": PLATFORM,
            "local.yaml": cluster("local"),
            "acme.yaml": tenant("acme"),
        }
        for name in ("f1", "f2"):
            self.valid[f"functions/{name}.yaml"] = function(name, self.rng)
            self.valid[f"deployments/{name}.yaml"] = deployment(name, function=name)

    def paths(self, folder: str) -> list[str]:
        return sorted(p for p in self.valid if p.startswith(folder))

    def named(self, path: str) -> str:
        """The function that a deployment's file names."""
        return self.valid[path].partition("function: ")[2].partition("\n")[0]

    def step(self) -> None:
        """One random edit, valid or not."""
        self.count += 1
        rng = self.rng
        edits = [self.add, self.remove, self.resize, self.rename, self.retarget, self.mend]
        edits += [self.break_file] * 5 + [self.unknown_reference, self.remove_what_is_used]
        rng.choice([*edits, self.double])()

    def set(self, path: str, text: str) -> None:
        self.valid[path] = text
        self.broken.pop(path, None)

    def add(self) -> None:
        if len(self.paths("deployments/")) < 5:
            name = f"n{self.count}"
            self.set(f"functions/{name}.yaml", function(name, self.rng))
            self.set(f"deployments/{name}.yaml", deployment(name, function=name))

    def remove(self) -> None:
        if len(self.paths("deployments/")) > 2:
            path = self.rng.choice(self.paths("deployments/"))
            self.mend()  # or what was kept only for this deployment would go with it
            del self.valid[path]

    def resize(self) -> None:
        path = self.rng.choice(self.paths("functions/"))
        name = path.split("/")[1].removesuffix(".yaml").split("-moved")[0]
        self.set(path, function(name, self.rng))

    def rename(self) -> None:
        """The same object in another file."""
        path = self.rng.choice(self.paths("functions/"))
        self.mend()
        stem = path.removesuffix(".yaml").split("-moved")[0]
        self.set(f"{stem}-moved{self.count}.yaml", self.valid.pop(path))

    def retarget(self) -> None:
        path = self.rng.choice(self.paths("deployments/"))
        target = self.rng.choice(self.paths("functions/")).split("/")[1]
        self.mend()
        name = path.split("/")[1].removesuffix(".yaml")
        self.set(path, deployment(name, function=target.removesuffix(".yaml").split("-moved")[0]))

    def mend(self) -> None:
        self.broken.clear()

    def break_file(self) -> None:
        path = self.rng.choice(sorted(self.valid))
        self.broken[path] = self.rng.choice(sorted(BREAKAGES.items()))[1](self.valid[path])

    def unknown_reference(self) -> None:
        path = self.rng.choice(self.paths("deployments/"))
        self.broken[path] = self.valid[path].replace("function: ", "function: no-such-")

    def remove_what_is_used(self) -> None:
        used = {self.named(path) for path in self.paths("deployments/")}
        path = self.rng.choice(
            [p for p in self.paths("functions/") if p[10:-5].split("-moved")[0] in used]
        )
        self.broken[self.rng.choice([path, "local.yaml"])] = None

    def double(self) -> None:
        """Another file that defines an object which is there already, differently."""
        path = self.rng.choice(self.paths("functions/"))
        text = self.valid[path].replace("simulated", "vllm")
        self.broken[f"double{self.count}.yaml"] = text

    def files(self) -> dict[str, str | bytes]:
        merged: dict[str, Content] = {**self.valid, **self.broken}
        return {path: text for path, text in merged.items() if text is not None}

    def objects(self) -> dict[ObjectKey, ConfigObject]:
        """What should be in effect, as a loader that has seen nothing else reads it."""
        source = MemorySource(self.valid)
        loaded = Loader().load(source.fetch(), source)
        assert not loaded.problems
        return dict(loaded.objects)


def commit(bench: Bench, edits: Edits) -> None:
    files = edits.files()
    gone = [p for p in bench.repo.git("ls-files").splitlines() if p not in files]
    bench.repo.commit({**files, **dict.fromkeys(gone)}, f"Edit {edits.count}")


async def test_random_edits_end_in_the_last_valid_state(tmp_path: Path) -> None:
    rng = random.Random(41)
    edits = Edits(rng)
    edits.start()
    async with running_bench(tmp_path) as bench:
        commit(bench, edits)
        await bench.settle()
        broken = 0
        for _ in range(COMMITS):
            edits.step()
            commit(bench, edits)
            if rng.random() < 0.03:
                bench.start()
            await bench.passes(1)
            broken += bool(edits.broken)
            wanted = edits.objects()
            effective = bench.world.effective
            assert {k: o.digest for k, o in effective.objects.items()} == {
                k: o.digest for k, o in wanted.items()
            }, f"after edit {edits.count}: {sorted(edits.broken)} {effective.problems}"
            assert bool(effective.problems) == bool(edits.broken)
        assert COMMITS / 4 < broken < COMMITS, "some of both"
        edits.break_file()
        commit(bench, edits)
        await bench.settle()
        desired = compile_workloads(Effective("", "", edits.objects(), (), frozenset()))
        replicas = {name: w.replicas for name, w in desired.workloads.items()}
        assert await bench.running() == replicas
        routed = {f"{name}--local": len(ids) for name, ids in (await bench.routed()).items()}
        assert routed == replicas
        status = await bench.write_status()
        for key in edits.objects():
            assert f"status/{key.kind.lower()}/{key.name}.yaml" in status

        # The same repo and memory under the real command, with real engines.
        async with real_site(tmp_path / "real", bench) as site:
            site.start()
            wanted_replicas = {name.removesuffix("--local"): n for name, n in replicas.items()}
            await site.agreed(wanted_replicas)


@asynccontextmanager
async def real_site(folder: Path, bench: Bench) -> AsyncIterator[Site]:
    (folder / "state").mkdir(parents=True)
    shutil.copy(bench.state_file.path, folder / "state")
    async with EmbeddedValkey(folder / "valkey") as valkey:
        owner = f"edits-{uuid.uuid4().hex[:8]}"
        site = Site(folder, valkey.url, owner=owner, repo=bench.repo)
        try:
            yield site
        finally:
            await site.close()
