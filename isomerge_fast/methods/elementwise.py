"""Merge every element by itself: by the median of its deltas, say, or by those of the sign that most have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Method, RowwiseMerge
from .rowwise.passes import DeltaStats
from .source import DeltaSource, RowBlock, TensorSpec
from .stats import MergeStats

# Elements of all tasks that are combined at once: 4 MiB in float32.
STACKED_ELEMENTS = 1 << 20
# Of what ``combine`` is given, with what it makes of that: with sorted values, and their order in integers of 8 bytes,
# 4.7 stacks were there (``quantile`` of 3 x 1.5 million numbers).
STACKS = 6


@dataclass(frozen=True)
class Elementwise(Method):
    """Merge by Δ_i = f(Δ_1i, …, Δ_Ti). A method states f (``combine``), and takes tensors of any shape."""

    any_shape: ClassVar[bool] = True

    @abstractmethod
    def combine(self, deltas: Tensor) -> Tensor:
        """Return f of stacked deltas [T, ...] of some elements, in their order: [...]. The stack may be overwritten.

        Which elements come together is left open. Called from several threads at once.
        """

    def workspace_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        return 2 * spec.bytes + _combining_bytes(spec, tasks, spec.elements)  # the last part once more

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        value = torch.empty(deltas.shape, dtype=deltas.dtype, device=deltas.device)
        rowwise = self.rowwise(deltas)

        def combine(part: RowBlock) -> None:
            value[part.rows] = rowwise.rows(part)

        for block in deltas.blocks():
            deltas.threads.map(combine, deltas.threads.parts(block))
        return value, rowwise.stats()

    def rowwise(self, source: DeltaSource) -> RowwiseMerge:
        return RowwiseElementwise(source, self.name, self.combine)

    def rowwise_bytes(self, spec: TensorSpec, tasks: int, block_elements: int, device: torch.device) -> int | None:
        return spec.dtype.itemsize * block_elements + _combining_bytes(spec, tasks, block_elements)


class RowwiseElementwise:
    """Make f of the deltas, element by element."""

    def __init__(self, source: DeltaSource, algorithm: str, combine: Callable[[Tensor], Tensor]) -> None:
        self._tasks, self._dtype, self._algorithm, self._combine = source.n_tasks, source.dtype, algorithm, combine
        self._wants_largest, self._seen = source.wants_largest, DeltaStats()

    def rows(self, block: RowBlock) -> Tensor:
        # For NaN, Inf and norms; its memory is that of the result.
        found = block.sum(self._dtype, largest=self._wants_largest)
        self._seen.add(block.rows.start, found)
        step = max(1, STACKED_ELEMENTS // (self._tasks * max(1, found.total[:1].numel())))
        for part, value in zip(block.parts(step), found.total.split(step), strict=False):
            stack = value.new_empty(self._tasks, *value.shape)
            for task, delta in enumerate(stack):
                part.delta(task, self._dtype, out=delta)
            value[:] = self._combine(stack)  # which may have kept the dimension of the tasks
        return found.total

    def stats(self) -> MergeStats:
        return MergeStats(self._algorithm, self._seen.values()[1])


def _combining_bytes(spec: TensorSpec, tasks: int, elements: int) -> int:
    """Return the bytes of the stacks of all threads, for so many elements."""
    at_once = min(tasks * elements, torch.get_num_threads() * STACKED_ELEMENTS)
    return STACKS * spec.dtype.itemsize * at_once
