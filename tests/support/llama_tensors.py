"""Llamas whose checkpoints together are larger than a ceiling of memory."""

from __future__ import annotations

import torch

# A base and 4 experts of either are above the ceiling of 600 MiB, and the largest tensor of either has 49 MB. What a
# merge computes for every byte grows as the width.
NARROW = {"layers": 48, "width": 256, "vocabulary": 96_000}  # 99 M parameters
WIDE = {"layers": 12, "width": 768, "vocabulary": 32_000}  # 162 M
TASKS = 4


def llama_tensors(seed: int, *, layers: int, width: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a Llama whose inner width is four times its width."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)

    tensors = {"model.embed_tokens.weight": random(vocabulary, width), "lm_head.weight": random(vocabulary, width)}
    tensors["model.norm.weight"] = random(width)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}self_attn.{name}.weight"] = random(width, width)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{prefix}mlp.{name}.weight"] = random(4 * width, width)
        tensors[f"{prefix}mlp.down_proj.weight"] = random(width, 4 * width)
        tensors[f"{prefix}input_layernorm.weight"] = random(width)
        tensors[f"{prefix}post_attention_layernorm.weight"] = random(width)
    return tensors
