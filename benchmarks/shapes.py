"""List the tensors of published models as Hugging Face stores them, from the numbers in their configs.

Every benchmark takes its shapes from here. Nothing is imported: the processes that start others stay small.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

Shapes = dict[str, tuple[int, ...]]


def clip_vision_tower(width: int, layers: int) -> Shapes:
    """Return the matrices of CLIP's vision tower: four projections of attention and two of the MLP in each layer."""
    shapes: Shapes = {}
    for layer in range(layers):
        prefix = f"vision_model.encoder.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in ("q", "k", "v", "out")}
        shapes |= {f"{prefix}mlp.fc1.weight": (4 * width, width), f"{prefix}mlp.fc2.weight": (width, 4 * width)}
    return shapes


def llama(
    width: int, inner: int, layers: int, vocabulary: int = 128_256, *, kv: int | None = None, tied: bool = False
) -> Shapes:
    """Return the tensors of a Llama; ``kv`` is the width of keys and values, ``width`` by default."""
    shapes = tables(width, vocabulary, tied)
    for layer in range(layers):
        shapes |= attention(layer, width, width, kv or width)
        shapes |= mlp(f"model.layers.{layer}.mlp.", width, inner)
        shapes |= norms(layer, width)
    return shapes


def qwen3_moe(layers: int = 48, experts: int = 128) -> Shapes:
    """Return the tensors of Qwen3-30B-A3B."""
    width, inner, heads, kv_heads, head = 2048, 768, 32, 4, 128
    shapes = tables(width, 151_936)
    for layer in range(layers):
        place = f"model.layers.{layer}.mlp."
        shapes |= attention(layer, width, heads * head, kv_heads * head, head_norm=head)
        shapes[f"{place}gate.weight"] = (experts, width)
        for expert in range(experts):
            shapes |= mlp(f"{place}experts.{expert}.", width, inner)
        shapes |= norms(layer, width)
    return shapes


def tables(width: int, vocabulary: int, tied: bool = False) -> Shapes:
    """Return the token tables and the last norm."""
    names = ("model.embed_tokens.weight",) if tied else ("model.embed_tokens.weight", "lm_head.weight")
    return {**dict.fromkeys(names, (vocabulary, width)), "model.norm.weight": (width,)}


def attention(layer: int, width: int, queries: int, keys: int, *, head_norm: int | None = None) -> Shapes:
    """Return the projections of grouped queries, and the norms of queries and keys where there are some."""
    prefix = f"model.layers.{layer}.self_attn."
    shapes: Shapes = {f"{prefix}q_proj.weight": (queries, width), f"{prefix}o_proj.weight": (width, queries)}
    shapes |= {f"{prefix}{name}_proj.weight": (keys, width) for name in "kv"}
    return shapes | ({f"{prefix}{name}_norm.weight": (head_norm,) for name in "qk"} if head_norm else {})


def mlp(prefix: str, width: int, inner: int) -> Shapes:
    """Return the three projections of a gated MLP."""
    shapes: Shapes = {f"{prefix}{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    return shapes | {f"{prefix}down_proj.weight": (width, inner)}


def norms(layer: int, width: int) -> Shapes:
    """Return the two norms of a layer."""
    return {f"model.layers.{layer}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}


MODELS: dict[str, Callable[[], Shapes]] = {
    "vit-b/32": partial(clip_vision_tower, 768, 12),
    "vit-l/14": partial(clip_vision_tower, 1024, 24),
    "llama-3.2-1b": partial(llama, 2048, 8192, 16, kv=512, tied=True),
    "llama-3-8b": partial(llama, 4096, 14_336, 32, kv=1024),
    "llama-3-70b": partial(llama, 8192, 28_672, 80, kv=1024),
    "qwen3-30b-a3b": qwen3_moe,
}


def shape_of(label: str) -> tuple[int, int]:
    """Return the (rows, columns) of a matrix, as in ``shape_of("Llama-3.2-1B k_proj")``."""
    model, _, matrix = label.lower().rpartition(" ")
    end = f".{matrix.rpartition('.')[2]}.weight"
    rows, columns = next(shape for name, shape in MODELS[model]().items() if name.endswith(end))
    return rows, columns


def dimensions(shape: tuple[int, ...]) -> str:
    """Return a shape in words, as in ``48 x 768 x 768``."""
    return " x ".join(map(str, shape))
