"""Checkpoints of which only the headers exist: models of any size, planned without a weight on the disk.

The shapes are those of published models, from the numbers in their configs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isomerge_fast.checkpoint.io.writer import OutputTensor, file_layout
from isomerge_fast.config import MergeConfig

Shapes = dict[str, tuple[int, ...]]


def llama(layers: int, width: int, inner: int, kv_width: int, vocabulary: int = 128_256) -> Shapes:
    """Tensors of Llama 3 as Hugging Face stores them."""
    shapes = _ends(width, vocabulary)
    for layer in range(layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        shapes |= {f"{attention}{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{attention}{name}_proj.weight": (kv_width, width) for name in "kv"}
        shapes |= _mlp(mlp, width, inner)
        shapes |= _norms(layer, width)
    return shapes


def qwen3_moe(layers: int = 48, experts: int = 128) -> Shapes:
    """Tensors of Qwen3-30B-A3B."""
    width, inner, heads, kv_heads, head = 2048, 768, 32, 4, 128
    shapes = _ends(width, 151_936)
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp."
        shapes |= _grouped_attention(layer, width, heads, kv_heads, head)
        shapes[f"{mlp}gate.weight"] = (experts, width)
        for expert in range(experts):
            shapes |= _mlp(f"{mlp}experts.{expert}.", width, inner)
        shapes |= _norms(layer, width)
    return shapes


def glm4_moe() -> Shapes:
    """Tensors of GLM-4.5 (zai-org/GLM-4.5): 358,337,791,296 parameters in 160 experts a layer, each three matrices.

    Layer 92 is for multi-token prediction and has token tables of its own. Neither these nor the model's are in the 355
    billion that are published. (Its one float32 vector a layer, ``e_score_correction_bias``, is bf16 here.)
    """
    width, inner, expert_inner, experts = 5120, 12_288, 1536, 160
    heads, kv_heads, head, vocabulary = 96, 8, 128, 151_552
    dense_layers, layers = 3, 92
    shapes = _ends(width, vocabulary)
    for layer in range(layers + 1):
        prefix = f"model.layers.{layer}."
        shapes |= _grouped_attention(layer, width, heads, kv_heads, head)
        shapes[f"{prefix}self_attn.q_proj.bias"] = (heads * head,)
        shapes |= {f"{prefix}self_attn.{name}_proj.bias": (kv_heads * head,) for name in "kv"}
        if layer < dense_layers:
            shapes |= _mlp(f"{prefix}mlp.", width, inner)
        else:
            shapes[f"{prefix}mlp.gate.weight"] = (experts, width)
            shapes[f"{prefix}mlp.gate.e_score_correction_bias"] = (experts,)
            for expert in range(experts):
                shapes |= _mlp(f"{prefix}mlp.experts.{expert}.", width, expert_inner)
            shapes |= _mlp(f"{prefix}mlp.shared_experts.", width, expert_inner)
        shapes |= _norms(layer, width)
    prefix = f"model.layers.{layers}."
    shapes[f"{prefix}eh_proj.weight"] = (width, 2 * width)
    shapes |= {f"{prefix}{name}.weight": (width,) for name in ("enorm", "hnorm", "shared_head.norm")}
    shapes |= {f"{prefix}{name}.weight": (vocabulary, width) for name in ("embed_tokens", "shared_head.head")}
    return shapes


MODELS: dict[str, Callable[[], Shapes]] = {
    "llama-3-8b": partial(llama, 32, 4096, 14_336, 1024),
    "llama-3-70b": partial(llama, 80, 8192, 28_672, 1024),
    "qwen3-30b-a3b": qwen3_moe,
    "glm-4.5": glm4_moe,
}


def _ends(width: int, vocabulary: int) -> Shapes:
    """What stands before and after the layers."""
    tables: Shapes = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, width))
    return tables | {"model.norm.weight": (width,)}


def _grouped_attention(layer: int, width: int, heads: int, kv_heads: int, head: int) -> Shapes:
    """Projections of grouped queries, and the norms of queries and keys."""
    attention = f"model.layers.{layer}.self_attn."
    shapes: Shapes = {
        f"{attention}q_proj.weight": (heads * head, width),
        f"{attention}o_proj.weight": (width, heads * head),
    }
    shapes |= {f"{attention}{name}_proj.weight": (kv_heads * head, width) for name in "kv"}
    shapes |= {f"{attention}{name}_norm.weight": (head,) for name in "qk"}
    return shapes


def _mlp(prefix: str, width: int, inner: int) -> Shapes:
    shapes: Shapes = {f"{prefix}{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    return shapes | {f"{prefix}down_proj.weight": (width, inner)}


def _norms(layer: int, width: int) -> Shapes:
    return {f"model.layers.{layer}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}


def save_headers(folder: Path, shapes: Shapes, shard_bytes: int = 5 << 30) -> Path:
    """A sharded bf16 checkpoint of sparse files: all is there but the data."""
    shards: list[list[OutputTensor]] = [[]]
    spent = 0  # on the last shard
    for name, shape in shapes.items():
        tensor = OutputTensor(name, torch.bfloat16, shape)
        if shards[-1] and spent + tensor.bytes > shard_bytes:
            shards.append([])
            spent = 0
        shards[-1].append(tensor)
        spent += tensor.bytes
    folder.mkdir()
    weight_map = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        prefix, placed = file_layout(folder / file, shard)
        with open(folder / file, "wb") as opened:
            opened.write(prefix)
            opened.truncate(max(tensor.end for tensor in placed.values()))
        weight_map |= {tensor.name: file for tensor in shard}
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def config_of(root: Path, shapes: Shapes, tasks: int, **changes: Any) -> MergeConfig:
    """A merge of so many experts of one base, all of them headers in ``root``."""
    base, *experts = [str(save_headers(root / str(index), shapes)) for index in range(tasks + 1)]
    return MergeConfig(base=base, experts=experts, **changes)
