"""Merge one tensor in memory, or matrices of one shape, by the routes of a merge of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from math import prod

import torch
from torch import Tensor

from .. import ops
from ..machine import memory_bytes
from ..methods import DeltaSource, MemoryDeltas, Method, RowBlock, TensorSpec
from ..methods.source import Factors, MemoryFactors
from ..planning.budget import TOGETHER_SHARE
from ..planning.factor_routes import ToAdapter
from ..planning.part_sizes import ROW_STEP
from ..planning.routes import Stacked, memory_route
from ..planning.schedule import cores_of, default_cores
from .in_order import Task, in_order
from .jobs import Demand
from .threads import OneCore

# So much of a tensor is rounded at once.
PART_ELEMENTS = 1 << 22


def merge_source(
    method: Method, source: DeltaSource, base: Tensor, *, scaling: float, dtype: torch.dtype, seed: int | None = None
) -> Tensor:
    """Return θ₀ + α·Δ of one tensor, or of a batch of matrices [B, M, N], rounded once to ``dtype``.

    ``source`` has all copies in memory as they are stored: no T deltas are made of them. ``base`` is its θ₀, and
    ``seed`` that of stochastic rounding.
    """
    if source.device.type == "cpu":
        source.threads = OneCore()
    sink = MemorySink(base, scaling, dtype, seed)
    memory_route(method, base.shape).run(source, sink)
    return sink.merged


def merge_stack(
    method: Method,
    sources: Sequence[MemoryDeltas],
    places: int,
    *,
    scaling: float,
    dtype: torch.dtype,
    seeds: Sequence[int | None],
) -> list[Tensor]:
    """Return ``merge_source`` of matrices of one shape, each beside its base, in a stack of so many places."""
    bases = [source.base for source in sources if source.base is not None]
    if places == 1:
        given = zip(sources, bases, seeds, strict=True)
        return [
            merge_source(method, source, base, scaling=scaling, dtype=dtype, seed=seed) for source, base, seed in given
        ]
    sinks = [MemorySink(base, scaling, dtype, seed) for base, seed in zip(bases, seeds, strict=True)]
    shape = tuple(bases[0].shape)
    Stacked(shape, shape[0], method, 0, places).run_all(sources, sinks)
    return [sink.merged for sink in sinks]


def merge_matrices(
    method: Method, sources: Sequence[MemoryDeltas], scaling: float, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield ``merge_source`` of matrices, each beside its base, in their order; on a CPU several at once, a core each.

    All have one shape; the method is one for matrices.
    """

    def task(source: MemoryDeltas) -> Task[Tensor]:
        assert source.base is not None
        make = torch.no_grad()(partial(merge_source, method, source, source.base, scaling=scaling, dtype=dtype))
        if source.device.type != "cpu":
            return Task(make)
        flops = method.flops(source.full_spec, source.n_tasks)
        demand = method.workspace_bytes(source.full_spec, source.n_tasks, source.device)
        result_bytes = source.base.numel() * dtype.itemsize
        return Task(make, Demand(cores_of(flops, len(sources) * flops / cores, cores), demand), result_bytes)

    cores = default_cores()
    yield from in_order(map(task, sources), cores, together_bytes())


def together_bytes() -> int:
    """Return how many bytes the tensors that are merged at once in memory may take."""
    return int(TOGETHER_SHARE * memory_bytes())


def merge_to_factors(
    method: Method, factors: Sequence[Factors | None], spec: TensorSpec, rank: int
) -> tuple[Tensor, Tensor, float]:
    """Return the merged Δ of deltas given as factors, as (left [M, rank], right [rank, N], what the rank cut off).

    The last is ‖Δ − left right‖_F / ‖Δ‖_F. No matrix of the tensor's size is made.
    """
    base = torch.empty(spec.shape, dtype=spec.dtype, device="meta")  # adapters leave it alone
    source = MemoryFactors(factors, base, dtype=spec.dtype, block_rows=spec.shape[0])
    sink = MemorySink(base, 1.0, spec.dtype)
    stats = ToAdapter(spec.shape, spec.shape[0], method, 0, rank, rank).run(source, sink)
    return *sink.factors, float(stats.values["truncation"])


class MemorySink:
    """Take the rows, or the factors, of one tensor in memory: the ``Sink`` of a merge of state dicts."""

    factors: tuple[Tensor, Tensor]  # left [M, r] and right [r, N], where the route gives these

    def __init__(self, base: Tensor, scaling: float, dtype: torch.dtype, seed: int | None = None) -> None:
        self._base, self._scaling, self._dtype, self._seed = base, scaling, dtype, seed
        self._row_elements = prod(base.shape[1:])

    @cached_property
    def merged(self) -> Tensor:
        """Return the merged tensor, allocated when its first rows come: the method has freed its own memory by then."""
        return torch.empty(self._base.shape, dtype=self._dtype, device=self._base.device)

    def add(self, block: RowBlock, value: Callable[[RowBlock], Tensor], *, shared: bool) -> None:
        for part in self._parts(block) if shared else (block,):
            assert part.base is not None
            (self.merged[part.rows],) = ops.apply_delta(
                part.base,
                value(part),
                scalings=[self._scaling],
                dtype=self._dtype,
                seed=self._seed,
                first=part.rows.start * self._row_elements,
            )

    def _parts(self, block: RowBlock) -> Iterator[RowBlock]:
        """Yield the block in parts of so few elements that what is computed of one takes little memory."""
        elements = ops.traits_of(block.like.device).block_elements(PART_ELEMENTS)
        return block.parts(ROW_STEP * max(1, elements // max(1, ROW_STEP * self._row_elements)))

    def copy(self, block: RowBlock) -> None:
        assert block.base is not None
        self.merged[block.rows] = block.base

    def add_factors(self, left: Tensor, right: Tensor) -> None:
        self.factors = left, right
