"""Compiles the router's hot modules with mypyc: the same source, in less than half the time.

    python deploy/compile_router.py            beside the sources, for tests and benchmarks here
    python deploy/compile_router.py --remove   takes that away again

As a build hook it does so for every wheel, and so for whoever installs from a checkout; it takes some
forty seconds and a C compiler. Where there is none, or with DETOSERVE_COMPILE=0, the wheel has the
sources alone, which do the same; with DETOSERVE_COMPILE=1 it is an error instead. An editable
install stays as it is written. Not here: which rules the modules keep to be compiled (ARCHITECTURE.md).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    BuildHookInterface = object  # type: ignore[assignment,misc]

ROOT: Final = Path(__file__).resolve().parents[1]
GROUP: Final = "detoserve_router"
"""The library that all modules share is `detoserve_router__mypyc`."""
HOT: Final = ("router/core", "router/exchange", "router/downstream", "router/upstream")
HOT_FILES: Final = (
    "conversation", "deadlines", "decisions", "finished", "in_flight", "proxy", "records", "relay", "server",
    "state", "fleet/brain", "fleet/sharing", "fleet/signals", "limits/limiter", "limits/queue",
    "telemetry/request_counts", "usage/journal", "usage/meter", "usage/slots",
)  # fmt: skip
INTERPRETED: Final = frozenset(
    {
        # msgspec reads the annotations of what it decodes while the program runs.
        "router/core/shapes.py",
        # Exceptions of kinds that mypyc cannot make.
        "router/upstream/failures.py",
        # Seldom used, or by people.
        "router/core/agent_auth.py",
        "router/core/errors.py",
        "router/core/inflate.py",
        "router/core/record.py",
        "router/core/replay.py",
        "router/core/rescore.py",
    }
)
_MYPY: Final = """\
[mypy]
ignore_missing_imports = True
follow_imports = silent
disable_error_code = no-any-return, misc, import-untyped, untyped-decorator
"""


def modules() -> list[str]:
    """Paths of what is compiled, from the checkout's root."""
    found = [f"router/{name}.py" for name in HOT_FILES]
    for folder in HOT:
        found += [str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.py")]
    return sorted(f for f in found if f not in INTERPRETED and not f.endswith("__init__.py"))


def build(into: Path) -> None:
    """Compiles and links into this folder. In a process of its own: mypyc ends it when something is wrong."""
    from mypyc.build import mypycify  # noqa: PLC0415 - only where something is built
    from pybind11.setup_helpers import ParallelCompile  # noqa: PLC0415
    from setuptools import Distribution  # noqa: PLC0415
    from setuptools.command.build_ext import build_ext  # noqa: PLC0415

    os.chdir(ROOT)
    ParallelCompile().install()
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch, "mypy.ini")
        config.write_text(_MYPY, encoding="utf-8")
        extensions = mypycify(
            ["--config-file", str(config), "--cache-dir", f"{scratch}/cache", *modules()],
            opt_level="1",  # 2 and 3 take longer, and run no faster
            debug_level="0",
            multi_file=True,  # one file each, so that all cores can compile
            group_name=GROUP,
            target_dir=scratch,
        )
        command = build_ext(Distribution({"name": GROUP, "ext_modules": extensions}))
        command.build_lib, command.build_temp = str(into), scratch
        command.ensure_finalized()
        command.run()


def run_build(into: Path) -> str:
    """What went wrong; empty: nothing did."""
    ran = subprocess.run(
        [sys.executable, __file__, "--build", str(into)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return ran.stdout[-3000:] if ran.returncode else ""


def remove() -> None:
    """Takes away what was compiled beside the sources."""
    for path in (*ROOT.glob("router/**/*.so"), *ROOT.glob(f"{GROUP}__mypyc.*.so")):
        path.unlink()


class CompileHook(BuildHookInterface):  # type: ignore[type-arg]
    """hatchling's: adds compiled modules to a wheel, beside their sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is written.

        Raises:
            RuntimeError: it must be compiled, and cannot be.
        """
        wanted = os.environ.get("DETOSERVE_COMPILE", "")
        if version == "editable" or wanted == "0":
            return
        self._folder = tempfile.TemporaryDirectory()
        into = Path(self._folder.name)
        wrong = run_build(into)
        if wrong:
            if wanted:
                raise RuntimeError(f"the router could not be compiled:\n{wrong}")
            self.app.display_warning(f"the router is not compiled, and slower:\n{wrong}")
            return
        for path in into.rglob("*.so"):
            build_data["force_include"][str(path)] = str(path.relative_to(into))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when it is written."""
        del version, build_data, artifact_path
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--remove", action="store_true", help="what was compiled beside the sources"
    )
    parser.add_argument(
        "--build", type=Path, metavar="FOLDER", help="into a folder, saying how it goes"
    )
    chosen = parser.parse_args()
    if chosen.build is not None:
        build(chosen.build)
        return
    remove()
    if chosen.remove:
        return
    began = time.monotonic()
    wrong = run_build(ROOT)
    if wrong:
        print(wrong, file=sys.stderr)
        raise SystemExit(1)
    print(f"compiled {len(modules())} modules in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
