"""Models that tests plan: a merge of checkpoints of headers alone, and a model larger than those of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.checkpoints import save_headers
from benchmarks.shapes import Shapes, attention, mlp, norms, tables
from isomerge_fast.config import MergeConfig


def config_of(root: Path, shapes: Shapes, tasks: int, **changes: Any) -> MergeConfig:
    """A merge of so many experts of one base, all of them headers in ``root``."""
    base, *experts = [str(save_headers(root / str(index), shapes)) for index in range(tasks + 1)]
    return MergeConfig(base=base, experts=experts, **changes)


def glm4_moe() -> Shapes:
    """The tensors of GLM-4.5 (zai-org/GLM-4.5): 358,337,791,296 parameters, 160 experts in each layer.

    Layer 92 is for multi-token prediction and has token tables of its own. The published 355 billion count neither
    these nor the model's. (One float32 vector a layer, ``e_score_correction_bias``, is bf16 here.)
    """
    width, inner, expert_inner, experts = 5120, 12_288, 1536, 160
    heads, kv_heads, head, vocabulary = 96, 8, 128, 151_552
    dense_layers, layers = 3, 92
    shapes = tables(width, vocabulary)
    for layer in range(layers + 1):
        prefix = f"model.layers.{layer}."
        shapes |= attention(layer, width, heads * head, kv_heads * head, head_norm=head)
        shapes[f"{prefix}self_attn.q_proj.bias"] = (heads * head,)
        shapes |= {f"{prefix}self_attn.{name}_proj.bias": (kv_heads * head,) for name in "kv"}
        if layer < dense_layers:
            shapes |= mlp(f"{prefix}mlp.", width, inner)
        else:
            shapes[f"{prefix}mlp.gate.weight"] = (experts, width)
            shapes[f"{prefix}mlp.gate.e_score_correction_bias"] = (experts,)
            for expert in range(experts):
                shapes |= mlp(f"{prefix}mlp.experts.{expert}.", width, expert_inner)
            shapes |= mlp(f"{prefix}mlp.shared_experts.", width, expert_inner)
        shapes |= norms(layer, width)
    prefix = f"model.layers.{layers}."
    shapes[f"{prefix}eh_proj.weight"] = (width, 2 * width)
    shapes |= {f"{prefix}{name}.weight": (width,) for name in ("enorm", "hnorm", "shared_head.norm")}
    return shapes | {f"{prefix}{name}.weight": (vocabulary, width) for name in ("embed_tokens", "shared_head.head")}
