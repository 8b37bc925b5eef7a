"""Write checkpoints and adapters to merge in the shapes of real models, as Hugging Face stores them.

Their weights are random; of checkpoints that are only planned, which may be of any size, the headers alone exist.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.shapes import Shapes, llama
from isomerge_fast.checkpoint.io.writer import OutputTensor, file_layout

SHARD_BYTES = 2 << 30
POOL_ELEMENTS = 1 << 25
SMALL = llama(768, 3072, 12, 32_000)  # 162 M parameters


def shards_of(shapes: Shapes, shard_bytes: int) -> dict[str, list[str]]:
    """Return the names of bf16 tensors by the file that holds them; a file holds ``shard_bytes`` or one tensor."""
    shards: list[list[str]] = [[]]
    spent = 0  # on the last shard
    for name, shape in shapes.items():
        if shards[-1] and spent + 2 * prod(shape) > shard_bytes:
            shards.append([])
            spent = 0
        shards[-1].append(name)
        spent += 2 * prod(shape)
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": names for number, names in enumerate(shards, 1)}


def write_index(folder: Path, shards: Mapping[str, list[str]]) -> None:
    """Write the index that says which file holds which tensor."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_headers(folder: Path, shapes: Shapes, shard_bytes: int = 5 << 30) -> Path:
    """Write a sharded bf16 checkpoint of sparse files, which has everything but the data."""
    folder.mkdir()
    shards = shards_of(shapes, shard_bytes)
    for file, names in shards.items():
        tensors = [OutputTensor(name, torch.bfloat16, shapes[name]) for name in names]
        prefix, _, size = file_layout(folder / file, tensors)
        with open(folder / file, "wb") as opened:
            opened.write(prefix)
            opened.truncate(size)
    write_index(folder, shards)
    return folder


def make_checkpoint(folder: Path, shapes: Shapes, seed: int) -> Path:
    """Write bf16 weights in shards of 2 GB, unless they are there: random numbers shared by all seeds, and a tenth of
    the seed's own.
    """
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    drawn = min(POOL_ELEMENTS, sum(map(prod, shapes.values())))
    shared, own = (torch.randn(drawn, generator=torch.Generator().manual_seed(number)) for number in (0, 1 + seed))
    pool = (0.02 * (shared + 0.1 * own)).bfloat16()
    shards, turn = shards_of(shapes, SHARD_BYTES), 0
    for file, names in shards.items():
        tensors = {}
        for name in names:
            turn += 7919
            start, count = -turn % drawn, prod(shapes[name])
            rest = [pool] * ((start + count) // drawn)  # which begins anew at its end
            tensors[name] = torch.cat([pool[start : start + count], *rest])[:count].reshape(shapes[name])
        save_file(tensors, folder / file, metadata={"format": "pt"})
    vocabulary, width = shapes["model.embed_tokens.weight"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": next((shape[0] for name, shape in shapes.items() if "gate_proj" in name), 4 * width),
        "num_attention_heads": width // 64,
        "num_key_value_heads": next((shape[0] for name, shape in shapes.items() if "k_proj" in name), width) // 64,
        "num_hidden_layers": sum("q_proj" in name for name in shapes),
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_index(folder, shards)
    return folder


def make_adapter(folder: Path, base: Path, shapes: Shapes, rank: int, seed: int) -> Path:
    """Write a LoRA adapter of all projections in float32, as PEFT saves it: A as it starts, B as if trained."""
    if (folder / "adapter_model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if "_proj" in name:
            place = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
            tensors[f"{place}.lora_B.weight"] = 0.02 * torch.randn(shape[0], rank, generator=generator)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.split(".")[-2] for name in shapes if "_proj" in name}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def family(root: Path, name: str, shapes: Shapes, tasks: int) -> list[Path]:
    """Return the folders of a base and its experts, which are made where they are missing."""
    return [make_checkpoint(root / name / str(seed), shapes, seed) for seed in range(tasks + 1)]


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
