"""Merge small tensors that lie one after the other, in every file, as one vector: the same bytes in less time.

So a buffer, a reading, 60 calls of torch and a write are needed once a run, not once a tensor. 4,096 tensors of 768
weights with four experts took 1.0 to 1.2 ms of a core each, and 0.16 to 0.31 in runs (beside busy processes).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import add, le
from typing import Any

import numpy
import torch
from torch import Tensor

from ..checkpoint.io.checksum import Checksum
from ..checkpoint.io.read_ahead import InputChecksums, ReadAhead
from ..checkpoint.io.writer import ShardWriter, tensor_bytes
from ..checkpoint.layout import OutputTensor, StoredTensor
from ..methods import Linear, RowBlock, TensorSpec
from ..ops import SUM_BLOCK_ELEMENTS, least_squares, sum_of_squares
from ..planning.budget import Budget
from ..planning.plan import TensorPlan
from ..planning.routes import Copied, Rowwise
from .sources import FileSource, FirstPass, first_pass

# All copies of a run: no more than a part of the smallest budget.
RUN_BYTES = 2 << 20
# Of a run, whose reports and journal entries are held at once, as objects. (136 took a tenth less time.)
RUN_TENSORS = 64
# What a run takes beside its copies, where its tensors one by one take less and were planned for. The buffers of the
# threads that read have more, which small tensors leave unused (``budget.PROCESS_BYTES``).
RUN_WORK_BYTES = 4 << 20
# Of memory that torch allocates.
ALIGNMENT = 64

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
        )


def joined(
    tensors: Iterable[TensorPlan], writers: Writers, budget: Budget, together_bytes: int
) -> Iterator[TensorPlan]:
    """Yield the tensors in their order, but as a ``TensorRun`` those that are small and can be merged as one."""
    most = (
        min(RUN_BYTES, budget.part),
        budget.write_behind // 4,  # less than a room
        max(RUN_WORK_BYTES, together_bytes),
        SUM_BLOCK_ELEMENTS,  # one part, and one block of its sums
        RUN_TENSORS,
    )
    run: list[TensorPlan] = []
    total = [0] * len(most)
    way = None  # of the run
    for tensor in tensors:
        own = (tensor.read_bytes, tensor.write_bytes, tensor.route.work_bytes, tensor.spec.elements, 1)
        total = list(map(add, total, own))
        if all(map(le, total, most)) and way is not None and way == _way(tensor) and _follow(run[-1], tensor, writers):
            run.append(tensor)
            continue
        if run:
            yield _as_one(run)
        run, total, way = [tensor], list(own), _way(tensor)
    if run:
        yield _as_one(run)


def _as_one(run: Sequence[TensorPlan]) -> TensorPlan:
    return run[0] if len(run) == 1 else TensorRun.of(run)


def _way(tensor: TensorPlan) -> tuple[Any, ...] | None:
    """Return what the tensors of a run have in common, but for their places in files.

    None where what is made of an element may differ, in its last digit, by what comes with it. Of an ``Elementwise``
    method that is not known: it may multiply by matrices.
    """
    if not tensor.spec.elements or tensor.pairs or tensor.rounding_seed is not None or len(tensor.merged) != 1:
        return None
    method = tensor.route.method
    if isinstance(tensor.route, Rowwise):
        kind = type(method)
        if not (issubclass(kind, Linear) and kind.rowwise is Linear.rowwise and kind.finish is Linear.finish):
            return None
    elif not isinstance(tensor.route, Copied):
        return None
    return (
        type(tensor.route),
        method,
        tensor.weights,
        tensor.experts_are_deltas,
        len(tensor.experts),
        tensor.spec.dtype,
        tensor.out_dtype,
        tensor.scalings,
        tensor.shard,
    )


def _follow(before: TensorPlan, tensor: TensorPlan, writers: Writers) -> bool:
    """Return whether a tensor comes next after another one, in all files that are read and written."""
    return (
        _is_next(before.base, tensor.base)
        and all(map(_is_next, before.experts, tensor.experts))
        and all(
            _is_next(
                *(writers[folder, tensor.shard].tensors[plan.tensors_in(folder)[0].name] for plan in (before, tensor))
            )
            for folder in tensor.scalings
        )
    )


def _is_next(before: StoredTensor, stored: StoredTensor) -> bool:
    is_same = before.file is stored.file or before.file == stored.file
    return is_same and before.dtype == stored.dtype and before.end == stored.start


class RunSource(FileSource):
    """Read a run, and measure the Δ_t of each of its tensors while it is passed over."""

    wants_largest = False  # of the run

    def __init__(self, run: TensorRun, *given: Any) -> None:
        super().__init__(run, *given)
        self.run = run
        self._sizes = [tensor.spec.elements for tensor in run.tensors]
        self._ends = numpy.cumsum(self._sizes, dtype=numpy.int64)
        self._starts = self._ends - numpy.array(self._sizes, numpy.int64)
        self._last: RowBlock | None = None
        self._squares: list[Any] = []  # [tensors] for every task, in float64
        self._largest: list[Any] = []

    def blocks(self, tasks: Sequence[int] | None = None) -> Iterator[RowBlock]:
        for block in super().blocks(tasks):
            self._last = block
            self._measure(replace(block, weights=None))
            yield block

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

    def _measure(self, block: RowBlock) -> None:
        with numpy.errstate(all="ignore"):
            for task, expert in enumerate(block.experts):
                delta = block.delta(task, self.dtype)
                most, least = (each.reduceat(delta.numpy(), self._starts) for each in (numpy.maximum, numpy.minimum))
                largest = numpy.maximum(numpy.abs(most), numpy.abs(least)).astype(numpy.float64)
                parts = list(delta.split(self._sizes))
                if delta.data_ptr() != expert.data_ptr():
                    # A product's last digits may depend on where it begins in memory: as it does for one tensor.
                    for index in numpy.flatnonzero(self._starts * delta.itemsize % ALIGNMENT):
                        parts[index] = parts[index].clone()
                squares = torch.stack([torch.dot(part, part) for part in parts]).double().numpy()
                for index in numpy.flatnonzero(~((squares >= least_squares(self.dtype)) & numpy.isfinite(squares))):
                    if largest[index] > 0:
                        squares[index] = float(sum_of_squares(parts[index]))
                self._squares.append(squares)
                self._largest.append(largest)


def _roots(squares: Any) -> Any:
    """Return the square roots of [tasks, tensors], of each tensor as they are taken of it alone.

    By torch, whose roots are not all the nearest numbers, as numpy's are, and each from memory that begins alike.
    """
    tasks, tensors = squares.shape
    step = ALIGNMENT // squares.itemsize
    places = torch.zeros(tensors, -(-tasks // step) * step, dtype=torch.float64, device="cpu")[:, :tasks]
    places[:] = torch.from_numpy(squares).mT
    return torch.stack([place.sqrt() for place in places]).mT.numpy()


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
