"""Merge matrices of one shape as a stack of a fixed size, and each that is not regular by itself.

A library's batched solver ends in other last digits for eight matrices than for seven, but not for the place that one
has among eight, nor for what its neighbours are (measured on an H200: docs/gpu.md). So a stack always has as many
places as its shape and device say, and those that no matrix takes repeat the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops import TaskSum
from .certified import Result
from .source import DeltaSource, RowBlock
from .stats import Check, MergeStats


class DeltaStack(DeltaSource):
    """Give the deltas of matrices of one shape as [size, M, N], each from a source of its own."""

    is_stack = True

    def __init__(self, sources: Sequence[DeltaSource], size: int) -> None:
        first = sources[0]
        alike = {(tuple(source.shape), source.dtype, source.n_tasks, source.device) for source in sources}
        assert len(alike) == 1, f"matrices of one stack are not alike: {alike}"
        assert len(sources) <= size
        super().__init__(first.n_tasks, (size, *first.shape), first.dtype, first.device, first.full_spec)
        self.sources = sources

    def blocks(self, tasks: Sequence[int] | None = None) -> Iterator[RowBlock]:
        raise ValueError("a stack has no rows of its own")

    def sum(self, dtype: torch.dtype, batch_dims: int = 0) -> TaskSum:
        seen: list[TaskSum] = []

        def sum_of(place: int) -> Tensor:
            found = self.sources[place].sum(dtype)
            seen.append(found._replace(total=found.total.new_empty(0)))  # what is put together is not held twice
            return found.total

        total = self._stacked(sum_of, dtype)

        def by_task(values: list[Tensor]) -> Tensor:
            return torch.stack([*values, *values[:1] * (len(total) - len(seen))], dim=1)

        largest = [found.largest for found in seen if found.largest is not None]
        return TaskSum(
            total,
            by_task([found.squares for found in seen]),
            by_task(largest) if largest else None,
            by_task([found.nonfinite for found in seen]),
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


def merge_together(
    attempt: Callable[[DeltaSource], Result], merge_alone: Callable[[DeltaSource], Result], stack: DeltaStack
) -> list[Result]:
    """Return the result of every matrix of a stack: ``attempt`` of all, and where its evidence misses, of it alone."""
    try:
        value, stats = attempt(stack)
    except torch.linalg.LinAlgError as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [_alone(merge_alone(source), f"stack: {first_line}") for source in stack.sources]
    stats = stats.read()
    missed = stats.missed()
    results: list[Result] = []
    for place, source in enumerate(stack.sources):
        own = stats.member(place)
        if any(bool(flags[place]) for flags in missed.values()):
            results.append(_alone(merge_alone(source), f"{own.algorithm}: {own.describe(own.missed())}"))
        else:
            results.append((value[place], own))
    return results


def _alone(result: Result, remark: str) -> Result:
    """Return the result of a matrix alone with what was given up before it."""
    value, stats = result
    return value, replace(stats, escalations=(remark, *stats.escalations))


def as_batch(results: Sequence[Result], batch: Sequence[int]) -> Result:
    """Return the results of all matrices of a batch as one: values and evidence with its dimensions."""
    value = torch.stack([value for value, _ in results])
    parts = [stats for _, stats in results]
    zero = torch.zeros((), dtype=torch.float64, device="cpu")

    def joined(key: str) -> Any:
        found = [stats.values.get(key) for stats in parts]
        first = found[0]
        if not isinstance(first, Tensor):
            return first
        together = torch.stack([torch.as_tensor(each).to(first) for each in found])
        if key == "delta_norms":
            return together.square().sum(0).sqrt()
        return together.amax(0) if key == "delta_largest" else together.view(*batch, *together.shape[1:])

    limits = {name: check.limit for stats in parts for name, check in stats.checks.items()}
    # A check that another solver does not need holds there.
    checks = {
        name: Check(torch.stack([_value_of(stats, name, zero) for stats in parts]).view(*batch), limit)
        for name, limit in limits.items()
    }
    return value.view(*batch, *value.shape[1:]), MergeStats(
        ", ".join(dict.fromkeys(stats.algorithm for stats in parts)),
        {key: joined(key) for key in parts[0].values},
        checks,
        tuple(dict.fromkeys(remark for stats in parts for remark in stats.escalations)),
        tuple(dict.fromkeys(remark for stats in parts for remark in stats.remarks)),
    )


def _value_of(stats: MergeStats, name: str, otherwise: Tensor) -> Tensor:
    return stats.checks[name].value.double().cpu() if name in stats.checks else otherwise
