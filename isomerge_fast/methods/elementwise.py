"""Merge every element by itself: by the sum of its deltas, say, their median, or those of the sign that most have."""

from __future__ import annotations

from abc import abstractmethod
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
class AnyShape(Method):
    """Merge tensors of any shape: ``finish`` gets a block of rows and their Σ_t Δ_t, and returns their merged Δ."""

    any_shape: ClassVar[bool] = True

    @abstractmethod
    def finish(self, block: RowBlock, total: Tensor) -> Tensor:
        """Return the merged Δ of some rows, of which ``total`` is Σ_t Δ_t; it may be overwritten."""

    def rowwise(self, source: DeltaSource) -> RowwiseMerge:
        return RowwiseSum(source, self)


class RowwiseSum:
    """Add the deltas up row by row, look for NaN and Inf in them, and let the method make its result."""

    def __init__(self, source: DeltaSource, method: AnyShape) -> None:
        self._source, self._method, self._seen = source, method, DeltaStats()

    def rows(self, block: RowBlock) -> Tensor:
        found = block.sum(self._source.dtype, largest=self._source.wants_largest)
        self._seen.add(block.rows.start, found)
        return self._method.finish(block, found.total)

    def stats(self) -> MergeStats:
        return MergeStats(self._method.name, self._seen.values()[1])


@dataclass(frozen=True)
class Elementwise(AnyShape):
    """Merge by Δ_i = f(Δ_1i, …, Δ_Ti). A method states f (``combine``), and takes tensors of any shape."""

    @abstractmethod
    def combine(self, deltas: Tensor) -> Tensor:
        """Return f of stacked deltas [T, ...] of some elements, in their order: [...]. The stack may be overwritten.

        Which elements come together is left open. Called from several threads at once.
        """

    def workspace_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        row = spec.elements // max(1, spec.shape[0]) if spec.shape else 1
        stacks = _combining_bytes(spec, tasks, spec.elements, tasks * row)
        return 2 * spec.bytes + stacks  # parts, and all of them in one

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        rowwise, threads = self.rowwise(deltas), deltas.threads
        value = torch.empty(deltas.shape, dtype=deltas.dtype, device=deltas.device)

        def fill(part: RowBlock) -> None:
            value[part.rows] = rowwise.rows(part)

        for block in deltas.blocks():
            threads.map(fill, threads.parts(block))
        return value, rowwise.stats()

    def rowwise_bytes(self, spec: TensorSpec, tasks: int, block_elements: int, device: torch.device) -> int | None:
        return spec.dtype.itemsize * block_elements + _combining_bytes(spec, tasks, block_elements)

    def thread_bytes(self, spec: TensorSpec, tasks: int) -> int:
        return _combining_bytes(spec, tasks, spec.elements)

    def finish(self, block: RowBlock, total: Tensor) -> Tensor:
        tasks = len(block.experts)
        step = max(1, STACKED_ELEMENTS // (tasks * max(1, total[:1].numel())))
        for part, value in zip(block.parts(step), total.split(step), strict=False):
            stack = value.new_empty(tasks, *value.shape)
            for task, delta in enumerate(stack):
                part.delta(task, value.dtype, out=delta)
            value[:] = self.combine(stack)  # which may have kept the dimension of the tasks
        return total


def _combining_bytes(spec: TensorSpec, tasks: int, elements: int, least: int = 0) -> int:
    """Return the bytes of one thread's stacks, for so many elements; they have ``least`` elements if there are such."""
    return STACKS * spec.dtype.itemsize * min(tasks * elements, max(STACKED_ELEMENTS, least))
