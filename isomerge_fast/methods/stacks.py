"""Merge matrices of one shape as a stack of a fixed size, and each that is not regular by itself.

A library's batched solver ends in other last digits for eight matrices than for seven, but not for the place that one
has among eight, nor for what its neighbours are. So a stack always has as many places as its shape and device say, and
those that no matrix takes repeat the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops import TaskSum
from .source import DeltaSource, RowBlock


class DeltaStack(DeltaSource):
    """Give the deltas of matrices of one shape as [size, M, N], each from a source of its own."""

    def __init__(self, sources: Sequence[DeltaSource], size: int) -> None:
        first = sources[0]
        super().__init__(first.n_tasks, (size, *first.shape), first.dtype, first.device, first.full_spec)
        self.sources = sources

    def blocks(self, tasks: Sequence[int] | None = None) -> Iterator[RowBlock]:
        raise ValueError("a stack has no rows of its own")

    def sum(self, dtype: torch.dtype, batch_dims: int = 0) -> TaskSum:
        seen = [source.sum(dtype) for source in self.sources]
        total = self._stacked(lambda place: seen[place].total, dtype)
        padding = len(total) - len(seen)

        def of_tasks(values: list[Tensor]) -> Tensor:
            return torch.stack([*values, *values[:1] * padding], dim=1)

        largest = [found.largest for found in seen if found.largest is not None]
        return TaskSum(
            total,
            of_tasks([found.squares for found in seen]),
            of_tasks(largest) if largest else None,
            of_tasks([found.nonfinite for found in seen]),
        )

    def delta(self, task: int) -> Tensor:
        return self._stacked(lambda place: self.sources[place].delta(task), self.dtype)

    def _stacked(self, make: Callable[[int], Tensor], dtype: torch.dtype) -> Tensor:
        """Return what ``make`` makes of every place, as one tensor; one at a time is held beside it."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        for place in range(len(self.sources)):
            out[place] = make(place)
        out[len(self.sources) :] = out[:1]
        return out
