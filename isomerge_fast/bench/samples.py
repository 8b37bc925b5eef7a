"""Made-up tensors like those of a plan, merged as the engine merges them, from memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checkpoint.layout import DTYPES
from ..errors import ConfigError
from ..methods import Method, RowBlock, TensorSpec
from ..methods.factors import Factors, merge_factors
from ..plan import Plan, TensorPlan
from ..routes import ADAPTER, BY_ROWS, RESIDENT, Route
from ..workers import Workers, parts_of
from .problems import deltas_like_fine_tuning

# Below these a size says little of larger ones. Iso-C of square matrices went through 62 GFLOP/s of ``Method.flops`` at
# a side of 256, 92 at 384, 110 at 512, 114 to 126 from 768 on (one thread of a Xeon); and the solvers search for
# subspaces from 256 columns on. Passes over less than a few parts a thread are all overhead.
SMALLEST_SIDE, SMALLEST_ELEMENTS = 512, 1 << 21
# Of the machine's memory for made-up weights and what is made of them.
MEMORY_SHARE = 0.25
MEASURED = "measured"


class HeldCopies:
    """``methods.Deltas`` and ``methods.DeltaSource`` of copies in memory, walked and shared out as the engine does.

    Args:
        copies: the base, then the experts, on the device that computes, in the shape of ``route.lines``.
        are_deltas: whether the experts are Δ_t themselves.
        dtype: the compute dtype.
    """

    def __init__(
        self, route: Route, copies: Sequence[Tensor], are_deltas: bool, dtype: torch.dtype, workers: Workers
    ) -> None:
        self._route, self._base, self._experts, self._are_deltas = route, copies[0], list(copies[1:]), are_deltas
        self._workers = workers
        self.dtype, self.device = dtype, copies[0].device
        self.passed_bytes = 0

    @property
    def n_tasks(self) -> int:
        return len(self._experts)

    @property
    def shape(self) -> torch.Size:
        return self._base.shape

    @property
    def origin(self) -> TensorSpec:
        return TensorSpec("", tuple(self.shape), self.dtype)

    def blocks(self) -> Iterator[RowBlock]:
        """See ``methods.DeltaSource``."""
        return self._passes(self._experts)

    def base_blocks(self) -> Iterator[RowBlock]:
        """Rows of the base alone, in the parts that are written."""
        for rows in self._route.parts():
            if self._route.name != RESIDENT:
                self.passed_bytes += self._base[rows].nbytes
            yield RowBlock(rows, (), self._base[rows], self._are_deltas)

    def delta(self, task: int) -> Tensor:
        """See ``methods.Deltas``."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)

        def subtract(part: RowBlock) -> None:
            part.delta(0, self.dtype, out=out[part.rows])

        for block in self._passes([self._experts[task]]):
            self.share_out(subtract, block)
        return out

    def sum(self, dtype: torch.dtype, batch_dims: int = 0) -> ops.TaskSum:
        """See ``methods.Deltas``."""
        assert batch_dims == 0
        total = torch.empty(self.shape, dtype=dtype, device=self.device)

        def add_up(part: RowBlock) -> ops.TaskSum:
            return part.sum(dtype, out=total[part.rows])

        seen = [found for block in self.blocks() for found in self.share_out(add_up, block)]
        return ops.TaskSum(
            total,
            torch.stack([part.squares for part in seen]).sum(0),
            torch.stack([part.largest for part in seen if part.largest is not None]).amax(0),
            torch.stack([part.nonfinite for part in seen]).sum(0),
        )

    def share_out(self, action: Callable[[RowBlock], Any], block: RowBlock) -> list[Any]:
        """What ``action`` makes of a block in parts for one thread each; on a GPU it stays one."""
        if self.device.type != "cpu":
            return [action(block)]
        return self._workers.map(action, [block.part(rows) for rows in parts_of(block.rows, self._route.lines)])

    def _passes(self, experts: Sequence[Tensor]) -> Iterator[RowBlock]:
        for rows in self._route.readings():
            taken = [expert[rows] for expert in experts]
            if self._route.name != RESIDENT:
                self.passed_bytes += self._base[rows].nbytes + sum(part.nbytes for part in taken)
            yield RowBlock(rows, taken, self._base[rows], self._are_deltas)


@dataclass(frozen=True)
class Size:
    """A tensor's shape with every side divided by ``divisor``, and what merging that takes of the time of the whole."""

    divisor: int
    shape: tuple[int, ...]
    share: float

    @property
    def timed(self) -> str:
        """As the table has it."""
        return MEASURED if self.divisor == 1 else f"scaled from {' x '.join(map(str, self.shape))}"


def sizes_of(tensor: TensorPlan, device: torch.device) -> list[Size]:
    """The sizes at which a tensor may be timed, the smallest first, itself last.

    ``share`` is the ratio of ``Method.flops``; of the elements for linear methods and copies, which are passes over
    them. A size where another solver would be taken is none.
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
    """The tensor's method for a smaller shape: a ceiling on its memory comes down with the elements."""
    ceiling = getattr(tensor.method, "memory_bytes", None)
    if tensor.method is None or ceiling is None:
        return tensor.method
    return tensor.method.within(int(ceiling * prod(shape) / max(1, prod(tensor.base.shape))))


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
    """A made-up tensor like a planned one, of a size of its choice, ready to be merged."""

    def __init__(self, tensor: TensorPlan, size: Size, plan: Plan, device: torch.device, workers: Workers) -> None:
        self._tensor, self._plan, self._workers = tensor, plan, workers
        self._method = method_at(tensor, size.shape)
        whole = tensor.route
        lines = size.shape if len(whole.lines) == len(size.shape) > 1 else (prod(size.shape),)
        # Parts of as many bytes as the engine's.
        longer = prod(whole.lines[1:]) / max(1, prod(lines[1:]))
        rows = min(max(1, int(whole.part_rows * longer)), max(1, lines[0]))
        self._route = replace(whole, lines=lines, part_rows=rows)
        self._factors = list(self._make_factors(device))
        self._copies = [copy.reshape(lines) for copy in self._make(size.shape, device)]
        self._scalings = list(plan.config.scalings)
        part = (rows, *lines[1:])
        dtypes = [DTYPES[tensor.out_dtype]] * len(self._scalings) + ([tensor.spec.dtype] if tensor.delta else [])
        self._outputs = [torch.empty(part, dtype=dtype, device=device) for dtype in dtypes]

    def _make(self, shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
        """The base and the experts as they are stored."""
        stored = [DTYPES[copy.dtype] for copy in (self._tensor.base, *self._tensor.experts)]
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
        """(algorithm, bytes passed over) of one merge as the engine does it, all but reading and writing."""
        source = HeldCopies(
            self._route, self._copies, self._tensor.experts_are_deltas, self._tensor.spec.dtype, self._workers
        )
        if self._method is None:
            for block in source.base_blocks():
                if block.base.is_floating_point():
                    ops.count_nonfinite(block.base)

                def copy(part: RowBlock, block: RowBlock = block) -> None:
                    self._put(part, block, [part.base] * len(self._outputs))

                source.share_out(copy, block)
            return "copy", source.passed_bytes
        if self._factors:
            shape = self._tensor.spec.shape
            merged, stats = merge_factors(self._method, self._factors, shape, self._tensor.spec.dtype)
            if self._route.name == ADAPTER:
                merged.truncated(self._tensor.outputs[0].shape[0])
                return str(stats.to_dict()["algorithm"]), 0
            left, right = merged.left.to(self._tensor.spec.dtype), merged.right.to(self._tensor.spec.dtype)
            for block in source.base_blocks():
                source.share_out(lambda part, block=block: self._apply(part, block, left[part.rows] @ right), block)
            return str(stats.to_dict()["algorithm"]), source.passed_bytes
        if self._route.name == BY_ROWS:
            row_map = self._method.row_map(source)
            for block in source.blocks():
                if self._method.any_shape:
                    source.share_out(lambda part, block=block: self._apply(part, block, row_map.rows(part)), block)
                else:
                    self._apply(block, block, row_map.rows(block))
            stats = row_map.stats()
        else:
            value, stats = self._method.merge(source)
            for block in source.base_blocks():
                source.share_out(lambda part, block=block: self._apply(part, block, value[part.rows]), block)
        return str(stats.to_dict()["algorithm"]), source.passed_bytes

    def _apply(self, part: RowBlock, block: RowBlock, delta: Tensor) -> None:
        first = part.rows.start * prod(self._route.lines[1:])
        made = ops.apply_delta(
            part.base,
            delta,
            scalings=self._scalings,
            dtype=DTYPES[self._tensor.out_dtype],
            seed=self._tensor.rounding_seed,
            first=first,
        )
        self._put(part, block, [*made, delta])

    def _put(self, part: RowBlock, block: RowBlock, made: Sequence[Tensor]) -> None:
        place = slice(part.rows.start - block.rows.start, part.rows.stop - block.rows.start)
        for output, tensor in zip(self._outputs, made, strict=False):  # Δ has a place only where it is kept
            output[place] = tensor


def sample_bytes(tensor: TensorPlan, size: Size, device: torch.device) -> int:
    """Peak of a ``Sample`` and its merge: the copies, the float32 deltas that they are made of, and the work."""
    each = sum(DTYPES[copy.dtype].itemsize for copy in (tensor.base, *tensor.experts)) + 4 * (1 + len(tensor.experts))
    method = method_at(tensor, size.shape)
    spec: TensorSpec = replace(tensor.spec, shape=size.shape)
    work = 0
    if method is not None and not method.any_shape and not tensor.pairs:
        work = method.workspace_bytes(spec, tensor.tasks, device)
    return prod(size.shape) * each + work + tensor.route.work_bytes // size.divisor**2


def memory_for_samples(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return int(MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
