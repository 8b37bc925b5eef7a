"""Merge files as one writes it with torch and safetensors: all checkpoints in memory, one after the other.

This is the baseline of whole merges. All matrices go through the method, embeddings too, as in ``isomerge run``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isomerge_fast.bench import published

State = dict[str, Tensor]


def load(folder: Path) -> State:
    """Return all shards of a checkpoint folder, in float32."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.float() for file in files for name, tensor in load_file(file).items()}


def merge(models: Sequence[Path], out: Path, combine: Callable[[list[State]], State], scaling: float) -> None:
    """Write θ₀ + α Δ of a base and its experts into one float32 file, Δ by ``combine``."""
    base, *experts = (load(model) for model in models)
    delta = combine([{name: expert[name] - base[name] for name in base} for expert in experts])
    out.mkdir(parents=True, exist_ok=True)
    merged = {name: weight + scaling * delta[name] for name, weight in base.items()}
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})


def mean(deltas: Sequence[Tensor]) -> Tensor:
    """Return the mean of deltas."""
    return torch.stack(list(deltas)).mean(0)


OF_MATRICES = {"iso-c": published.iso_c, "iso-cts": published.iso_cts, "mean": mean}


def combine(method: str, deltas: list[State]) -> State:
    """Return Δ: of matrices by the published method, of everything else by the mean."""
    stacks = {name: [delta[name] for delta in deltas] for name in deltas[0]}
    return {n: (OF_MATRICES[method] if s[0].ndim == 2 else mean)(s) for n, s in stacks.items()}
