"""A merge of files as one writes it with torch and safetensors: all checkpoints in memory, one after the other.

The baseline of whole merges. All matrices go through the method, embeddings too, as in ``isomerge run``.
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
    """All shards of a checkpoint folder, in float32."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.float() for file in files for name, tensor in load_file(file).items()}


def merge(
    models: Sequence[Path],
    out: Path,
    combine: Callable[[list[State]], State],
    *,
    scaling: float,
    dtype: torch.dtype,
) -> None:
    """θ₀ + α Δ of a base and its experts, Δ by ``combine``, into one file."""
    base, *experts = (load(model) for model in models)
    delta = combine([{name: expert[name] - base[name] for name in base} for expert in experts])
    out.mkdir(parents=True, exist_ok=True)
    merged = {name: (weight + scaling * delta[name]).to(dtype) for name, weight in base.items()}
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})


def mean(deltas: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(deltas)).mean(0)


def total(deltas: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(deltas)).sum(0)


OF_MATRICES = {"iso-c": published.iso_c, "iso-cts": published.iso_cts, "mean": mean, "task-arithmetic": total}


def combine(method: str) -> Callable[[list[State]], State]:
    """Matrices by the published method, everything else by the mean (task arithmetic: the sum)."""
    of_others = total if method == "task-arithmetic" else mean

    def combined(deltas: list[State]) -> State:
        stacks = {name: [delta[name] for delta in deltas] for name in deltas[0]}
        return {n: (OF_MATRICES[method] if s[0].ndim == 2 else of_others)(s) for n, s in stacks.items()}

    return combined
