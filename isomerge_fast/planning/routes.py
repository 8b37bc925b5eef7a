"""How a tensor goes through memory: strategies that take a merge from a source of deltas to a sink of merged rows.

    copy        the base's bytes, part by part
    by-rows     parts of all copies in, rows of the result out; nothing of the tensor's size is held (the linear
                methods; tall matrices of the spectral ones in several passes, where the ceiling asks for it)
    resident    all T + 1 copies are read once and held while the tensor is merged
    streamed    the sum and the result are held, the copies read part by part, again for every pass
    factors     the thin factors of all deltas are held (LoRA); the base is walked part by part
    adapter     only they: the result is a pair of thin factors again

Each strategy says what it takes (``plan``) beside what it does (``run``). Besides what a tensor takes, a merge holds
what is read ahead and what waits to be written (``Budget``).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import visible
from ..methods import DeltaSource, MergeStats, Method, RowBlock, TensorSpec
from ..methods.certified import exact_products
from ..methods.factors import merge_factors
from ..ops import BLOCK_ELEMENTS, traits_of
from .budget import Budget

# Of each copy read: it begins somewhere within a page of 4 KiB, and ends so.
PADDING_BYTES = 8 << 10
# Parts are of so many rows or multiples of it, so that random bits can be made for parts (``ops.apply_delta``).
ROW_STEP = 8
LOG = logging.getLogger("isomerge_fast")


class Sink(Protocol):
    """What takes the rows of a merged tensor, in order."""

    def add(self, block: RowBlock, value: Callable[[RowBlock], Tensor], *, shared: bool) -> None:
        """Take θ₀ + α Δ of these rows for every α, rounded once, and Δ itself where it is kept.

        Args:
            value: makes Δ of some rows of the block.
            shared: whether it is called by several threads at once, each for a part of the block; else it is called by
                one after the other, as products of matrices have threads of their own.
        """
        ...

    def copy(self, block: RowBlock) -> None:
        """Take the base's rows, converted where the output has another dtype, and a Δ of zeros where that is kept."""
        ...

    def add_factors(self, left: Tensor, right: Tensor) -> None:
        """Take α·left right, [M, r] and [r, N], as the pair of an adapter."""
        ...


@dataclass(frozen=True)
class Route(ABC):
    """The way of one tensor.

    Attributes:
        view_shape: the shape by which it is walked: [M, N] as it is, or [elements] where rows have no meaning.
        part_rows: of ``view_shape``, in every part but the last: what is written at once, and where copies are not
            held, what is read at once.
        method: with the ceiling it was given; None: copied.
        work_bytes: peak on the device that computes, beyond ``Budget.read_ahead`` and ``write_behind``.
    """

    view_shape: tuple[int, ...]
    part_rows: int
    method: Method | None
    work_bytes: int

    name: ClassVar[str]
    reads_base: ClassVar[bool] = True
    holds_copies: ClassVar[bool] = False
    writes_factors: ClassVar[bool] = False

    @abstractmethod
    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        """Merge the tensor that ``source`` gives the deltas of into ``sink``; return the evidence.

        Raises:
            NotFiniteError, OutOfRangeError, UnsolvedError: see ``methods``.
            torch.OutOfMemoryError: of a GPU.
        """
        ...

    def parts(self) -> Iterator[slice]:
        """Yield rows of ``view_shape``, in order."""
        for start in range(0, self.view_shape[0], self.part_rows):
            yield slice(start, min(start + self.part_rows, self.view_shape[0]))

    def readings(self) -> Iterator[slice]:
        """Yield the rows of ``view_shape`` that are read at once."""
        return self.parts()

    def passed_bytes(self, base_bytes: int, trained_bytes: Sequence[int]) -> int:
        """Return what is read in all, pass after pass, of a base and what every expert has of it."""
        return base_bytes + sum(trained_bytes)

    def reason(self, spec: TensorSpec, tasks: int, device: torch.device, given: str) -> str:
        """Return why it goes this way: what was ``given`` for its method, else which solver it gets, and why."""
        return given if given or self.method is None else self.method.explain(spec, tasks, device)

    def flops(self, spec: TensorSpec, tasks: int) -> float:
        """Return how many operations that takes."""
        return 0.0 if self.method is None else self.method.flops(spec, tasks)


class Copied(Route):
    """The base's bytes, only converted, if that."""

    name = "copy"

    @classmethod
    def plan(cls, shape: Sequence[int], traffic: Traffic, budget: Budget) -> Copied:
        """Return the route of a tensor that is not merged."""
        view_shape = (prod(shape),)
        rows = _part_rows(view_shape, traffic, budget.part)
        return cls(view_shape, rows, None, rows * traffic.written)

    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        """See ``Route``."""
        for block in source.blocks(()):
            sink.copy(block)
        return MergeStats(self.name)


class Rowwise(Route):
    """Rows in, rows out: what the method has learnt from passes over all rows is held, and nothing of their size."""

    name = "by-rows"

    @classmethod
    def plan_elements(
        cls, method: Method, spec: TensorSpec, traffic: Traffic, budget: Budget, device: torch.device
    ) -> Rowwise:
        """Return the route of a tensor whose elements are merged one by one."""
        view_shape = (spec.elements,)
        rows = _part_rows(view_shape, traffic, budget.part)
        work = (method.rowwise_bytes(spec, traffic.tasks, rows, device) or 0) + _applying(rows, traffic, device)
        return cls(view_shape, rows, method, work + _on_device(2 * rows, traffic, device))

    @classmethod
    def plan(
        cls, method: Method, spec: TensorSpec, traffic: Traffic, budget: Budget, device: torch.device
    ) -> Rowwise | None:
        """Return the route of a matrix; None where the method has no such form for it."""
        rows = _part_rows(spec.shape, traffic, budget.part)
        part = rows * prod(spec.shape[1:])
        beside = _again(part, traffic, budget, device) + _applying(part, traffic, device)
        chosen = _within(method, budget, beside)
        learning = chosen.rowwise_bytes(spec, traffic.tasks, part, device)
        return None if learning is None else cls(spec.shape, rows, chosen, learning + beside)

    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        """See ``Route``."""
        assert self.method is not None
        rowwise = self.method.rowwise(source)
        for block in source.blocks():
            sink.add(block, rowwise.rows, shared=self.method.any_shape)
        return rowwise.stats()

    def passed_bytes(self, base_bytes: int, trained_bytes: Sequence[int]) -> int:
        """See ``Route``: learnt in some passes, then written in one."""
        assert self.method is not None
        return super().passed_bytes(base_bytes, trained_bytes) * (1 + self.method.rowwise_passes)

    def reason(self, spec: TensorSpec, tasks: int, device: torch.device, given: str) -> str:
        """See ``Route``. That a matrix goes by rows is said whatever was given."""
        assert self.method is not None
        if self.method.any_shape:
            return super().reason(spec, tasks, device, given)
        return "by rows, to keep to the ceiling: float64 Gram matrices"


class Whole(Route):
    """The merged Δ is made as one matrix and then applied to the base's rows."""

    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        """See ``Route``."""
        assert self.method is not None
        value, stats = merge_or_again(self.method, source)
        for block in source.blocks(()):
            count = block.rows.stop - block.rows.start
            for start in range(0, count, self.part_rows):
                part = block.part(slice(start, min(start + self.part_rows, count)))
                sink.add(part, lambda part: value[part.rows], shared=True)
        return stats


class Resident(Whole):
    """All T + 1 copies are read once and held."""

    name = "resident"
    holds_copies = True

    @classmethod
    def plan(
        cls, method: Method, spec: TensorSpec, traffic: Traffic, budget: Budget, device: torch.device
    ) -> Resident | None:
        """Return the route of a matrix; None where its copies are too large for it."""
        is_cpu = device.type == "cpu"
        # On a GPU copies begin where they like.
        padding = PADDING_BYTES * len(traffic.read) if is_cpu else 0
        if spec.elements * sum(traffic.read) + padding > budget.whole:
            return None
        held = _on_device(spec.elements, traffic, device)
        chosen = _within(method, budget, held)
        rows = _part_rows(spec.shape, traffic, budget.part)
        # A download and its place within a page together are not to exceed a power of two, to which torch rounds.
        room = budget.write_behind // 2 - PADDING_BYTES
        at_once = rows if is_cpu else max(rows, _rows_of(spec.shape, traffic.written, room))
        writing = spec.bytes + _applying(at_once * prod(spec.shape[1:]), traffic, device)
        work = max(chosen.workspace_bytes(spec, traffic.tasks, device), writing)
        return cls(spec.shape, at_once, chosen, work + held)

    def readings(self) -> Iterator[slice]:
        """See ``Route``."""
        return iter([slice(0, self.view_shape[0])])


class Streamed(Whole):
    """S and the merged Δ are held; the copies are read part by part, again for every pass."""

    name = "streamed"

    @classmethod
    def plan(cls, method: Method, spec: TensorSpec, traffic: Traffic, budget: Budget, device: torch.device) -> Streamed:
        """Return the route of a matrix."""
        rows = _part_rows(spec.shape, traffic, budget.part)
        part = rows * prod(spec.shape[1:])
        writing = spec.bytes + _applying(part, traffic, device)
        again, making = _again(part, traffic, budget, device), _making(part, spec, device)
        chosen = _within(method, budget, again + making)
        work = max(chosen.workspace_bytes(spec, traffic.tasks, device) + making, writing)
        return cls(spec.shape, rows, chosen, work + again)

    def passed_bytes(self, base_bytes: int, trained_bytes: Sequence[int]) -> int:
        """See ``Route``: the sum, every Δ_t as often as the method takes it, and the base to be written."""
        assert self.method is not None
        deltas = sum(trained_bytes) + len(trained_bytes) * base_bytes
        return super().passed_bytes(base_bytes, trained_bytes) + deltas * self.method.deltas_taken + base_bytes


@dataclass(frozen=True)
class OfFactors(Route):
    """Deltas that are given as thin factors.

    Attributes:
        rank: columns of all factors together.
    """

    rank: int

    def reason(self, spec: TensorSpec, tasks: int, device: torch.device, given: str) -> str:
        """See ``Route``."""
        return given or f"factors of rank {self.rank} in all: no matrix of this size is factored"

    def flops(self, spec: TensorSpec, tasks: int) -> float:
        """See ``Route``: QR of both stacks, and the product."""
        return 16.0 * sum(spec.shape) * self.rank**2 + 2.0 * spec.elements * self.rank


class MultipliedOut(OfFactors):
    """The merged Δ is multiplied out row by row of the base."""

    name = "factors"

    @classmethod
    def plan(
        cls,
        method: Method,
        spec: TensorSpec,
        traffic: Traffic,
        budget: Budget,
        device: torch.device,
        solving: int,
        rank: int,
    ) -> MultipliedOut:
        """Return the route of a matrix; ``solving``: bytes of ``merge_factors``."""
        part_rows = _part_rows(spec.shape, traffic, budget.part)
        (rows, columns), part = spec.shape, part_rows * spec.shape[1]
        width = min(rank, columns)
        applying = spec.dtype.itemsize * ((rows + columns) * width + 2 * part) + _applying(part, traffic, device)
        work = max(solving, applying) + _on_device(2 * part, traffic, device)
        return cls(spec.shape, part_rows, method, work, rank)

    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        """See ``Route``."""
        assert self.method is not None
        merged, stats = merge_factors(self.method, source.factors(), source.shape, source.dtype)
        left, right = merged.left.to(source.dtype), merged.right.to(source.dtype)
        del merged
        with exact_products(source.device):
            for block in source.blocks(()):
                sink.add(block, lambda part: left[part.rows] @ right, shared=True)
        return stats


@dataclass(frozen=True)
class ToAdapter(OfFactors):
    """The merged Δ is truncated to a pair of factors again; the base is not read.

    Attributes:
        adapter_rank: of the pair.
    """

    adapter_rank: int

    name = "adapter"
    reads_base = False
    writes_factors = True

    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        """See ``Route``."""
        assert self.method is not None
        merged, stats = merge_factors(self.method, source.factors(), source.shape, source.dtype)
        left, right, truncation = merged.truncated(self.adapter_rank)
        sink.add_factors(left, right)
        return replace(stats, values={**stats.values, "truncation": truncation})

    def readings(self) -> Iterator[slice]:
        """See ``Route``."""
        return iter(())


@dataclass(frozen=True, slots=True)
class Traffic:
    """What moves for one element of a tensor: bytes of every copy read, and of all outputs written."""

    read: tuple[int, ...]
    written: int
    tasks: int


def copy_route(shape: Sequence[int], traffic: Traffic, budget: Budget) -> Route:
    """Return the route of a tensor that is not merged."""
    return Copied.plan(shape, traffic, budget)


def factor_route(
    method: Method,
    spec: TensorSpec,
    traffic: Traffic,
    budget: Budget,
    device: torch.device,
    *,
    tasks: int,
    rank: int,
    adapter_rank: int | None,
) -> Route:
    """Return the route of deltas given as factors of ``rank`` columns in all.

    Held are the factors; in float64 their stacks, one of which may take two more to be orthonormal; every task's
    coordinates and what the method makes of them. Then the result's factors, and a part of their product.
    """
    (rows, columns), sides = spec.shape, sum(spec.shape)
    height, width = min(rank, rows), min(rank, columns)
    solving = 8 * (rank * (3 * sides + 4 * max(rows, columns)) // 2 + height * width * (tasks + 8))
    if adapter_rank is None:
        return MultipliedOut.plan(method, spec, traffic, budget, device, solving, rank)
    outputs = sides * adapter_rank * (16 + traffic.written)
    return ToAdapter(spec.shape, rows, method, solving + outputs, rank, adapter_rank)


def choose_route(method: Method, spec: TensorSpec, traffic: Traffic, budget: Budget, device: torch.device) -> Route:
    """Return the fastest way that keeps to ``budget.work``; where none does, the one that takes least."""
    if method.any_shape:
        return Rowwise.plan_elements(method, spec, traffic, budget, device)
    routes: list[Route] = []
    for strategy in (Resident, Streamed, Rowwise):
        route = strategy.plan(method, spec, traffic, budget, device)
        if route is None:
            continue
        if budget.work is None or route.work_bytes <= budget.work:
            return route
        routes.append(route)
    return min(routes, key=lambda route: route.work_bytes)


def memory_route(method: Method, shape: Sequence[int]) -> Route:
    """Return the route of a tensor, or a batch of matrices, that is in memory with all its copies."""
    return (Rowwise if method.any_shape else Resident)(tuple(shape), shape[0], method, 0)


def merge_or_again(method: Method, source: DeltaSource) -> tuple[Tensor, MergeStats]:
    """Merge a tensor; where a GPU's memory is full, once more without what the first attempt left: the same bytes.

    That is remarked, and logged at once: the merge takes longer, and may be near its end.
    """
    with suppress(torch.OutOfMemoryError):
        return method.merge(source)
    # Not while the error is handled, which holds on to everything that was made until then.
    torch.cuda.empty_cache()
    source.start_over()
    remark = f"{source.device} was out of memory and the tensor is merged once more: what else runs on it takes room"
    LOG.warning("tensor %s: %s", visible(repr(source.full_spec.name)), remark)
    value, stats = method.merge(source)
    return value, replace(stats, remarks=(remark,))


def _within(method: Method, budget: Budget, beside: int) -> Method:
    return method if budget.work is None else method.within(max(0, budget.work - beside))


def _part_rows(view_shape: Sequence[int], traffic: Traffic, part_bytes: int) -> int:
    """Return how many rows of all copies are so many bytes."""
    return _rows_of(view_shape, sum(traffic.read), part_bytes - PADDING_BYTES * len(traffic.read))


def _rows_of(view_shape: Sequence[int], element_bytes: int, part_bytes: int) -> int:
    rows = part_bytes // max(1, prod(view_shape[1:]) * element_bytes)
    return min(max(ROW_STEP, rows // ROW_STEP * ROW_STEP), max(1, view_shape[0]))


def _applying(elements: int, traffic: Traffic, device: torch.device) -> int:
    """Return the bytes of one part of all outputs, and of the temporaries of making them."""
    if traits_of(device).is_gpu:  # as they are made; and of one of them its size and three flags, to find NaN and Inf
        return elements * (3 * traffic.written + 3)
    return elements * traffic.written + 4 * 8 * min(elements, BLOCK_ELEMENTS)


def _again(part_elements: int, traffic: Traffic, budget: Budget, device: torch.device) -> int:
    """Return what later passes read ahead. Of parts there are two: one is taken while that before it is at hand."""
    return budget.again + _on_device(2 * part_elements, traffic, device)


def _making(part_elements: int, spec: TensorSpec, device: torch.device) -> int:
    """Return the bytes of the temporaries of making deltas of parts."""
    traits = traits_of(device)
    if traits.is_gpu:  # only in ``subtract``: the base's rows in the dtype computed in
        return spec.dtype.itemsize * min(part_elements, traits.block_elements(BLOCK_ELEMENTS))
    return 32 * min(BLOCK_ELEMENTS, spec.elements)


def _on_device(elements: int, traffic: Traffic, device: torch.device) -> int:
    """Return the bytes of copies on a GPU; on a CPU what is read into buffers is worked on there."""
    return 0 if device.type == "cpu" else elements * sum(traffic.read)
