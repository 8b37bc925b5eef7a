"""Merge matrices of one shape as stacks on a GPU: a stack is read as one, and each of its tensors written by itself."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.io.read_ahead import Bundle, InputChecksums, ReadAhead
from ..checkpoint.io.reader import Reader
from ..methods.source import Threads
from ..planning.budget import Budget
from ..planning.plan import TensorPlan
from ..planning.routes import Stacked
from .device_copies import Uploads
from .sources import FileSource, Phase, first_pass


@dataclass(frozen=True, slots=True)
class TensorStack:
    """Hold the plans of tensors that are merged together, of one kind and no more than their stacks have places."""

    tensors: tuple[TensorPlan, ...]

    @property
    def name(self) -> str:
        return self.tensors[0].name

    @property
    def moved_bytes(self) -> int:
        return sum(tensor.moved_bytes for tensor in self.tensors)

    @property
    def route(self) -> Stacked:
        route = self.tensors[0].route
        assert isinstance(route, Stacked)
        return route

    def bundle(self) -> Bundle:
        """Return all copies of all tensors, to be read at once."""
        return Bundle(tuple(piece for tensor in self.tensors for part in first_pass(tensor) for piece in part.pieces))


def stacked(tensors: Iterable[TensorPlan]) -> Iterator[TensorPlan | TensorStack]:
    """Yield the tensors in their order, but stacks where these are full, and at the end those that are not.

    So almost all are read in the order of the files.
    """
    waiting: dict[object, list[TensorPlan]] = {}
    for tensor in tensors:
        route = tensor.route
        if not isinstance(route, Stacked):
            yield tensor
            continue
        kind = route, tensor.spec.dtype, tensor.tasks
        members = waiting.setdefault(kind, [])
        members.append(tensor)
        if len(members) == route.places:
            yield TensorStack(tuple(waiting.pop(kind)))
    yield from (TensorStack(tuple(members)) for members in waiting.values())


class StackSource:
    """Read a stack, which comes next from ``uploads``: a source for every tensor, with its part of what was read."""

    def __init__(
        self,
        stack: TensorStack,
        uploads: Uploads,
        reader: Reader,
        readers: ThreadPoolExecutor,
        threads: Threads,
        budget: Budget,
        device: torch.device,
        phase: Phase,
    ) -> None:
        self.stack = stack
        self._reader, self._readers, self._budget, self._device = reader, readers, budget, device
        self._given = (reader, readers, threads, budget, device, phase)
        self._copies = _Copies(stack, uploads)
        self.members = [
            FileSource(plan, _Place(self._copies, index), *self._given) for index, plan in enumerate(stack.tensors)
        ]

    def one_by_one(self, checksums: InputChecksums) -> Generator[tuple[TensorPlan, FileSource]]:
        """Free all that is held, and yield each tensor with a source of its own, which reads it anew."""
        self.members = []
        self._copies.drop()
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
        with (
            ReadAhead(
                self._reader,
                self._readers,
                (bundle for tensor in self.stack.tensors for bundle in first_pass(tensor)),
                budget_bytes=self._budget.reread,
                part_bytes=self._budget.gpu_part,
                pinned=on_gpu,
                checksums=checksums,
            ) as ahead,
            Uploads(ahead, self._device) as uploads,
        ):
            for tensor in self.stack.tensors:
                yield tensor, FileSource(tensor, uploads, *self._given)


class _Copies:
    """Take all copies of a stack when those of the first tensor are asked for.

    (Not ``StackSource`` itself, which its members would then hold on to: a circle keeps a GPU's memory.)
    """

    def __init__(self, stack: TensorStack, uploads: Uploads) -> None:
        self._stack, self._uploads = stack, uploads
        self._are_taken = False
        self._of_tensors: list[list[Tensor]] = []

    def of(self, index: int) -> list[Tensor]:
        if not self._are_taken:
            taken = iter(self._uploads.take())
            self._are_taken = True
            self._of_tensors = [[next(taken) for _ in range(1 + plan.tasks)] for plan in self._stack.tensors]
        return self._of_tensors[index]

    def drop(self) -> None:
        """Free what was taken; where nothing was, read past it."""
        self._of_tensors = []
        if not self._are_taken:
            self._uploads.skip()
            self._are_taken = True


class _Place:
    """Hand out the copies of one tensor of a stack: a ``Bundles``."""

    def __init__(self, copies: _Copies, index: int) -> None:
        self._copies, self._index = copies, index

    def take(self) -> list[Tensor]:
        return self._copies.of(self._index)
