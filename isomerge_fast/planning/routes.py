"""Take a tensor through memory: from a source of deltas to a sink of merged rows (docs/streaming.md, "Routes").

Each route says what it takes (``plan``) beside what it does (``run``). Besides what a tensor takes, a merge holds what
is read ahead and what waits to be written (``Budget``). ``factor_routes`` has the routes of LoRA's factors.
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
from .part_sizes import PADDING_BYTES, PartSizes, rows_within

LOG = logging.getLogger("isomerge_fast")

# Matrices of one kind that a plan needs for them to be merged as stacks on a GPU: one takes as long as all places of a
# stack, so of two it would be about as long as one after the other.
LEAST_ALIKE = 3


class Sink(Protocol):
    """Take the rows of a merged tensor, in order."""

    def add(self, block: RowBlock, value: Callable[[RowBlock], Tensor], *, shared: bool) -> None:
        """Take θ₀ + α Δ of these rows for every α, rounded once, and Δ itself where it is kept.

        ``value`` makes Δ of some rows of the block: where it is ``shared`` in several threads at once, each for a part
        of the block; else for one part after the other, as products of matrices have threads of their own.
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
    """Take one tensor through memory."""

    view_shape: tuple[int, ...]  # by which it is walked: [M, N] as it is, or [elements] where rows have no meaning
    # Of ``view_shape``, in every part but the last: what is written at once, and read where copies are not held.
    part_rows: int
    method: Method | None  # with the ceiling it was given; None: copied
    work_bytes: int  # peak on the device that computes, beyond ``Budget.read_ahead`` and ``write_behind``

    name: ClassVar[str]
    reads_base: ClassVar[bool] = True
    holds_copies: ClassVar[bool] = False
    writes_factors: ClassVar[bool] = False

    @property
    def shares_blocks(self) -> bool:
        """Return whether all that is done is done block by block, which all cores share, and none alone."""
        return False

    @abstractmethod
    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        """Merge one tensor: take its deltas from ``source``, write the merged rows to ``sink``, return the evidence.

        Raises:
            NotFiniteError, OutOfRangeError, UnsolvedError: see ``methods``.
            torch.OutOfMemoryError: of a GPU.
        """

    @property
    def merging(self) -> Method:
        """Return the method of a route that merges."""
        assert self.method is not None
        return self.method

    def parts(self) -> Iterator[slice]:
        """Yield consecutive slices of ``part_rows`` rows that cover ``view_shape[0]``; the last may be shorter."""
        for start in range(0, self.view_shape[0], self.part_rows):
            yield slice(start, min(start + self.part_rows, self.view_shape[0]))

    def readings(self) -> Iterator[slice]:
        """Yield the rows of ``view_shape`` in the blocks in which they are read."""
        return self.parts()

    def passed_bytes(self, base_bytes: int, trained_bytes: Sequence[int]) -> int:
        """Return the bytes that all passes together read of the base's tensor and of every expert's."""
        return base_bytes + sum(trained_bytes)

    def reason(self, spec: TensorSpec, tasks: int, device: torch.device, given: str) -> str:
        """Return why the tensor goes this way: what is ``given``, else which solver it gets and why."""
        return given if given or self.method is None else self.method.explain(spec, tasks, device)

    def flops(self, spec: TensorSpec, tasks: int) -> float:
        """Return how many operations the merge takes."""
        return 0.0 if self.method is None else self.method.flops(spec, tasks)


class Copied(Route):
    """Copy the base's bytes, converted where the output has another dtype."""

    name = "copy"

    @classmethod
    def plan(cls, shape: Sequence[int], sizes: PartSizes) -> Copied:
        """Return the route of a tensor that is not merged."""
        view_shape = (prod(shape),)
        rows = sizes.part_rows(view_shape)
        return cls(view_shape, rows, None, rows * sizes.traffic.written)

    @property
    def shares_blocks(self) -> bool:
        return True

    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        for block in source.blocks(()):
            sink.copy(block)
        return MergeStats(self.name)


class Rowwise(Route):
    """Merge row by row: what the method has learnt from passes over all rows is held, and nothing of their size."""

    name = "by-rows"

    @classmethod
    def plan(cls, method: Method, spec: TensorSpec, sizes: PartSizes) -> Rowwise | None:
        """Return the route of a tensor, or None for a matrix of which the method has no such form."""
        view_shape = (spec.elements,) if method.any_shape else spec.shape
        rows = sizes.part_rows(view_shape)
        part = rows * prod(view_shape[1:])
        beside = sizes.applying(part) + (sizes.on_device(2 * part) if method.any_shape else sizes.rereading(part))
        chosen = sizes.limited(method, beside)
        learning = chosen.rowwise_bytes(spec, sizes.traffic.tasks, part, sizes.device)
        if learning is None and not method.any_shape:
            return None
        return cls(view_shape, rows, chosen, (learning or 0) + beside)

    @property
    def shares_blocks(self) -> bool:
        return self.merging.any_shape

    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        rowwise = self.merging.rowwise(source)
        for block in source.blocks():
            sink.add(block, rowwise.rows, shared=self.merging.any_shape)
        return rowwise.stats()

    def passed_bytes(self, base_bytes: int, trained_bytes: Sequence[int]) -> int:
        """Return the bytes of the passes in which the method learns, and of the one that is written."""
        return super().passed_bytes(base_bytes, trained_bytes) * (1 + self.merging.rowwise_passes)

    def reason(self, spec: TensorSpec, tasks: int, device: torch.device, given: str) -> str:
        """Return why the tensor goes this way: of a matrix always the ceiling, and else what is ``given``."""
        if self.merging.any_shape:
            return super().reason(spec, tasks, device, given)
        return "by rows, to keep to the ceiling: float64 Gram matrices"


class Whole(Route):
    """Make the merged Δ as one matrix, and then apply it to the base's rows."""

    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        value, stats = merge_with_retry(self.merging, source)
        self.write(value, source, sink)
        return stats

    def write(self, value: Tensor, source: DeltaSource, sink: Sink) -> None:
        """Give the merged Δ to the sink, beside the base's rows."""
        for block in source.blocks(()):
            for part in block.parts(self.part_rows):
                sink.add(part, lambda part: value[part.rows], shared=True)


class Resident(Whole):
    """Read all T + 1 copies once, and hold them."""

    name = "resident"
    holds_copies = True

    @classmethod
    def plan(cls, method: Method, spec: TensorSpec, sizes: PartSizes) -> Resident | None:
        """Return the route of a matrix; None where all its copies together exceed ``budget.resident``."""
        traffic, budget = sizes.traffic, sizes.budget
        is_cpu = sizes.device.type == "cpu"
        # On a GPU copies begin where they like.
        padding = PADDING_BYTES * len(traffic.read) if is_cpu else 0
        if spec.elements * sum(traffic.read) + padding > budget.resident:
            return None
        held = sizes.on_device(spec.elements)
        chosen = sizes.limited(method, held)
        rows = sizes.part_rows(spec.shape)
        # A download and its place within a page together are not to exceed a power of two, to which torch rounds.
        room = budget.write_behind // 2 - PADDING_BYTES
        at_once = rows if is_cpu else max(rows, rows_within(spec.shape, traffic.written, room))
        writing = spec.bytes + sizes.applying(at_once * prod(spec.shape[1:]))
        work = max(chosen.workspace_bytes(spec, traffic.tasks, sizes.device), writing)
        return cls(spec.shape, at_once, chosen, work + held)

    def readings(self) -> Iterator[slice]:
        return iter([slice(0, self.view_shape[0])])


@dataclass(frozen=True)
class Stacked(Resident):
    """Merge matrices of one shape together on a GPU, which waits for launches when it merges them one by one.

    Each keeps a plan of its own. Whichever of them are merged together, each has the bytes that it has by itself.
    """

    places: int = 1  # of a stack, whose matrices' copies are all held

    name = "stacked"

    @classmethod
    def plan(cls, method: Method, spec: TensorSpec, sizes: PartSizes) -> Stacked | None:
        """Return the route of a matrix; None where stacks have one place, or more copies than ``budget.resident``."""
        traffic, device = sizes.traffic, sizes.device
        places = places_of(method, spec, traffic.tasks, device)
        if places == 1 or places * spec.elements * sum(traffic.read) > sizes.budget.resident:
            return None
        alone = Resident.plan(method, spec, sizes)
        assert alone is not None
        held = places * sizes.on_device(spec.elements)
        chosen = sizes.limited(method, held)
        # Of all of them the results, while one after the other is written.
        writing = places * spec.bytes + sizes.applying(alone.part_rows * prod(spec.shape[1:]))
        work = max(chosen.stack_bytes(spec, traffic.tasks, device), writing)
        return cls(spec.shape, alone.part_rows, chosen, work + held, places)

    def run(self, source: DeltaSource, sink: Sink) -> MergeStats:
        (stats,) = self.run_all([source], [sink])
        return stats

    def run_all(self, sources: Sequence[DeltaSource], sinks: Sequence[Sink]) -> list[MergeStats]:
        """Merge the matrices of one stack: ``run`` of each of them."""
        made = merge_stack_with_retry(self.merging, sources)
        for (value, _), source, sink in zip(made, sources, sinks, strict=True):
            self.write(value, source, sink)
        return [stats for _, stats in made]

    def reason(self, spec: TensorSpec, tasks: int, device: torch.device, given: str) -> str:
        """Return how many are merged at once; beside what is ``given``, or how one is merged that a stack cannot."""
        alone = given if given else f"one whose checks miss by itself: {self.merging.explain(spec, tasks, device)}"
        return f"stacked: {self.places} at once; {alone}"


class Streamed(Whole):
    """Hold S and the merged Δ; read the copies part by part, again for every pass."""

    name = "streamed"

    @classmethod
    def plan(cls, method: Method, spec: TensorSpec, sizes: PartSizes) -> Streamed:
        """Return the route of a matrix."""
        rows = sizes.part_rows(spec.shape)
        part = rows * prod(spec.shape[1:])
        writing = spec.bytes + sizes.applying(part)
        rereading, making = sizes.rereading(part), sizes.making_deltas(part, spec)
        chosen = sizes.limited(method, rereading + making)
        work = max(chosen.workspace_bytes(spec, sizes.traffic.tasks, sizes.device) + making, writing)
        return cls(spec.shape, rows, chosen, work + rereading)

    def passed_bytes(self, base_bytes: int, trained_bytes: Sequence[int]) -> int:
        """Return the bytes that all passes read.

        Every copy is read once for the sum, an expert and the base for every Δ_t taken, and the base once for writing.
        """
        deltas = sum(trained_bytes) + len(trained_bytes) * base_bytes
        return super().passed_bytes(base_bytes, trained_bytes) + deltas * self.merging.deltas_taken + base_bytes


def places_of(method: Method, spec: TensorSpec, tasks: int, device: torch.device) -> int:
    """Return how many matrices of a shape are merged at once: on a CPU each by itself, by a core of its own."""
    return method.stack_size(spec, tasks, device) if device.type == "cuda" else 1


def stack_route(method: Method, spec: TensorSpec, sizes: PartSizes, alike: int) -> Stacked | None:
    """Return the route of a matrix of which the plan has so many ``alike``, where stacks keep to ``budget.work``."""
    if method.any_shape or alike < LEAST_ALIKE:
        return None
    route, work = Stacked.plan(method, spec, sizes), sizes.budget.work
    return route if route is not None and (work is None or route.work_bytes <= work) else None


def choose_route(method: Method, spec: TensorSpec, sizes: PartSizes) -> Route:
    """Return the fastest route by itself that keeps to ``budget.work``; where none does, the one that takes least."""
    work = sizes.budget.work
    routes: list[Route] = []
    for strategy in (Rowwise,) if method.any_shape else (Resident, Streamed, Rowwise):
        route = strategy.plan(method, spec, sizes)
        if route is None:
            continue
        if work is None or route.work_bytes <= work:
            return route
        routes.append(route)
    return min(routes, key=lambda route: route.work_bytes)


def memory_route(method: Method, shape: Sequence[int]) -> Route:
    """Return the route of a tensor, or a batch of matrices, that is in memory with all its copies."""
    return (Rowwise if method.any_shape else Resident)(tuple(shape), shape[0], method, 0)


Made = tuple[Tensor, MergeStats]


def merge_with_retry(method: Method, source: DeltaSource) -> Made:
    """Merge a tensor; where a GPU's memory was full, free it and merge once more, which gives the same bytes.

    That is remarked, and logged at once: the merge takes longer, and may be near its end.
    """
    (made,) = _with_retry(lambda: [method.merge(source)], [source], "the tensor is")
    return made


def merge_stack_with_retry(method: Method, sources: Sequence[DeltaSource]) -> list[Made]:
    """Merge the matrices of one stack, as ``merge_with_retry`` does one."""
    what = "the tensor is" if len(sources) == 1 else f"{len(sources)} tensors are"
    return _with_retry(lambda: method.merge_stack(sources), sources, what)


def _with_retry(merge: Callable[[], list[Made]], sources: Sequence[DeltaSource], what: str) -> list[Made]:
    with suppress(torch.OutOfMemoryError):
        return merge()
    # Not while the error is handled, which holds on to everything that was made until then.
    torch.cuda.empty_cache()
    for source in sources:
        source.start_over()
    first = sources[0]
    remark = f"{first.device} was out of memory and {what} merged once more: what else runs on it takes room"
    LOG.warning("tensor %s: %s", visible(repr(first.full_spec.name)), remark)
    return [(value, replace(stats, remarks=(remark,))) for value, stats in merge()]


def out_of_memory_at_once(device: torch.device, count: int) -> str:
    """Return the remark on tensors of a stack for which there was no room twice."""
    what = f"{device} was out of memory for {count} tensors at once"
    return f"{what} and each is merged by itself: what else runs on it takes room"
