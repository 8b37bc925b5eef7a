"""Checkpoints and adapters with fixed seeds and fixed times, made with torch and safetensors alone.

All paths are relative: the recording works in a folder of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Every input file is this old, so that manifests, which hold it, are the same.
FILE_TIME = 1_700_000_000

# Square, wide, tall, odd, a row, a column; other dimensions than two; one that the spectral methods leave out.
SMALL: Shapes = {
    "embed.weight": (48, 16),
    "layers.0.attn.weight": (24, 24),
    "layers.0.up.weight": (64, 24),
    "layers.0.down.weight": (24, 64),
    "layers.0.odd.weight": (37, 53),
    "layers.0.low_rank.weight": (21, 30),
    "layers.0.unmoved.weight": (18, 18),
    "layers.0.norm.weight": (24,),
    "layers.1.attn.weight": (24, 24),
    "layers.1.up.weight": (64, 24),
    "row.weight": (1, 24),
    "column.weight": (19, 1),
    "conv.weight": (8, 4, 3, 3),
    "text_projection.weight": (24, 16),
    "logit_scale": (),
    "empty.weight": (0, 4),
}
# For solvers, blocks of rows and the search for a few directions.
MEDIUM: Shapes = {
    "square.weight": (192, 192),
    "tall.weight": (512, 96),
    "wide.weight": (96, 512),
    "nearly.weight": (200, 144),
    "low_rank.weight": (160, 224),
}
# Of several MiB, whose copies a low ceiling does not hold.
LARGE: dict[str, Shapes] = {
    "square": {"square.weight": (1024, 1024), "norm.weight": (5003,)},
    "wide": {"wide.weight": (512, 1536)},
    "tall": {"tall.weight": (3072, 384), "also.weight": (1100, 500)},
}
KINDS: dict[str, Shapes] = {"small": SMALL, "medium": MEDIUM, **LARGE}


@dataclass(frozen=True)
class Family:
    """A base and its experts, by path."""

    base: str
    experts: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]:
        """Return the two keys of a merge's config."""
        return {"base": self.base, "experts": list(self.experts)}


def random(shape: Sequence[int], seed: int) -> Tensor:
    """Return standard normal numbers in float64."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=F64)


def base_tensors(shapes: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return tensors of these shapes, and beside them integers and booleans."""
    tensors = {name: random(shape, index).to(dtype) for index, (name, shape) in enumerate(shapes.items())}
    return {**tensors, "position_ids": torch.arange(11), "mask": torch.tensor([True, False, True])}


def moved(base: Mapping[str, Tensor], task: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the base after a fine-tuning: every float weight but the unmoved ones is elsewhere."""
    result = {}
    for index, (name, tensor) in enumerate(base.items()):
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        result[name] = (tensor.double() + _delta(name, tensor.shape, 1000 * (task + 1) + index)).to(
            dtype or tensor.dtype
        )
    return result


def _delta(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Return a task's change of one tensor in float64."""
    if "unmoved" in name:
        return torch.zeros(tuple(shape), dtype=F64)
    if "low_rank" in name:
        return 0.1 * random((shape[0], 2), seed) @ random((2, shape[1]), seed + 500)
    return 0.1 * random(shape, seed)


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, config: Mapping[str, Any] | None = None
) -> str:
    """Write a folder of one or several files, or a bare file where ``path`` ends in ``.safetensors``."""
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path, metadata={"format": "pt"})
        return aged(path)
    path.mkdir(parents=True)
    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
    else:
        _save_shards(path, tensors, shards)
    dtype = next(iter(tensors.values())).dtype
    settings = {"model_type": "recorded", "torch_dtype": str(dtype).removeprefix("torch."), **(config or {})}
    (path / "config.json").write_text(json.dumps(settings))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    return aged(path)


def _save_shards(path: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    """Write tensors to files in turn, and the index that tells where each one lies."""
    files = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    places = {name: files[index % shards] for index, name in enumerate(tensors)}
    for file in files:
        part = {name: tensors[name] for name, place in places.items() if place == file}
        save_file(part, path / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def aged(path: Path) -> str:
    """Give all files their fixed time; return the path as text."""
    for each in [path, *path.rglob("*")]:
        os.utime(each, (FILE_TIME, FILE_TIME))
    return str(path)


def make_family(
    kind: str = "small",
    dtype: torch.dtype = F32,
    *,
    tasks: int = 3,
    shards: int = 1,
    expert_dtypes: tuple[torch.dtype, ...] = (),
    bare: bool = False,
) -> Family:
    """Return a family, which is written when it is asked for the first time.

    Args:
        kind: ``small``, ``medium``, or one of ``LARGE``.
        expert_dtypes: of the experts in turn; the base's where there are none.
        bare: files instead of folders.
    """
    others = "-".join(str(each).removeprefix("torch.") for each in expert_dtypes)
    root = Path("in") / f"{kind}-{str(dtype).removeprefix('torch.')}-{tasks}-{shards}-{others}-{bare}"
    ending = ".safetensors" if bare else ""
    base_path, *paths = (root / f"{name}{ending}" for name in ("base", *(f"expert{task}" for task in range(tasks))))
    if not root.exists():
        base = base_tensors(KINDS[kind], dtype)
        save_checkpoint(base_path, base, shards=shards)
        for task, path in enumerate(paths):
            expert_dtype = expert_dtypes[task % len(expert_dtypes)] if expert_dtypes else None
            save_checkpoint(path, moved(base, task, expert_dtype), shards=shards)
    return Family(str(base_path), tuple(map(str, paths)))


def change_expert(
    name: str, change: Callable[[dict[str, Tensor]], object], kind: str = "small", dtype: torch.dtype = F32
) -> Family:
    """Return a family with another second expert, as ``change`` leaves its tensors."""
    family = make_family(kind, dtype)
    path = Path("in") / "changed" / f"{kind}-{name}"
    if not path.exists():
        tensors = moved(base_tensors(KINDS[kind], dtype), 1)
        change(tensors)
        save_checkpoint(path, tensors)
    return Family(family.base, (family.experts[0], str(path), family.experts[2]))


@cache
def make_deltas() -> Family:
    """Return a family whose experts hold Δ_t instead of weights."""
    family = make_family()
    base = base_tensors(SMALL, F32)
    paths = []
    for task in range(3):
        expert = moved(base, task)
        deltas = {name: expert[name] - base[name] for name in base if base[name].is_floating_point()}
        paths.append(save_checkpoint(Path("in") / "deltas" / f"delta{task}", {**base, **deltas}))
    return Family(family.base, tuple(paths))


# ------------------------------------------------------------------------------------------------------------- adapters

ADAPTED: Shapes = {
    "model.embed_tokens.weight": (80, 48),
    "model.layers.0.q_proj.weight": (48, 48),
    "model.layers.0.k_proj.weight": (16, 48),
    "model.layers.0.up_proj.weight": (128, 48),
    "model.layers.0.down_proj.weight": (48, 128),
    "model.layers.0.norm.weight": (48,),
    "lm_head.weight": (80, 48),
}
PROJECTIONS = tuple(name for name in ADAPTED if "_proj" in name)
PREFIX = "base_model.model."


@cache
def make_adapted_base(dtype: torch.dtype) -> str:
    """Return the folder of the model that adapters belong to."""
    path = Path("in") / f"adapted-{str(dtype).removeprefix('torch.')}"
    return save_checkpoint(path, base_tensors(ADAPTED, dtype), shards=2)


def _factors(name: str, rank: int, seed: int, *, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yield A and B of one tensor by their names in the file: of a linear layer, a turned one, or an embedding."""
    rows, columns = ADAPTED[name] if kind == "linear" else ADAPTED[name][::-1]
    module = PREFIX + name.removesuffix(".weight")
    sides = {"A": random((rank, columns), seed) / 5, "B": random((rows, rank), seed + 500) / 10}
    for side, value in sides.items():
        yield (f"{module}.lora_embedding_{side}" if kind == "embedding" else f"{module}.lora_{side}.weight"), value


def save_adapter(
    path: Path,
    task: int,
    *,
    rank: int,
    names: Sequence[str] = PROJECTIONS,
    embedding: bool = False,
    whole: Sequence[str] = (),
    dtype: torch.dtype = F32,
    **settings: Any,
) -> str:
    """Write an adapter as PEFT does.

    Args:
        names: of the tensors that are adapted; embedding: the table of tokens as well.
        whole: tensors that the adapter holds as they are (``modules_to_save``).
        settings: more of ``adapter_config.json``.
    """
    ranks = settings.get("rank_pattern", {})
    kind = "turned" if settings.get("fan_in_fan_out") else "linear"
    tensors: dict[str, Tensor] = {}
    for index, name in enumerate(names):
        own = ranks.get(name.removesuffix(".weight").rsplit(".", 1)[1], rank)
        tensors |= dict(_factors(name, own, 100 * (task + 1) + index, kind=kind))
    if embedding:
        tensors |= dict(_factors("model.embed_tokens.weight", rank, 100 * task + 50, kind="embedding"))
    for index, name in enumerate(whole):
        tensors[PREFIX + name] = random(ADAPTED[name], 100 * task + 70 + index)
    path.mkdir(parents=True)
    stored = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    save_file(stored, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": rank, "lora_alpha": 8, **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return aged(path)


def make_adapters(label: str, *, base_dtype: torch.dtype = F32, tasks: int = 3, **given: Any) -> Family:
    """Return a base and adapters of it, of ranks 4, 5, …; ``given``: see ``save_adapter``."""
    root = Path("in") / "adapters" / label
    paths = [root / f"adapter{task}" for task in range(tasks)]
    if not root.exists():
        for task, path in enumerate(paths):
            save_adapter(path, task, rank=4 + task, **given)
    return Family(make_adapted_base(base_dtype), tuple(map(str, paths)))
