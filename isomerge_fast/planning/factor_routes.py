"""Take tensors through memory whose deltas are thin factors (LoRA): the factors are held, and no matrix is solved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..methods import DeltaSource, MergeStats, Method, TensorSpec
from ..methods.certified import exact_products
from ..methods.factors import merge_factors
from .part_sizes import PartSizes
from .routes import Route, Sink


@dataclass(frozen=True)
class FactorRoute(Route):
    """Take a tensor whose deltas are given as thin factors."""

    rank: int  # columns of all factors together

    def reason(self, spec: TensorSpec, tasks: int, device: torch.device, given: str) -> str:
        return given or f"factors of rank {self.rank} in all: no matrix of this size is factored"

    def flops(self, spec: TensorSpec, tasks: int) -> float:
        """Return the operations of QR of both stacks, and of the product."""
        return 16.0 * sum(spec.shape) * self.rank**2 + 2.0 * spec.elements * self.rank


class MultipliedOut(FactorRoute):
    """Multiply the merged factors out row by row of the base."""

    name = "factors"

    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        merged, stats = merge_factors(self.merging, source.factors(), source.shape, source.dtype)
        left, right = merged.left.to(source.dtype), merged.right.to(source.dtype)
        del merged
        with exact_products(source.device):
            for block in source.blocks(()):
                sink.add(block, lambda part: left[part.rows] @ right, shared=True)
        return stats


@dataclass(frozen=True)
class ToAdapter(FactorRoute):
    """Truncate the merged Δ to a pair of factors again, without reading the base."""

    adapter_rank: int  # of the pair

    name = "adapter"
    reads_base = False
    writes_factors = True

    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        merged, stats = merge_factors(self.merging, source.factors(), source.shape, source.dtype)
        left, right, truncation = merged.truncated(self.adapter_rank)
        sink.add_factors(left, right)
        return replace(stats, values={**stats.values, "truncation": truncation})

    def readings(self) -> Iterator[slice]:
        return iter(())


def factor_route(
    method: Method, spec: TensorSpec, sizes: PartSizes, *, tasks: int, rank: int, adapter_rank: int | None
) -> FactorRoute:
    """Return the route of deltas given as factors of ``rank`` columns in all.

    Held are the factors; in float64 their stacks, one of which may take two more to be orthonormal; every task's
    coordinates and what the method makes of them. Then the result's factors, and a part of their product.
    """
    (rows, columns), sides = spec.shape, sum(spec.shape)
    height, width = min(rank, rows), min(rank, columns)
    solving = 8 * (rank * (3 * sides + 4 * max(rows, columns)) // 2 + height * width * (tasks + 8))
    if adapter_rank is not None:
        outputs = sides * adapter_rank * (16 + sizes.traffic.written)
        return ToAdapter(spec.shape, rows, method, solving + outputs, rank, adapter_rank)
    part_rows = sizes.part_rows(spec.shape)
    part = part_rows * columns
    applying = spec.dtype.itemsize * (sides * width + 2 * part) + sizes.applying(part)
    return MultipliedOut(spec.shape, part_rows, method, max(solving, applying) + sizes.on_device(2 * part), rank)
