"""Merge small tensors that lie one after the other, in every file, as one vector: the same bytes in less time.

Where a method may tell one vector from several, they are read as one and merged one by one.
So a buffer, a reading, 60 calls of torch and a write are needed once a run, not once a tensor. 4,096 tensors of 768
weights with four experts took 0.8 to 0.9 ms of a core each, and 0.10 to 0.11 in runs; apart, 0.7 (one thread, beside
busy processes).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, repeat
from typing import Any

import numpy
import torch
from torch import Tensor

from ..checkpoint.io.checksum import Checksum
from ..checkpoint.io.read_ahead import InputChecksums, ReadAhead
from ..checkpoint.io.reader import whole
from ..checkpoint.io.writer import ShardWriter, tensor_bytes
from ..checkpoint.layout import OutputTensor, StoredTensor
from ..methods import Linear, RowBlock, TensorSpec
from ..ops import ALIGNMENT, SUM_BLOCK_ELEMENTS, TaskSum, least_squares, sum_of_squares
from ..planning.budget import Budget
from ..planning.plan import TensorPlan
from ..planning.routes import Copied, Rowwise
from .sources import FileSource, FirstPass, first_pass

# All copies of a run: no more than a part of the smallest budget.
RUN_BYTES = 2 << 20
# Of a run, whose reports and journal entries are held at once, as objects: 2 to 3 kB each. (64 take a tenth more time.)
RUN_TENSORS = 128
# What a run takes beside its copies, where its tensors one by one take less and were planned for. The buffers of the
# threads that read have more, which small tensors leave unused (``budget.PROCESS_BYTES``).
RUN_WORK_BYTES = 4 << 20

Writers = Mapping[tuple[str, str], ShardWriter]


@dataclass(frozen=True, slots=True)
class StoredRun(StoredTensor):
    """Locate stored tensors that lie one after the other, as one vector under the name of the first."""

    tensors: tuple[StoredTensor, ...] = ()

    @classmethod
    def of(cls, tensors: Sequence[StoredTensor]) -> StoredRun:
        first = tensors[0]
        elements = sum(stored.elements for stored in tensors)
        return cls(first.name, first.dtype, (elements,), first.file, first.start, tuple(tensors))

    def name_at(self, position: int) -> str:
        return next((stored.name for stored in self.tensors if position < stored.end), self.tensors[-1].name)


@dataclass(frozen=True, slots=True)
class TensorRun(TensorPlan):
    """Hold the plan of several tensors as that of one vector, under the name of the first."""

    tensors: tuple[TensorPlan, ...] = ()
    is_apart: bool = False  # read as one vector, and merged one by one

    @property
    def copies(self) -> tuple[StoredRun, ...]:
        """Return the base, and the experts."""
        return tuple(stored for stored in (self.base, *self.experts) if isinstance(stored, StoredRun))

    @classmethod
    def of(cls, tensors: Sequence[TensorPlan]) -> TensorRun:
        """Return the run of tensors that follow each other (``joined``)."""
        first = tensors[0]
        elements = sum(tensor.spec.elements for tensor in tensors)
        work_bytes = sum(tensor.route.work_bytes for tensor in tensors)
        route = replace(first.route, view_shape=(elements,), part_rows=elements, work_bytes=work_bytes)
        return cls(
            spec=TensorSpec(first.name, (elements,), first.spec.dtype),
            merged=(OutputTensor(first.name, first.out_dtype, (elements,)),),
            scalings=first.scalings,
            base=StoredRun.of([tensor.base for tensor in tensors]),
            experts=tuple(map(StoredRun.of, zip(*(tensor.experts for tensor in tensors), strict=True))),
            pairs=(),
            weights=first.weights,
            shard=first.shard,
            rounding_seed=None,
            reason=first.reason,
            route=route,
            flops=sum(tensor.flops for tensor in tensors),
            experts_are_deltas=first.experts_are_deltas,
            tensors=tuple(tensors),
            is_apart=not _is_linear(first),
        )


def joined(
    tensors: Iterable[TensorPlan], writers: Writers, budget: Budget, together_bytes: int
) -> Iterator[TensorPlan]:
    """Yield the tensors in their order, but as a ``TensorRun`` those that are small and can be merged as one."""
    most_work_bytes = max(RUN_WORK_BYTES, together_bytes)
    run: list[TensorPlan] = []
    # Of the run: what its tensors have in common, where its last one lies, how many elements it has and may have.
    way, places, elements, most_elements, work_bytes = None, [], 0, 0, 0
    for tensor in tensors:
        own_way, own_elements = _way(tensor), tensor.spec.elements
        own_places = [] if own_way is None else _places(tensor, writers)
        if (
            way is not None
            and way == own_way
            and elements + own_elements <= most_elements
            and work_bytes + tensor.route.work_bytes <= most_work_bytes
            and len(run) < RUN_TENSORS
            and all(map(_is_next, places, repeat(run[-1].spec.elements), own_places))
        ):
            run.append(tensor)
            places, elements, work_bytes = own_places, elements + own_elements, work_bytes + tensor.route.work_bytes
            continue
        if run:
            yield _as_one(run)
        run, way, places, elements = [tensor], own_way, own_places, own_elements
        most_elements, work_bytes = 0 if way is None else _most_elements(tensor, budget), tensor.route.work_bytes
    if run:
        yield _as_one(run)


def _most_elements(tensor: TensorPlan, budget: Budget) -> int:
    """Return how many elements of tensors like this one a run may have."""
    elements = tensor.spec.elements
    return min(
        min(RUN_BYTES, budget.part) * elements // tensor.read_bytes,
        budget.write_behind // 4 * elements // tensor.write_bytes,  # less than a room
        SUM_BLOCK_ELEMENTS,  # one part, and one block of its sums
    )


def _as_one(run: Sequence[TensorPlan]) -> TensorPlan:
    return run[0] if len(run) == 1 else TensorRun.of(run)


def _way(tensor: TensorPlan) -> tuple[Any, ...] | None:
    """Return what the tensors of a run have in common, but for their places in files; None where it is in no run."""
    if not tensor.spec.elements or tensor.pairs or tensor.rounding_seed is not None or len(tensor.merged) != 1:
        return None
    if not _is_linear(tensor):
        copies = (tensor.base, *tensor.experts)
        is_one_part = tensor.route.shares_blocks and tensor.route.part_rows >= tensor.spec.elements
        # Else they begin elsewhere in memory than each by itself does (``Bundle.places``).
        if not is_one_part or any(stored.start % stored.dtype.itemsize for stored in copies):
            return None
    return (
        type(tensor.route),
        tensor.route.method,
        tensor.weights,
        tensor.experts_are_deltas,
        len(tensor.experts),
        tensor.spec.dtype,
        tensor.out_dtype,
        tensor.scalings,
        tensor.shard,
    )


def _is_linear(tensor: TensorPlan) -> bool:
    """Return whether what is made of an element is the same, to its last digit, whatever comes with it.

    Of an ``Elementwise`` method that is not known: it may multiply by matrices.
    """
    if isinstance(tensor.route, Copied):
        return True
    kind = type(tensor.route.method)
    is_linear = issubclass(kind, Linear) and kind.rowwise is Linear.rowwise and kind.finish is Linear.finish
    return is_linear and isinstance(tensor.route, Rowwise)


def _places(tensor: TensorPlan, writers: Writers) -> list[StoredTensor]:
    """Return where a tensor lies in all files that are read and written."""
    files = [(writers[folder, tensor.shard], tensor.tensors_in(folder)[0].name) for folder in tensor.scalings]
    return [tensor.base, *tensor.experts, *[writer.tensors[name] for writer, name in files]]


def _is_next(before: StoredTensor, elements: int, stored: StoredTensor) -> bool:
    """Return whether a tensor comes next after one of so many elements."""
    dtype = stored.dtype
    is_same = before.dtype == dtype and (before.file is stored.file or before.file == stored.file)
    return is_same and before.start + elements * dtype.itemsize == stored.start


@dataclass(frozen=True)
class _RunBlock(RowBlock):
    """Hold the rows of a run, whose Δ_t the source measures tensor by tensor while it adds them up."""

    source: RunSource | None = None

    def sum(
        self, dtype: torch.dtype, out: Tensor | None = None, *, batch_dims: int = 0, largest: bool = True
    ) -> TaskSum:
        """Return the sum alone: what is seen of the Δ_t of each tensor is told by ``RunSource.sizes``."""
        assert self.source is not None
        assert not batch_dims
        assert not largest
        total = torch.empty(self.like.shape, dtype=dtype, device="cpu") if out is None else out
        self.source.add_up(self, total)
        none = torch.zeros(len(self.experts), dtype=torch.float64, device="cpu")
        return TaskSum(total, none, None, none.long())


class RunSource(FileSource):
    """Read a run, and measure the Δ_t of each of its tensors while they are added up."""

    wants_largest = False  # of the run

    def __init__(self, run: TensorRun, *given: Any) -> None:
        super().__init__(run, *given)
        self.run = run
        self._sizes = [tensor.spec.elements for tensor in run.tensors]
        self._ends = numpy.cumsum(self._sizes, dtype=numpy.int64)
        self._starts = self._ends - numpy.array(self._sizes, numpy.int64)
        # In memory that is a run's own.
        self._not_aligned = numpy.flatnonzero(self._starts * run.spec.dtype.itemsize % ALIGNMENT).tolist()
        self._last: RowBlock | None = None
        self._squares: list[Any] = []  # [tensors] for every task, in float64
        self._largest: list[Any] = []

    def blocks(self, tasks: Sequence[int] | None = None) -> Iterator[RowBlock]:
        for block in super().blocks(tasks):
            self._last = block
            yield _RunBlock(block.rows, block.experts, block.base, block.are_deltas, block.weights, self)

    def add_up(self, block: RowBlock, total: Tensor) -> None:
        """Write Σ_t Δ_t to ``total``, as ``ops.task_sum`` does, and measure the Δ_t of every tensor."""
        room, unweighted = torch.empty_like(total), replace(block, weights=None)
        parts_of_room = room.split(self._sizes)
        for task, weight in enumerate(block.weights or [1.0] * len(block.experts)):
            is_expert = block.are_deltas and block.experts[task].dtype == total.dtype
            delta = unweighted.delta(task, total.dtype, out=None if is_expert else room)
            parts = list(delta.split(self._sizes) if is_expert else parts_of_room)
            if not is_expert:
                # A product's last digits may depend on where it begins in memory: as it does for one tensor.
                for index in self._not_aligned:
                    parts[index] = parts[index].clone()
            self._measure(delta, parts)
            if task:
                total.add_(delta, alpha=weight)
            else:
                torch.mul(delta, weight, out=total)

    def sizes(self) -> list[dict[str, list[float]]] | None:
        """Return ``delta_sizes`` of every tensor, the same numbers as of it alone; None where one is not finite."""
        if not self._squares:
            return [{} for _ in self._ends]
        weights = numpy.abs(self._plan.weights or [1.0] * self.n_tasks)[:, None]
        squares, largest = numpy.stack(self._squares), numpy.stack(self._largest) * weights
        norms = _roots(numpy.where(squares == 0, squares, squares * numpy.square(weights)))
        if not (numpy.isfinite(norms).all() and numpy.isfinite(largest).all()):
            return None
        pairs = zip(norms.T.tolist(), largest.T.tolist(), strict=True)
        return [{"delta_norms": of_norms, "delta_largest": most} for of_norms, most in pairs]

    def checksums(self, count: int) -> Iterator[dict[StoredTensor, str]]:
        """Yield the checksums of each tensor's bytes in ``count`` of the copies, of which the base is the first."""
        assert self._last is not None
        assert self._last.base is not None
        copies = zip(self.run.copies, (self._last.base, *self._last.experts), strict=True)
        data = [(run, tensor_bytes(held)) for run, held in islice(copies, count)]
        for index, (start, end) in enumerate(zip(self._starts.tolist(), self._ends.tolist(), strict=True)):
            yield {
                run.tensors[index]: Checksum([held[start * run.dtype.itemsize : end * run.dtype.itemsize]]).text
                for run, held in data
            }

    def apart(self, checksums: InputChecksums) -> Iterator[tuple[TensorPlan, FileSource]]:
        """Yield each tensor with a source of its own, which has its part of what was read as one."""
        copies = self._take(self._ahead)
        given = (self._reader, self._readers, self.threads, self._budget, self.device, self._phase)
        for tensor, start, end in zip(self.run.tensors, self._starts.tolist(), self._ends.tolist(), strict=True):
            parts = [copy[start:end] for copy in copies]
            for stored, part in zip((tensor.base, *tensor.experts), parts, strict=True):
                checksums.add(whole(stored), part.view(torch.uint8))
            yield tensor, FileSource(tensor, _Held(parts), *given)

    def one_by_one(self, checksums: InputChecksums) -> Generator[tuple[TensorPlan, FileSource]]:
        """Yield each tensor with a source of its own, which reads it anew."""
        bundles = (bundle for tensor in self.run.tensors for bundle in first_pass(tensor))
        with ReadAhead(
            self._reader, self._readers, bundles, budget_bytes=self._budget.reread, checksums=checksums
        ) as ahead:
            for tensor in self.run.tensors:
                first, given = FirstPass(ahead, tensor), (self.threads, self._budget, self.device, self._phase)
                yield tensor, FileSource(tensor, first, self._reader, self._readers, *given)
                first.close()

    def _measure(self, delta: Tensor, parts: Sequence[Tensor]) -> None:
        """Keep ‖·‖² and max |·| of the parts of a Δ_t, one a tensor."""
        with numpy.errstate(all="ignore"):
            most, least = (each.reduceat(delta.numpy(), self._starts) for each in (numpy.maximum, numpy.minimum))
            largest = numpy.maximum(numpy.abs(most), numpy.abs(least)).astype(numpy.float64)
            squares = torch.stack([torch.dot(part, part) for part in parts]).double().numpy()
            smallest = least_squares(self.dtype)
            if not (smallest <= squares.min() and squares.max() < numpy.inf):
                for index in numpy.flatnonzero(~((squares >= smallest) & numpy.isfinite(squares))).tolist():
                    if largest[index] > 0:
                        squares[index] = float(sum_of_squares(parts[index]))
        self._squares.append(squares)
        self._largest.append(largest)


def _roots(squares: Any) -> Any:
    """Return the square roots of [tasks, tensors], of each tensor as they are taken of it alone.

    By torch, whose roots are not all the nearest numbers, as numpy's are; and each from memory that begins alike. There
    is a gap after each, so that torch takes the roots of one tensor after those of the other.
    """
    tasks, tensors = squares.shape
    step = ALIGNMENT // squares.itemsize
    places = torch.zeros(tensors, (tasks // step + 1) * step, dtype=torch.float64, device="cpu")[:, :tasks]
    places[:] = torch.from_numpy(squares).mT
    return places.sqrt_().mT.numpy()


class _Held:
    """Hand out one bundle, which is there: a ``Bundles``."""

    def __init__(self, parts: list[Tensor]) -> None:
        self._parts = parts

    def take(self) -> list[Tensor]:
        return self._parts


class RunWriter:
    """Write a run into one file, tensor by tensor as far as checksums go: what a sink needs of a ``ShardWriter``."""

    def __init__(self, writer: ShardWriter, names: Sequence[str]) -> None:
        self._writer, self._names = writer, names

    def position(self, name: str, first: int) -> int:
        del name
        return self._writer.position(self._names[0], first)

    def write_part(self, name: str, value: Tensor, first: int) -> None:
        del name
        assert first == 0
        self._writer.write_run(self._names, value)

    def finish(self, name: str) -> str:
        return self._writer.finish(name)
