"""Give the deltas of one tensor in blocks of rows, wherever base and experts are (memory, files, factors)."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy
import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..ops import TaskSum, compute_dtype, dtype_name, subtract, task_sum

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Describe a tensor before it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # the dtype it is computed in: float32 or float64

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Factors:
    """Hold Δ = scale · left right, in any float dtypes."""

    left: Tensor  # [M, r]
    right: Tensor  # [r, N]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.left.shape[-1]


@dataclass(frozen=True)
class RowBlock:
    """Hold some rows of the base and of some experts, as they are stored, on the device that computes.

    The one place where weights are applied (for factors it is their scale): Δ_t is w_t (θ_t − θ₀) below.
    """

    rows: slice  # which, of the tensor's first dimension
    experts: Sequence[Tensor]
    base: Tensor | None  # None where deltas stand for themselves
    are_deltas: bool = False  # whether the experts are Δ_t themselves, and not θ_t
    weights: Sequence[float] | None = None  # w_t; None where all are 1

    @property
    def like(self) -> Tensor:
        """Return any one of the tensors: all have the rows' shape and device."""
        return self.experts[0] if self.base is None else self.base

    def sum(
        self, dtype: torch.dtype, out: Tensor | None = None, *, batch_dims: int = 0, largest: bool = True
    ) -> TaskSum:
        """Return Σ_t Δ_t of these rows, with what was seen of every Δ_t (see ``ops.task_sum``)."""
        found = task_sum(
            self.experts,
            None if self.are_deltas else self.base,
            weights=self.weights,
            dtype=dtype,
            out=out,
            batch_dims=batch_dims,
            largest=largest,
        )
        if self.weights is None:
            return found
        # What the kernel sees, it sees before the weights.
        sizes = found.squares.new_tensor(self.weights).abs().view(-1, *[1] * batch_dims)
        most = None if found.largest is None else found.largest * sizes
        # A square that overflows, times a zero delta's, were NaN.
        squares = torch.where(found.squares == 0, found.squares, found.squares * sizes.square())
        return found._replace(squares=squares, largest=most)

    def delta(self, task: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return Δ_t of these rows, ``task`` counted among the experts that the block has."""
        if not self.are_deltas:
            assert self.base is not None
            delta = subtract(self.experts[task], self.base, dtype=dtype, out=out)
        elif out is not None:
            delta = out.copy_(self.experts[task])
        else:  # never the expert itself, where it is to be multiplied
            delta = self.experts[task].to(dtype, copy=self.weights is not None)
        return delta if self.weights is None else delta.mul_(self.weights[task])

    def parts(self, step: int) -> Iterator[RowBlock]:
        """Yield these rows in parts of ``step``, in order; the last one may have fewer."""
        count = len(self.like)
        return (self.part(slice(start, min(start + step, count))) for start in range(0, count, step))

    def part(self, rows: slice) -> RowBlock:
        """Return some of these rows, counted from the first of them."""
        place = slice(self.rows.start + rows.start, self.rows.start + rows.stop)
        base = None if self.base is None else self.base[rows]
        return replace(self, rows=place, experts=[expert[rows] for expert in self.experts], base=base)


class Threads:
    """Share a block of rows out among threads: here the calling thread alone."""

    def parts(self, block: RowBlock) -> list[RowBlock]:
        """Return the block in parts for one thread each, in order."""
        return [block]

    def map(self, action: Callable[[RowBlock], Result], parts: Sequence[RowBlock]) -> list[Result]:
        """Return ``action`` of every part, in order."""
        return [action(part) for part in parts]


def joined(seen: Sequence[TaskSum], batch_dims: int = 0) -> TaskSum:
    """Return what was seen of every Δ_t in all parts, in their order; of a batch each part has some members."""
    if len(seen) == 1:
        return seen[0]
    _, squares, largest, nonfinite = (
        [field for field in fields if field is not None] for fields in zip(*seen, strict=True)
    )
    if batch_dims:
        most = torch.cat(largest, 1) if largest else None
        return TaskSum(seen[0].total, torch.cat(squares, 1), most, torch.cat(nonfinite, 1))
    most = torch.stack(largest).amax(0) if largest else None
    return TaskSum(seen[0].total, torch.stack(squares).sum(0), most, torch.stack(nonfinite).sum(0))


class DeltaSource(ABC):
    """Give the deltas Δ_t = w_t (θ_t − θ₀) of one tensor when they are asked for: T of them need never exist at once.

    A backend says where rows come from (``blocks``); sums and single deltas follow from that, in ``dtype`` (float32 or
    float64) on ``device``. ``shape`` is the tensor's, or that by which it is walked. ``full_spec`` is the tensor that
    the deltas are of: they themselves, or where they are coordinates in bases that all share (``factors``) the tensor
    itself. Its sides decide r, and its dtype what counts as rounding.
    """

    threads: Threads = Threads()  # share blocks out; a backend sets it that has more than the calling thread
    wants_largest = False  # whether sums look for max |Δ_t|, by which merges of files find damaged weights
    is_stack = False  # whether what is seen of every Δ_t is told of each matrix of a batch

    def __init__(
        self,
        n_tasks: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        full_spec: TensorSpec | None = None,
    ) -> None:
        self.n_tasks, self.shape, self.dtype, self.device = n_tasks, torch.Size(shape), dtype, device
        self.full_spec = full_spec or TensorSpec("deltas", tuple(shape), dtype)

    @abstractmethod
    def blocks(self, tasks: Sequence[int] | None = None) -> Iterator[RowBlock]:
        """Yield all rows of the base and of some experts (all when None), in order.

        A block is valid until the next one is taken. May be asked for any number of times; the first time over all.
        """

    def factors(self) -> list[Factors | None]:
        """Return every w_t Δ_t as factors, None where it is 0; asked for before any blocks, of adapters alone."""
        raise ValueError(f"{type(self).__name__} has no factors")

    @property
    def origin(self) -> TensorSpec:
        """Return ``full_spec``, under the name that it had; for one release more."""
        warnings.warn("DeltaSource.origin is now full_spec", DeprecationWarning, stacklevel=2)
        return self.full_spec

    def start_over(self) -> None:  # noqa: B027  # most have nothing to do
        """Begin again after a failure: the rest of a first pass is skipped."""

    def members(self, chosen: Tensor) -> DeltaSource:
        """Return some members of a batch, chosen by a mask over its dimensions."""
        raise ValueError(f"deltas of shape {list(self.shape)} from {type(self).__name__} are no batch, but one tensor")

    def member(self, place: int) -> DeltaSource:
        """Return one matrix of a batch [..., M, N], the ``place``-th of all."""
        raise ValueError(f"deltas of shape {list(self.shape)} from {type(self).__name__} are no batch, but one tensor")

    def sum(self, dtype: torch.dtype, batch_dims: int = 0) -> TaskSum:
        """Return S = Σ_t Δ_t in ``dtype``, fresh: it may be overwritten; with what was seen of every Δ_t.

        The first ``batch_dims`` dimensions are a batch: what is seen is [T, *batch], else [T].
        """
        total = torch.empty(self.shape, dtype=dtype, device=self.device)

        def add_up(part: RowBlock) -> TaskSum:
            return part.sum(dtype, out=total[part.rows], batch_dims=batch_dims, largest=self.wants_largest)

        seen = [found for block in self.blocks() for found in self.threads.map(add_up, self.threads.parts(block))]
        return joined(seen, batch_dims)._replace(total=total)

    def delta(self, task: int) -> Tensor:
        """Return Δ_t in the compute dtype; not to be written to."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)

        def subtract_part(part: RowBlock) -> None:
            part.delta(0, self.dtype, out=out[part.rows])

        for block in self.blocks([task]):
            self.threads.map(subtract_part, self.threads.parts(block))
        return out


class MemoryDeltas(DeltaSource):
    """Give the deltas of T tensors θ_t in memory beside θ₀, or T deltas alone. None is ever modified.

    Args:
        experts: T tensors [..., M, N] (or of any shape), or one stack [T, ...], of any float dtypes and strides, on one
            device.
        base: θ₀, of that shape, on that device; None where the experts are the deltas.
        are_deltas: whether the experts are the deltas although there is a base.
        weights: w_t, T numbers that are finite in the compute dtype; None where all are 1.
        dtype: computed in; by default float64 where one tensor is that, else float32.
        full_spec: see ``DeltaSource``.
        block_rows: rows of every block; one block of all when None.

    Raises:
        InputError: no tasks, or tensors that do not fit each other.
    """

    def __init__(
        self,
        experts: Sequence[Tensor],
        base: Tensor | None = None,
        *,
        are_deltas: bool = False,
        weights: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        full_spec: TensorSpec | None = None,
        block_rows: int | None = None,
    ) -> None:
        if len(experts) == 0:
            raise InputError("deltas is empty: at least one task is needed")
        first = experts[0]
        for index, tensor in enumerate(experts):
            if tensor.shape != first.shape:
                raise InputError(f"deltas[{index}] has shape {list(tensor.shape)}, deltas[0] has {list(first.shape)}")
            if not tensor.is_floating_point():
                raise InputError(f"deltas[{index}] is {tensor.dtype}: deltas are float tensors")
            if tensor.device != first.device:
                raise InputError(f"deltas[{index}] is on {tensor.device}, deltas[0] on {first.device}")
        if first.ndim == 0:
            raise InputError("deltas are single numbers, which have no rows: give each a dimension (delta[None])")
        if base is not None and (base.shape, base.device) != (first.shape, first.device):
            where = f"{list(base.shape)} on {base.device}"
            raise InputError(f"the base is {where}, deltas[0] is {list(first.shape)} on {first.device}")
        if weights is not None and len(weights) != len(experts):
            raise InputError(f"{len(weights)} weights for {len(experts)} deltas")
        self.experts, self.base, self.weights = experts, base, weights
        self._are_deltas = are_deltas or base is None
        self._block_rows = block_rows
        given = [tensor.dtype for tensor in (*experts, *([] if base is None else [base]))]
        super().__init__(len(experts), first.shape, dtype or compute_dtype(*given), first.device, full_spec)

    def blocks(self, tasks: Sequence[int] | None = None) -> Iterator[RowBlock]:
        chosen = range(self.n_tasks) if tasks is None else tasks
        weights = None if self.weights is None else [self.weights[task] for task in chosen]
        experts = [self.experts[task] for task in chosen]
        whole = RowBlock(slice(0, self.shape[0]), experts, self.base, self._are_deltas, weights)
        return iter([whole]) if self._block_rows is None or not self.shape[0] else whole.parts(self._block_rows)

    def sum(self, dtype: torch.dtype, batch_dims: int = 0) -> TaskSum:
        if self._block_rows is not None or type(self.threads) is not Threads:
            return super().sum(dtype, batch_dims)
        (whole,) = self.blocks()
        return whole.sum(dtype, batch_dims=batch_dims, largest=self.wants_largest)

    def delta(self, task: int) -> Tensor:
        """Return Δ_t; where it stands for itself, the expert or a copy in the compute dtype."""
        if not self._are_deltas or self.weights is not None:
            return super().delta(task)
        # Contiguous: a BLAS that is given a transposed operand may end in other last digits.
        return self.experts[task].to(self.dtype).contiguous()

    def members(self, chosen: Tensor) -> MemoryDeltas:
        experts = [expert[chosen] for expert in self.experts]
        base = None if self.base is None else self.base[chosen]
        return MemoryDeltas(experts, base, are_deltas=self._are_deltas, weights=self.weights, dtype=self.dtype)

    def member(self, place: int) -> MemoryDeltas:
        index = numpy.unravel_index(place, self.shape[:-2])
        experts = [expert[index] for expert in self.experts]
        base = None if self.base is None else self.base[index]
        return MemoryDeltas(experts, base, are_deltas=self._are_deltas, weights=self.weights, dtype=self.dtype)


class MemoryFactors(DeltaSource):
    """Give factors in memory, one a task or None where its delta is 0, beside a base walked by ``block_rows``.

    Where there are no factors at all, the base may have any shape.
    """

    def __init__(self, factors: Sequence[Factors | None], base: Tensor, *, dtype: torch.dtype, block_rows: int) -> None:
        super().__init__(len(factors), base.shape, dtype, base.device)
        self._factors, self._base, self._block_rows = factors, base, block_rows

    def factors(self) -> list[Factors | None]:
        return list(self._factors)

    def blocks(self, tasks: Sequence[int] | None = None) -> Iterator[RowBlock]:
        """Yield rows of the base alone."""
        assert tasks is not None
        assert not tasks
        return RowBlock(slice(0, self.shape[0]), (), self._base).parts(self._block_rows)


def as_deltas(deltas: DeltaSource | Tensor | Sequence[Tensor]) -> DeltaSource:
    """Return a list of T deltas, or one stack of them [T, ...], as a source."""
    if isinstance(deltas, Tensor):
        if deltas.ndim == 0:
            raise InputError("deltas is a scalar: give T tensors, or one stacked along the first dimension")
        return MemoryDeltas(deltas.unbind(0))
    return deltas if isinstance(deltas, DeltaSource) else MemoryDeltas(list(deltas))


def check_finite(what: str, values: Iterable[float], dtype: torch.dtype) -> None:
    """Raise ConfigError where a scaling or weight is no finite number in the dtype that is computed in."""
    for value in values:
        if not abs(value) <= torch.finfo(dtype).max:
            raise ConfigError(f"{what} {value:g} is no finite number in {dtype_name(dtype)}, which this is computed in")


def checked_weights(weights: Sequence[float] | None, dtype: torch.dtype, where: str = "") -> tuple[float, ...] | None:
    """Return w_t of one tensor, or None where all are 1; each has to be finite in ``dtype``, which is computed in.

    Another weight raises a ConfigError; ``where`` begins its message.
    """
    check_finite(f"{where}weight", weights or (), dtype)
    return None if weights is None or all(weight == 1.0 for weight in weights) else tuple(weights)
