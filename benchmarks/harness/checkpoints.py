"""Checkpoints to merge: random weights in the shapes of real models, as Hugging Face stores them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD_BYTES = 2 << 30
POOL_ELEMENTS = 1 << 25


def llama_shapes(
    width: int, inner: int, layers: int, vocabulary: int, *, kv: int | None = None, tied: bool = False
) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama as Hugging Face stores them; ``kv`` rows of keys and of values, ``width`` where left out."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (kv or width, width) for name in "kv"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    head = {} if tied else {"lm_head.weight": (vocabulary, width)}
    return shapes | {"model.norm.weight": (width,)} | head


SMALL = llama_shapes(768, 3072, 12, 32_000)  # 162 M parameters


def make_checkpoint(folder: Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> Path:
    """bf16 weights in shards of 2 GB: random numbers that all seeds share, and a tenth of others."""
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    drawn = min(POOL_ELEMENTS, sum(map(prod, shapes.values())))
    shared, own = (torch.randn(drawn, generator=torch.Generator().manual_seed(number)) for number in (0, 1 + seed))
    pool = (0.02 * (shared + 0.1 * own)).bfloat16()
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled + 2 * prod(shape) > SHARD_BYTES and filled:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * prod(shape)
    weight_map, turn = {}, 0
    for number, names in enumerate(shards, 1):
        file, tensors = f"model-{number:05}-of-{len(shards):05}.safetensors", {}
        for name in names:
            turn += 7919
            tensors[name] = around(pool, -turn, prod(shapes[name])).reshape(shapes[name])
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    width, vocabulary = shapes["model.embed_tokens.weight"][1], shapes["model.embed_tokens.weight"][0]
    inner = next((shape[0] for name, shape in shapes.items() if "gate_proj" in name), 4 * width)
    keys = next((shape[0] for name, shape in shapes.items() if "k_proj" in name), width)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": width // 64,
        "num_key_value_heads": keys // 64,
        "num_hidden_layers": sum("q_proj" in name for name in shapes),
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    index_file.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def make_adapter(folder: Path, base: Path, shapes: Mapping[str, tuple[int, ...]], rank: int, seed: int) -> Path:
    """A LoRA adapter of all projections in float32, as PEFT saves it; A as it starts, B as after some training."""
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


def around(pool: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """``count`` numbers of ``pool`` from ``start`` on, which goes on from its beginning where it ends."""
    parts, start = [], start % len(pool)
    while count > 0:
        parts.append(pool[start : start + count])
        count -= len(parts[-1])
        start = 0
    return torch.cat(parts)


def family(root: Path, name: str, shapes: Mapping[str, tuple[int, ...]], tasks: int) -> list[Path]:
    """The base and its experts."""
    return [make_checkpoint(root / name / str(seed), shapes, seed) for seed in range(tasks + 1)]


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
