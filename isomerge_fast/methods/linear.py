"""The linear methods: multiples of the sum of the deltas. They accept tensors of any shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Method, RowwiseMerge
from .rowwise.polar import RowwiseLinear
from .source import DeltaSource, TensorSpec
from .stats import MergeStats
from .sums import finite_sum


@dataclass(frozen=True)
class Linear(Method):
    """Δ = (1/d) Σ_t Δ_t. A method states d (``divisor``)."""

    any_shape: ClassVar[bool] = True
    basis_free: ClassVar[bool] = True

    def divisor(self, tasks: int) -> int:
        """Return d for so many tasks."""
        return 1

    def workspace_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        """See ``Method``."""
        return spec.bytes

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        """See ``Method``."""
        total, _, values = finite_sum(deltas, deltas.dtype)
        divisor = self.divisor(deltas.n_tasks)
        return total if divisor == 1 else total.div_(divisor), MergeStats(self.name, values)

    def rowwise(self, source: DeltaSource) -> RowwiseMerge:
        """See ``Method``."""
        return RowwiseLinear(source, self.name, divisor=self.divisor(source.n_tasks))

    def row_map_bytes(self, spec: TensorSpec, tasks: int, block_elements: int, device: torch.device) -> int | None:
        """See ``Method``."""
        return spec.dtype.itemsize * block_elements


@dataclass(frozen=True)
class TaskArithmetic(Linear):
    """Δ = Σ_t Δ_t.

    Reference: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089, §4.
    """

    name: ClassVar[str] = "task-arithmetic"
    citation: ClassVar[str] = "arXiv 2212.04089"


@dataclass(frozen=True)
class Mean(Linear):
    """Δ = (1/T) Σ_t Δ_t: at ``scaling`` 1 the average of the experts' weights.

    Reference: Wortsman et al., "Model soups", arXiv 2203.05482, §2 (uniform soup).
    """

    name: ClassVar[str] = "mean"
    citation: ClassVar[str] = "arXiv 2203.05482"

    def divisor(self, tasks: int) -> int:
        """See ``Linear``."""
        return tasks
