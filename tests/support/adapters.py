"""Small LoRA adapters as PEFT saves them, made with safetensors itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import save_folder

PREFIX = "base_model.model."
SHAPES = {
    "model.embed_tokens.weight": (40, 24),
    "model.layers.0.q_proj.weight": (24, 24),
    "model.layers.0.k_proj.weight": (8, 24),
    "model.layers.0.up_proj.weight": (64, 24),
    "model.layers.0.down_proj.weight": (24, 64),
    "model.layers.0.norm.weight": (24,),
    "lm_head.weight": (40, 24),
}
ADAPTED = tuple(name for name in SHAPES if "_proj" in name)


def make_base(folder: Path, *, dtype: torch.dtype = torch.float32, shards: int = 1) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    tensors["model.position_ids"] = torch.arange(6)
    (folder / "x").parent.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    return save_folder(folder, tensors, shards=shards, config={"model_type": "test", "dtype": "float32"})


def save_adapter(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    whole: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Path:
    """``factors``: (A, B) by the base's tensor name; ``whole``: tensors of modules_to_save likewise."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a, b) in factors.items():
        module = PREFIX + name.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": a.contiguous(), f"{module}.lora_B.weight": b.contiguous()}
    tensors |= {PREFIX + name: value.contiguous() for name, value in (whole or {}).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    given = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 4, "lora_alpha": 8, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder


def draw_factors(
    seed: int, *, rank: int = 4, names: Sequence[str] = ADAPTED, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + seed)
    return {
        name: (
            (torch.randn(rank, SHAPES[name][1], generator=generator) / 5).to(dtype),
            (0.1 * torch.randn(SHAPES[name][0], rank, generator=generator)).to(dtype),
        )
        for name in names
    }


def make_adapters(root: Path, *, tasks: int = 3, **settings: Any) -> tuple[Path, list[Path]]:
    """A base and adapters of it with ranks 4, 5, …"""
    folders = [
        save_adapter(root / f"adapter{task}", draw_factors(task, rank=4 + task), r=4 + task, **settings)
        for task in range(tasks)
    ]
    return make_base(root / "base"), folders


def delta_of(folder: Path, name: str) -> Tensor:
    """Δ of one adapter in float64, from its files; zero where it leaves the tensor alone."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    module = PREFIX + name.removesuffix(".weight")
    if f"{module}.lora_A.weight" not in tensors:
        return torch.zeros(SHAPES[name], dtype=torch.float64)
    a, b = (tensors[f"{module}.lora_{side}.weight"].double() for side in "AB")
    return settings["lora_alpha"] / settings["r"] * (b @ a)
