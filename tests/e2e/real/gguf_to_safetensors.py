"""Lays a GGUF file out as vLLM loads models: config, tokenizer, bfloat16 safetensors.

Runs with vLLM's Python, not with ours: `gguf_to_safetensors.py WEIGHTS.gguf FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(weights: Path, folder: Path) -> None:
    where, name = str(weights.parent), weights.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.bfloat16)
    tied = model.config.tie_word_embeddings
    tensors = {
        key: tensor.detach().to(torch.bfloat16).contiguous()
        for key, tensor in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # the weights are not quantized any more
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, default=str))
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # engines may run as another user


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
