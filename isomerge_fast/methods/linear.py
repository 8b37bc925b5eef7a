"""Merge by multiples of the sum of the deltas. These methods accept tensors of any shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import BLOCK_ELEMENTS
from .elementwise import AnyShape
from .source import DeltaSource, RowBlock, TensorSpec
from .stats import MergeStats
from .sums import delta_sizes


@dataclass(frozen=True)
class Linear(AnyShape):
    """Merge by Δ = (1/d) Σ_t Δ_t. A method states d (``divisor``)."""

    basis_free: ClassVar[bool] = True

    def divisor(self, tasks: int) -> int:
        """Return d for so many tasks."""
        return 1

    def workspace_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        # With the block of a delta, and that of the base, in the dtype computed in.
        return spec.bytes + 2 * spec.dtype.itemsize * min(spec.elements, BLOCK_ELEMENTS)

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        found = deltas.sum(deltas.dtype)
        divisor = self.divisor(deltas.n_tasks)
        value = found.total if divisor == 1 else found.total.div_(divisor)
        return value, MergeStats(self.name, delta_sizes(found))

    def rowwise_bytes(self, spec: TensorSpec, tasks: int, block_elements: int, device: torch.device) -> int | None:
        return spec.dtype.itemsize * block_elements

    def finish(self, block: RowBlock, total: Tensor) -> Tensor:
        divisor = self.divisor(len(block.experts))
        return total if divisor == 1 else total.div_(divisor)


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
