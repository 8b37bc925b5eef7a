"""Describe what a merge writes: the folders of its output, and what each holds of a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..checkpoint.layout import OutputTensor, StoredTensor
from ..checkpoint.lora.adapter import LoraPair
from ..config import MergeConfig
from ..methods import TensorSpec

# Sub-folder of the output for the merged Δ.
DELTA_FOLDER = "delta"


def scaling_folders(config: MergeConfig) -> dict[str, float | None]:
    """Return α by sub-folder of the output: of the output itself where there is one α, else of ``scaling-<α>``.

    Where the merged Δ is kept, its folder comes last, with None.
    """
    several = len(config.scalings) > 1
    folders: dict[str, float | None] = {f"scaling-{value:g}" if several else "": value for value in config.scalings}
    return {**folders, DELTA_FOLDER: None} if config.save_delta else folders


@dataclass(frozen=True, slots=True)
class Output:
    """Hold what is written of a tensor into one sub-folder of the output."""

    folder: str
    scaling: float | None  # α; None where it is Δ itself
    tensors: tuple[OutputTensor, ...]  # one, or the two factors of an adapter

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """Hold what is known of a tensor before its route: what is read of it, and what is written.

    Outputs are made when they are asked for: of thousands of tensors with ten scalings each they would be as much as
    all else that is held.
    """

    spec: TensorSpec
    merged: tuple[OutputTensor, ...]  # what is written for every α: one tensor, or the two factors of an adapter
    # α by sub-folder of the output, and None by that of the merged Δ, last, where the tensor has one that is kept.
    # Tensors that are alike in that share it.
    scalings: Mapping[str, float | None]
    base: StoredTensor  # what is copied or merged; of a tensor that only an expert has, the expert's
    experts: tuple[StoredTensor, ...]  # one a task, or none where the tensor is copied or adapted
    pairs: tuple[LoraPair | None, ...]  # likewise, of adapters; None for a task that leaves the tensor alone
    weights: tuple[float, ...] | None  # w_t; None where all are 1
    shard: str  # file of the output
    rounding_seed: int | None  # of stochastic rounding

    @property
    def name(self) -> str:
        """Return the name in the base, or in the expert that alone has the tensor."""
        return self.spec.name

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Return one output for every α, and the merged Δ last, where it is kept."""
        return tuple([Output(folder, scaling, self.tensors_in(folder)) for folder, scaling in self.scalings.items()])

    def tensors_in(self, folder: str) -> tuple[OutputTensor, ...]:
        """Return what is written into a sub-folder of the output: nothing into Δ's, where the tensor has no Δ."""
        if folder not in self.scalings:
            return ()
        if self.scalings[folder] is not None:
            return self.merged
        return (OutputTensor(self.spec.name, self.spec.dtype, self.spec.shape),)

    @property
    def written_tensors(self) -> int:
        """Return how many tensors are written, in all outputs."""
        return sum([1 if scaling is None else len(self.merged) for scaling in self.scalings.values()])

    @property
    def write_bytes(self) -> int:
        """Return the bytes of all outputs."""
        kept = [*self.scalings.values()].count(None)  # Δ itself
        return (len(self.scalings) - kept) * sum([tensor.bytes for tensor in self.merged]) + kept * self.spec.bytes

    @property
    def tasks(self) -> int:
        return len(self.experts) or len(self.pairs)

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """Return A and B of every task that has them."""
        return factors_of(self.pairs)


def factors_of(pairs: Sequence[LoraPair | None]) -> tuple[StoredTensor, ...]:
    """Return A and B of every task that has them."""
    return tuple(stored for pair in pairs if pair is not None for stored in (pair.a, pair.b))
