"""Methods that merge matrices in stacks, with the bytes that each has by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from isomerge_fast.methods import IsoC, MergeStats, TensorSpec
from isomerge_fast.methods.source import DeltaSource
from isomerge_fast.methods.stacks import DeltaStack

PLACES = 5


@dataclass(frozen=True, kw_only=True)
class InStacks(IsoC):
    """Iso-C in stacks that are no more than several merges: their bytes cannot depend on the company."""

    name: ClassVar[str] = "in-stacks"
    seen: ClassVar[list[int]] = []

    def stack_size(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        return PLACES

    def stack_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        return PLACES * self.workspace_bytes(spec, tasks, device)

    def merge_stack(self, sources: Sequence[DeltaSource]) -> list[tuple[Tensor, MergeStats]]:
        assert 1 <= len(sources) <= PLACES
        assert len({(source.shape, source.dtype, source.n_tasks) for source in sources}) == 1
        self.seen.append(len(sources))
        return [self.merge(source) for source in sources]


@dataclass(frozen=True, kw_only=True)
class ManyLaunches(InStacks):
    """A sum that is multiplied by one a hundred times: by a hundred launches, of however many matrices."""

    name: ClassVar[str] = "many-launches"

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        return self._multiplied(deltas.sum(deltas.dtype).total), MergeStats(self.name)

    def merge_stack(self, sources: Sequence[DeltaSource]) -> list[tuple[Tensor, MergeStats]]:
        stack = DeltaStack(sources, PLACES)
        values = self._multiplied(stack.sum(stack.dtype, batch_dims=1).total)
        return [(values[place], MergeStats(self.name)) for place in range(len(sources))]

    @staticmethod
    def _multiplied(value: Tensor) -> Tensor:
        for _ in range(100):
            value *= 1.0
        return value
