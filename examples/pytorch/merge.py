"""Use Iso-C and Iso-CTS in your own program: on deltas, on state dicts, and on experts that stay in their files.

python examples/pytorch/merge.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import isomerge_fast as imf


def fine_tuned(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy with every weight moved, in place of a training run."""
    expert, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in expert.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return expert


def main() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    experts = [fine_tuned(base, seed) for seed in range(4)]

    # One matrix: T deltas in, one delta out. The scaling α is yours to apply.
    name = "0.weight"
    deltas = [expert.state_dict()[name] - base.state_dict()[name] for expert in experts]
    delta = imf.iso_cts(deltas, common_fraction=0.8)
    print(f"one matrix: {list(delta.shape)} {delta.dtype}")
    print(f"arrays give the same: {torch.equal(imf.iso_cts([delta.numpy() for delta in deltas]), delta)}")

    # Its top singular vectors, and how they are known to be these.
    u, sigma, vh = found = imf.randomized_svd(delta, 8)
    print(f"top 8 of {min(delta.shape)}: {list(u.shape)} {list(sigma.shape)} {list(vh.shape)}")
    print(f"certified: {bool(found.evidence.certified)}, by {found.evidence.algorithm[0]}")

    # A whole model: matrices by the method, biases averaged.
    states = [expert.state_dict() for expert in experts]
    merged = imf.merge_state_dicts(base.state_dict(), states, method="iso-c", scaling=1.3)
    model = copy.deepcopy(base)
    model.load_state_dict(merged)

    # What it will be, before any weights are there.
    shapes = [{name: tensor.to("meta") for name, tensor in state.items()} for state in (base.state_dict(), *states)]
    planned = imf.merge_state_dicts(shapes[0], shapes[1:], method="iso-c")
    size = sum(tensor.nbytes for tensor in planned.values())
    print(f"planned without numbers: {len(planned)} tensors, {size} bytes")

    # Experts in their files: one tensor of each is in memory at a time.
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"expert{index}.safetensors") for index in range(len(states))]
        for file, state in zip(files, states, strict=True):
            save_file(state, file)
        opened = [imf.open_state_dict(file) for file in files]
        again = imf.merge_state_dicts(base.state_dict(), opened, method="iso-c", scaling=1.3)
    print(f"read from files: the same: {all(torch.equal(again[name], tensor) for name, tensor in merged.items())}")


if __name__ == "__main__":
    main()
