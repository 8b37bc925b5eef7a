"""Make the deltas of one planned tensor from what is read ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoint.io.read_ahead import Bundle, Lease, ReadAhead
from ..checkpoint.io.reader import Piece, Reader, whole
from ..methods import DeltaSource, RowBlock
from ..methods.source import Factors, Threads
from ..planning.budget import Budget
from ..planning.plan import TensorPlan
from .device_copies import Uploads
from .malloc import trim_heap

Phase = Callable[[str], AbstractContextManager[None]]


def bundle_of(plan: TensorPlan, rows: slice, experts: Sequence[int]) -> Bundle:
    """Return some rows of the base and of some experts, to be read at once."""
    row_shape = plan.route.view_shape[1:]
    shape = (rows.stop - rows.start, *row_shape)
    stored = [plan.base, *(plan.experts[index] for index in experts)]
    return Bundle(tuple(Piece(each, rows.start * prod(row_shape), shape) for each in stored))


def first_pass(plan: TensorPlan) -> Iterator[Bundle]:
    """Yield what is read ahead of a tensor, since every route reads it: the factors of an adapter, then the base."""
    if plan.factors:
        yield Bundle(tuple(whole(stored) for stored in plan.factors))
    for rows in plan.route.readings():
        yield bundle_of(plan, rows, range(len(plan.experts)))


class Bundles(Protocol):
    """Hand out bundles in order, each valid until the next one is taken."""

    def take(self) -> list[Tensor]:
        """Return the next one."""
        ...


class FirstPass:
    """Hand out the bundles of one tensor's first pass, to any one thread, while others wait for theirs; a ``Bundles``.

    They are the next ones of ``ahead``, so those of the tensor that follows can be taken when these ``are_taken``.
    """

    def __init__(self, ahead: ReadAhead, plan: TensorPlan, taken: Callable[[], None] = lambda: None) -> None:
        self._ahead, self._taken = ahead, taken
        self._left = sum(1 for _ in first_pass(plan))
        self._fetched: deque[Lease] = deque()
        self._held: Lease | None = None

    @property
    def are_taken(self) -> bool:
        return not self._left

    def fetch(self) -> None:
        """Take them all, before they are asked for."""
        while self._left:
            self._fetched.append(self._next())

    def take(self) -> list[Tensor]:
        self._give_back()
        self._held = self._fetched.popleft() if self._fetched else self._next()
        return self._held.tensors

    def close(self) -> None:
        """Give back all that was taken."""
        self._give_back()
        while self._fetched:
            self._fetched.popleft().give_back()

    def _next(self) -> Lease:
        lease = self._ahead.lease()
        self._left -= 1
        if not self._left:
            self._taken()
        return lease

    def _give_back(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.give_back()


class PlannedSource(DeltaSource):
    """Read one planned tensor, its first pass from ``ahead``, where the bundles of ``first_pass`` come next.

    Later passes are read through ``reader`` by the pool ``readers``, in parts of ``budget``; ``threads`` share out the
    computing, ``phase`` is ``PhaseTimer.phase``.
    """

    wants_largest = True

    def __init__(
        self,
        plan: TensorPlan,
        ahead: Bundles,
        reader: Reader,
        readers: ThreadPoolExecutor,
        threads: Threads,
        budget: Budget,
        device: torch.device,
        phase: Phase,
    ) -> None:
        spec, shape = plan.spec, plan.route.view_shape
        super().__init__(plan.tasks, shape, spec.dtype, device, spec)
        self.threads = threads
        self._plan, self._ahead, self._phase = plan, ahead, phase
        self._reader, self._readers, self._budget = reader, readers, budget
        self._to_take = sum(1 for _ in first_pass(plan))
        self._read: list[Tensor] = []  # taken last
        self._held: list[Tensor] | None = None
        self.read_bytes = 0

    def _take(self, ahead: Bundles) -> list[Tensor]:
        with self._phase("read"):
            self._read = []  # the next may need its room
            self._read = ahead.take()
            self._to_take -= ahead is self._ahead
            self.read_bytes += sum(tensor.nbytes for tensor in self._read)
            # No copy: they are there. But with one thread glibc fills two arenas more, 130 MB, unless torch is called.
            return [tensor.to(self.device) for tensor in self._read]


class FactorSource(PlannedSource):
    """Read a tensor whose deltas are given as factors: these first, then the base part by part, each once."""

    def factors(self) -> list[Factors | None]:
        """Return the factors of every task, valid until the first of ``blocks``; None where a task has none."""
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

    def blocks(self, tasks: Sequence[int] | None = None) -> Iterator[RowBlock]:
        assert tasks is not None
        assert not tasks
        for rows in self._plan.route.parts():
            (base,) = self._take(self._ahead)
            yield RowBlock(rows, (), base)


class FileSource(PlannedSource):
    """Read a tensor whose copies are in files; passes after the first have buffers of their own."""

    def blocks(self, tasks: Sequence[int] | None = None) -> Iterator[RowBlock]:
        chosen = range(self.n_tasks) if tasks is None else tasks
        if self._plan.route.holds_copies:
            held = self._hold()
            yield self._block(slice(0, self.shape[0]), [held[1 + task] for task in chosen], held[0], chosen)
        elif self._to_take:
            assert len(chosen) == self.n_tasks
            for rows in self._plan.route.parts():
                base, *experts = self._take(self._ahead)
                yield self._block(rows, experts, base, chosen)
        else:
            trim_heap()
            bundles = (bundle_of(self._plan, rows, chosen) for rows in self._plan.route.parts())
            with (
                ReadAhead(
                    self._reader,
                    self._readers,
                    bundles,
                    budget_bytes=self._budget.reread,
                    part_bytes=self._budget.gpu_part,
                    pinned=self.device.type == "cuda",
                ) as again,
                Uploads(again, self.device) as uploads,
            ):
                for rows in self._plan.route.parts():
                    base, *experts = self._take(uploads)
                    yield self._block(rows, experts, base, chosen)

    def start_over(self) -> None:
        """Free the copies that are held, and read past the rest of the first pass: the next tensor comes after it."""
        self._held = None
        if not self._plan.route.holds_copies:
            while self._to_take:
                self._take(self._ahead)

    def _block(self, rows: slice, experts: Sequence[Tensor], base: Tensor, tasks: Sequence[int]) -> RowBlock:
        weights = self._plan.weights
        chosen = None if weights is None else [weights[task] for task in tasks]
        return RowBlock(rows, experts, base, self._plan.experts_are_deltas, chosen)

    def _hold(self) -> list[Tensor]:
        if self._held is None:
            self._held = self._take(self._ahead) if self._to_take else self._read
        return self._held
