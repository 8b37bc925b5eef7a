"""Merge by multiples of the sum of the deltas. These methods accept tensors of any shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Method, RowwiseMerge
from .rowwise.passes import DeltaStats
from .source import DeltaSource, RowBlock, TensorSpec
from .stats import MergeStats
from .sums import finite_sum


@dataclass(frozen=True)
class Linear(Method):
    """Merge by Δ = (1/d) Σ_t Δ_t. A method states d (``divisor``)."""

    any_shape: ClassVar[bool] = True
    basis_free: ClassVar[bool] = True

    def divisor(self, tasks: int) -> int:
        """Return d for so many tasks."""
        return 1

    def workspace_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        return spec.bytes

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        total, _, values = finite_sum(deltas, deltas.dtype)
        divisor = self.divisor(deltas.n_tasks)
        return total if divisor == 1 else total.div_(divisor), MergeStats(self.name, values)

    def rowwise(self, source: DeltaSource) -> RowwiseMerge:
        return RowwiseLinear(source, self.name, self.divisor(source.n_tasks))

    def rowwise_bytes(self, spec: TensorSpec, tasks: int, block_elements: int, device: torch.device) -> int | None:
        return spec.dtype.itemsize * block_elements


class RowwiseLinear:
    """Make Σ_t Δ_t over ``divisor``, row by row."""

    def __init__(self, source: DeltaSource, algorithm: str, divisor: int) -> None:
        self._source, self._algorithm, self._divisor = source, algorithm, divisor
        self._seen = DeltaStats()

    def rows(self, block: RowBlock) -> Tensor:
        found = block.sum(self._source.dtype, largest=self._source.wants_largest)
        self._seen.add(block.rows.start, found)
        return found.total if self._divisor == 1 else found.total.div_(self._divisor)

    def stats(self) -> MergeStats:
        return MergeStats(self._algorithm, self._seen.values()[1])


@dataclass(frozen=True)
class TaskArithmetic(Linear):
    """Merge by Δ = Σ_t Δ_t.

    Reference: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089, §4.
    """

    name: ClassVar[str] = "task-arithmetic"
    citation: ClassVar[str] = "arXiv 2212.04089"


@dataclass(frozen=True)
class Mean(Linear):
    """Merge by Δ = (1/T) Σ_t Δ_t: at ``scaling`` 1 the average of the experts' weights.

    Reference: Wortsman et al., "Model soups", arXiv 2203.05482, §2 (uniform soup).
    """

    name: ClassVar[str] = "mean"
    citation: ClassVar[str] = "arXiv 2203.05482"

    def divisor(self, tasks: int) -> int:
        return tasks
