"""The copies of one planned tensor as methods want them, made of what is read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from . import ops
from .checkpoint.read_ahead import Bundle, ReadAhead
from .checkpoint.reader import Piece, Reader, whole
from .heap import trim_heap
from .methods import RowBlock, TensorSpec
from .methods.factors import Factors
from .plan import TensorPlan
from .routes import RESIDENT, Budget
from .transfers import Uploads
from .workers import Workers, parts_of

Result = TypeVar("Result")
Phase = Callable[[str], AbstractContextManager[None]]


def bundle_of(plan: TensorPlan, rows: slice, experts: Sequence[int]) -> Bundle:
    """The given rows of the base and of some experts."""
    row_shape = plan.route.lines[1:]
    shape = (rows.stop - rows.start, *row_shape)
    stored = [plan.base, *(plan.experts[index] for index in experts)]
    return Bundle(tuple(Piece(each, rows.start * prod(row_shape), shape) for each in stored))


def first_pass(plan: TensorPlan) -> Iterator[Bundle]:
    """What is read of a tensor in any case, and therefore ahead: the factors of an adapter before the base."""
    if plan.factors:
        yield Bundle(tuple(whole(stored) for stored in plan.factors))
    for rows in plan.route.readings() if plan.route.reads_base else ():
        yield bundle_of(plan, rows, range(len(plan.experts)))


class PlannedSource:
    """One planned tensor, the bundles of whose first pass come next in ``ahead``, and threads to share it out among."""

    def __init__(self, plan: TensorPlan, ahead: Uploads, workers: Workers, device: torch.device, phase: Phase) -> None:
        self._plan, self._ahead, self._workers, self._phase = plan, ahead, workers, phase
        self.device = device
        self._to_take = sum(1 for _ in first_pass(plan))
        self._read: list[Tensor] = []  # taken last
        self.read_bytes = 0

    @property
    def name(self) -> str:
        return self._plan.name

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._plan.route.lines)

    @property
    def dtype(self) -> torch.dtype:
        return self._plan.spec.dtype

    def parts(self, block: RowBlock) -> list[RowBlock]:
        """A block in parts for one thread each; on a GPU it stays one."""
        if self.device.type != "cpu":
            return [block]
        return [block.part(rows) for rows in parts_of(block.rows, self._plan.route.lines)]

    def share_out(self, action: Callable[[RowBlock], Result], parts: Sequence[RowBlock]) -> list[Result]:
        """What ``action`` makes of every part, in order."""
        return self._workers.map(action, parts)

    def _take(self, ahead: Uploads) -> list[Tensor]:
        with self._phase("read"):
            self._read = []  # the next may need its room
            self._read = ahead.take()
            self._to_take -= ahead is self._ahead
            self.read_bytes += sum(tensor.nbytes for tensor in self._read)
            # No copy: they are there. But with one thread glibc fills two arenas more, 130 MB, unless torch is called.
            return [tensor.to(self.device) for tensor in self._read]


class FactorSource(PlannedSource):
    """A tensor whose deltas are given as factors: these first, then the base part by part, each once."""

    def factors(self) -> list[Factors | None]:
        """Of every task, valid until the first of ``base_blocks``; None where it leaves the tensor alone."""
        read = iter(self._take(self._ahead))
        weights = self._plan.weights or (1.0,) * self._plan.tasks
        found: list[Factors | None] = []
        for pair, weight in zip(self._plan.pairs, weights, strict=True):
            if pair is None:
                found.append(None)
                continue
            a, b = next(read), next(read)
            left, right = (a.mT, b.mT) if pair.transposed else (b, a)
            found.append(Factors(left, right, pair.scale * weight))
        return found

    def base_blocks(self) -> Iterator[RowBlock]:
        """Rows of the base alone, in the parts that are written."""
        for rows in self._plan.route.parts():
            (base,) = self._take(self._ahead)
            yield RowBlock(rows, (), base)


class TensorSource(PlannedSource):
    """``methods.Deltas`` and ``methods.RowSource`` of one planned tensor.

    The first pass over it is taken from ``ahead``; what is read later has buffers of its own.
    """

    def __init__(
        self,
        plan: TensorPlan,
        ahead: Uploads,
        reader: Reader,
        threads: ThreadPoolExecutor,
        workers: Workers,
        budget: Budget,
        device: torch.device,
        phase: Phase,
    ) -> None:
        super().__init__(plan, ahead, workers, device, phase)
        self._reader, self._threads, self._budget = reader, threads, budget
        self._held: list[Tensor] | None = None

    @property
    def n_tasks(self) -> int:
        return len(self._plan.experts)

    @property
    def origin(self) -> TensorSpec:
        return self._plan.spec

    def blocks(self) -> Iterator[RowBlock]:
        """See ``methods.RowSource``."""
        return self.passes(range(self.n_tasks))

    def base_blocks(self) -> Iterator[RowBlock]:
        """Rows of the base alone, in the parts that are written."""
        if self._plan.route.name == RESIDENT:
            base = self._hold()[0]
            return (RowBlock(rows, (), base[rows]) for rows in self._plan.route.parts())
        return self.passes(())

    def passes(self, tasks: Sequence[int]) -> Iterator[RowBlock]:
        """Rows of the base and of some experts, in order. A first pass has to be over all of them."""
        if self._plan.route.name == RESIDENT:
            held = self._hold()
            yield self._block(slice(0, self.shape[0]), [held[1 + task] for task in tasks], held[0], tasks)
        elif self._to_take:
            assert len(tasks) == self.n_tasks
            for rows in self._plan.route.parts():
                base, *experts = self._take(self._ahead)
                yield self._block(rows, experts, base, tasks)
        else:
            trim_heap()
            bundles = (bundle_of(self._plan, rows, tasks) for rows in self._plan.route.parts())
            with (
                ReadAhead(
                    self._reader,
                    self._threads,
                    bundles,
                    budget_bytes=self._budget.again,
                    part_bytes=self._budget.cut,
                    pinned=self._on_gpu,
                ) as again,
                Uploads(again, self.device) as uploads,
            ):
                for rows in self._plan.route.parts():
                    base, *experts = self._take(uploads)
                    yield self._block(rows, experts, base, tasks)

    def start_over(self) -> None:
        """Begin again after a failure. What was left of a first pass is passed over; what is held is held no more."""
        self._held = None
        if self._plan.route.name != RESIDENT:
            while self._to_take:
                self._take(self._ahead)

    def delta(self, task: int) -> Tensor:
        """See ``methods.Deltas``."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)

        def subtract(part: RowBlock) -> None:
            part.delta(0, self.dtype, out=out[part.rows])

        for block in self.passes([task]):
            self.share_out(subtract, self.parts(block))
        return out

    def sum(self, dtype: torch.dtype, batch_dims: int = 0) -> ops.TaskSum:
        """See ``methods.Deltas``."""
        if batch_dims:
            raise ValueError("deltas of a checkpoint are single tensors, not a batch")
        total = torch.empty(self.shape, dtype=dtype, device=self.device)

        def add_up(part: RowBlock) -> ops.TaskSum:
            return part.sum(dtype, out=total[part.rows])

        seen = [found for block in self.blocks() for found in self.share_out(add_up, self.parts(block))]
        return ops.TaskSum(
            total,
            torch.stack([part.squares for part in seen]).sum(0),
            torch.stack([part.largest for part in seen if part.largest is not None]).amax(0),
            torch.stack([part.nonfinite for part in seen]).sum(0),
        )

    def _block(self, rows: slice, experts: Sequence[Tensor], base: Tensor, tasks: Sequence[int]) -> RowBlock:
        weights = self._plan.weights
        chosen = None if weights is None else [weights[task] for task in tasks]
        return RowBlock(rows, experts, base, self._plan.experts_are_deltas, chosen)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _hold(self) -> list[Tensor]:
        if self._held is None:
            self._held = self._take(self._ahead) if self._to_take else self._read
        return self._held
