"""The two linear methods: the mean of the deltas and their sum. They accept tensors of any shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .protocol import Method, RowMap
from .row_maps import LinearMap
from .source import DeltaSource, TensorSpec
from .stats import MergeStats
from .sums import finite_sum


@dataclass(frozen=True)
class TaskArithmetic:
    """Δ = Σ_t Δ_t.

    Reference: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089, §4.
    """

    name: ClassVar[str] = "task-arithmetic"
    citation: ClassVar[str] = "arXiv 2212.04089"
    default_exclude: ClassVar[tuple[str, ...]] = ()
    any_shape: ClassVar[bool] = True
    deltas_taken: ClassVar[int] = 0
    row_map_passes: ClassVar[int] = 0

    def accepts(self, spec: TensorSpec) -> bool:
        return True

    def within(self, memory_bytes: int) -> Method:
        return self

    def explain(self, spec: TensorSpec, tasks: int, device: torch.device) -> str:
        return "every float tensor"

    def check(self, spec: TensorSpec, tasks: int) -> None:
        pass

    def workspace_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        return spec.bytes

    def flops(self, spec: TensorSpec, tasks: int) -> float:
        return 2.0 * tasks * spec.elements

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        total, _, values = finite_sum(deltas, deltas.dtype)
        return total, MergeStats(self.name, values)

    def row_map(self, source: DeltaSource) -> RowMap:
        return LinearMap(source, self.name)

    def row_map_bytes(self, spec: TensorSpec, tasks: int, block_elements: int, device: torch.device) -> int | None:
        return spec.dtype.itemsize * block_elements


@dataclass(frozen=True)
class Mean(TaskArithmetic):
    """Δ = (1/T) Σ_t Δ_t: at ``scaling`` 1 the average of the experts' weights.

    Reference: Wortsman et al., "Model soups", arXiv 2203.05482, §2 (uniform soup).
    """

    name: ClassVar[str] = "mean"
    citation: ClassVar[str] = "arXiv 2203.05482"

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        total, stats = super().merge(deltas)
        return total.div_(deltas.n_tasks), stats

    def row_map(self, source: DeltaSource) -> RowMap:
        return LinearMap(source, self.name, divisor=source.n_tasks)
