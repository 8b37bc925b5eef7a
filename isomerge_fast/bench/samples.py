"""Make tensors like those of a plan, and merge them from memory as the engine does from files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.io.write_behind import ROOM_SHARE
from ..errors import ConfigError
from ..execution.sinks import FileSink
from ..machine import memory_bytes
from ..methods import MemoryDeltas, Method, RowBlock, TensorSpec
from ..methods.source import Factors, MemoryFactors, Threads
from ..planning.plan import Plan, TensorPlan
from ..planning.routes import Stacked
from .problems import deltas_like_fine_tuning

# Smaller sizes tell little of larger ones. Iso-C of square matrices went through 62 GFLOP/s of ``Method.flops`` at
# a side of 256, 92 at 384, 110 at 512, 114 to 126 from 768 on (one thread of a Xeon); and the solvers search for
# subspaces from 256 columns on. Passes over less than a few parts a thread are all overhead.
SMALLEST_SIDE, SMALLEST_ELEMENTS = 512, 1 << 21
# Share of the memory that this process may use, for made-up weights and their merge.
MEMORY_SHARE = 0.25
MEASURED = "measured"


class _Unwritten:
    """Take writes and drop them: every room is the same memory."""

    def __init__(self, budget_bytes: int) -> None:
        self.room_bytes = budget_bytes // ROOM_SHARE
        self._memory = torch.empty(self.room_bytes, dtype=torch.uint8, device="cpu")

    def room(self, size: int) -> Tensor | None:
        return self._memory[:size] if size <= self.room_bytes else None

    def put(self, action: Callable[[], None], *, size: int = 0, room: Tensor | None = None) -> None:
        pass


class _Held(MemoryDeltas):
    """Give copies that a route holds: they are read once."""

    passed_bytes, wants_largest = 0, True


class _Walked(_Held):
    """Give copies that a route does not hold: their bytes are counted at every pass."""

    def blocks(self, tasks: Sequence[int] | None = None) -> Iterator[RowBlock]:
        for block in super().blocks(tasks):
            self.passed_bytes += block.like.nbytes + sum(expert.nbytes for expert in block.experts)
            yield block


class _Factors(MemoryFactors):
    """Give factors, or none, beside a base that is read once."""

    passed_bytes = 0


@dataclass(frozen=True)
class Size:
    """Hold a tensor's shape with every side divided by ``divisor``, and its share of the whole tensor's time."""

    divisor: int
    shape: tuple[int, ...]
    share: float

    @property
    def timed(self) -> str:
        """Return how the table names this size."""
        return MEASURED if self.divisor == 1 else f"scaled from {' x '.join(map(str, self.shape))}"


def sizes_of(tensor: TensorPlan, device: torch.device) -> list[Size]:
    """Return the sizes at which a tensor may be timed, the smallest first, the whole tensor last.

    ``share`` is the ratio of ``Method.flops``; for linear methods and copies, which are passes over the elements, that
    of the elements. Sizes for which another solver would be chosen are left out.
    """
    method, tasks, shape = tensor.method, tensor.tasks, tensor.base.shape
    sizes = [Size(1, shape, 1.0)]
    if not shape or 0 in shape or tensor.pairs:  # factors are quick at any size
        return sizes
    divisor = 2
    while True:
        small = tuple(max(1, side // divisor) for side in shape)
        share = prod(small) / prod(shape)
        if method is None or method.any_shape:
            if prod(small) < SMALLEST_ELEMENTS:
                break
        else:
            if min(small) < SMALLEST_SIDE or _solver(tensor, small, device) != _solver(tensor, shape, device):
                break
            share = method.flops(replace(tensor.spec, shape=small), tasks) / method.flops(tensor.spec, tasks)
        sizes.append(Size(divisor, small, share))
        divisor *= 2
    return sizes[::-1]


def method_at(tensor: TensorPlan, shape: tuple[int, ...]) -> Method | None:
    """Return the tensor's method for a smaller shape; a ceiling on its memory shrinks with the elements."""
    if tensor.method is None or tensor.method.ceiling is None:
        return tensor.method
    return tensor.method.within(int(tensor.method.ceiling * prod(shape) / max(1, prod(tensor.base.shape))))


def _solver(tensor: TensorPlan, shape: tuple[int, ...], device: torch.device) -> str:
    method = method_at(tensor, shape)
    if method is None:
        return ""
    spec = replace(tensor.spec, shape=shape)
    try:
        method.check(spec, tensor.tasks)
    except ConfigError:
        return "none"
    return method.explain(spec, tensor.tasks, device).partition(":")[0]


class Sample:
    """Make a tensor like a planned one, of a given size, and merge it; ``at_once`` of them, of a stack."""

    def __init__(
        self, tensor: TensorPlan, size: Size, plan: Plan, device: torch.device, workers: Threads, at_once: int = 1
    ) -> None:
        self._tensor, self._workers, self._at_once = tensor, workers, at_once
        self._method = method_at(tensor, size.shape)
        whole = tensor.route
        view_shape = size.shape if len(whole.view_shape) == len(size.shape) > 1 else (prod(size.shape),)
        # Parts of as many bytes as the engine's.
        longer = prod(whole.view_shape[1:]) / max(1, prod(view_shape[1:]))
        rows = min(max(1, int(whole.part_rows * longer)), max(1, view_shape[0]))
        self._route = replace(whole, view_shape=view_shape, part_rows=rows, method=self._method)
        self._source = self._source_of([copy.reshape(view_shape) for copy in self._make(size.shape, device)], device)
        self._writes: Any = _Unwritten(plan.budget.write_behind)

    def _source_of(self, copies: list[Tensor], device: torch.device) -> _Factors | _Held:
        tensor, rows = self._tensor, self._route.part_rows
        base, *experts = copies
        if not experts:
            factors = list(self._make_factors(device))
            return _Factors(factors, base, dtype=tensor.spec.dtype, block_rows=rows)
        source = (_Held if self._route.holds_copies else _Walked)(
            experts,
            base,
            are_deltas=tensor.experts_are_deltas,
            weights=tensor.weights,
            dtype=tensor.spec.dtype,
            block_rows=None if self._route.holds_copies else rows,
        )
        source.threads = self._workers
        return source

    def _make(self, shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
        """Return the base and the experts as they would be stored."""
        stored = [copy.dtype for copy in (self._tensor.base, *self._tensor.experts)]
        if not stored[0].is_floating_point:
            return [torch.zeros(shape, dtype=stored[0], device=device)]
        generator = torch.Generator(device=device).manual_seed(0)
        base = 0.02 * torch.randn(shape, generator=generator, device=device)
        copies = [base.to(stored[0])]
        spectral = self._method is not None and not self._method.any_shape and len(stored) > 1
        rows, columns = shape if spectral else (0, 0)
        deltas = deltas_like_fine_tuning(rows, columns, len(stored) - 1, device=device) if spectral else []
        for index, dtype in enumerate(stored[1:]):
            delta = deltas[index] if spectral else 0.002 * torch.randn(shape, generator=generator, device=device)
            copies.append((delta if self._tensor.experts_are_deltas else base + delta).to(dtype))
        return copies

    def _make_factors(self, device: torch.device) -> Iterator[Factors | None]:
        generator = torch.Generator(device=device).manual_seed(0)
        for pair in self._tensor.pairs:
            if pair is None:
                yield None
                continue
            rows, columns = pair.shape
            left = 0.02 * torch.randn(rows, pair.rank, generator=generator, device=device)
            yield Factors(left, torch.randn(pair.rank, columns, generator=generator, device=device))

    def merge(self) -> tuple[str, int]:
        """Merge by the engine's own code, without files; return the algorithm and the bytes of all passes."""
        # Of files that are not written: another call than this one would be an AttributeError.
        writers: Any = dict.fromkeys(self._tensor.scalings, SimpleNamespace(position=lambda name, first: 0))
        planned = replace(self._tensor, route=self._route)
        output = FileSink(planned, writers, self._writes, self._workers, lambda _: nullcontext())
        before = self._source.passed_bytes
        if isinstance(self._route, Stacked):
            sources = [self._source] * self._at_once
            algorithm = self._route.run_all(sources, [output] * self._at_once)[0].algorithm
        else:
            algorithm = self._route.run(self._source, output).algorithm
        return algorithm, self._source.passed_bytes - before


def sample_bytes(tensor: TensorPlan, size: Size, device: torch.device) -> int:
    """Return the peak of a ``Sample`` and its merge: the copies, the float32 deltas they are made of, and the work."""
    each = sum(copy.dtype.itemsize for copy in (tensor.base, *tensor.experts)) + 4 * (1 + len(tensor.experts))
    method = method_at(tensor, size.shape)
    spec: TensorSpec = replace(tensor.spec, shape=size.shape)
    work = 0
    if method is not None and not method.any_shape and not tensor.pairs:
        work = method.workspace_bytes(spec, tensor.tasks, device)
    return prod(size.shape) * each + work + tensor.route.work_bytes // size.divisor**2


def memory_for_samples(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return int(MEMORY_SHARE * memory_bytes())
