"""What a method is, what it is given, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import ConfigError, InputError, nearest, shown
from ..linalg.protocol import rounding_tolerance
from ..ops import TaskSum, compute_dtype, subtract, task_sum
from ..values import number, whole_number, word

RANK_POLICIES = ("range", "min-dim")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # the dtype it is computed in: float32 or float64

    @property
    def elements(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


@runtime_checkable
class Deltas(Protocol):
    """T tensors Δ_t = θ_t − θ₀ of one shape, made when they are asked for, so that T of them need not exist at once."""

    @property
    def n_tasks(self) -> int: ...

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype, float32 or float64."""
        ...

    @property
    def device(self) -> torch.device:
        """Where sums and deltas are made."""
        ...

    @property
    def origin(self) -> TensorSpec:
        """The tensor that the deltas are of: they themselves, or what they are the coordinates of in bases that all
        share (``factors``). Its sides decide r, and its dtype what counts as rounding.
        """
        ...

    def delta(self, task: int) -> Tensor:
        """Δ_t in the compute dtype; not to be written to."""
        ...

    def sum(self, dtype: torch.dtype, batch_dims: int = 0) -> TaskSum:
        """Σ_t Δ_t in ``dtype``, fresh: it may be overwritten; with what was seen of every Δ_t [T, batch]."""
        ...


@dataclass(frozen=True)
class TensorDeltas:
    """Deltas that are in memory: T tensors of one shape, or one stack [T, ...]. They are never modified.

    Args:
        coordinates_of: see ``Deltas.origin``; None where they stand for themselves.
    """

    tensors: Sequence[Tensor]
    coordinates_of: TensorSpec | None = None

    def __post_init__(self) -> None:
        if len(self.tensors) == 0:
            raise InputError("deltas is empty: at least one task is needed")
        first = self.tensors[0]
        for index, tensor in enumerate(self.tensors):
            if tensor.shape != first.shape:
                raise InputError(f"deltas[{index}] has shape {list(tensor.shape)}, deltas[0] has {list(first.shape)}")
            if not tensor.is_floating_point():
                raise InputError(f"deltas[{index}] is {tensor.dtype}: deltas are float tensors")
            if tensor.device != first.device:
                raise InputError(f"deltas[{index}] is on {tensor.device}, deltas[0] on {first.device}")

    @property
    def n_tasks(self) -> int:
        return len(self.tensors)

    @property
    def shape(self) -> torch.Size:
        return self.tensors[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(*(tensor.dtype for tensor in self.tensors))

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def origin(self) -> TensorSpec:
        return self.coordinates_of or TensorSpec("", tuple(self.shape), self.dtype)

    def delta(self, task: int) -> Tensor:
        # Contiguous: a BLAS that is given a transposed operand may end in other last digits.
        return self.tensors[task].to(self.dtype).contiguous()

    def sum(self, dtype: torch.dtype, batch_dims: int = 0) -> TaskSum:
        return task_sum(self.tensors, dtype=dtype, batch_dims=batch_dims, largest=False)


@dataclass(frozen=True)
class RowBlock:
    """Some rows of every expert and of the base, as they are stored, on the device that computes.

    Attributes:
        are_deltas: whether the experts are Δ_t themselves, and not θ_t.
        weights: w_t; None where all are 1. Below, Δ_t is w_t (θ_t − θ₀).
    """

    rows: slice
    experts: Sequence[Tensor]
    base: Tensor
    are_deltas: bool = False
    weights: Sequence[float] | None = None

    def sum(self, dtype: torch.dtype, out: Tensor | None = None) -> TaskSum:
        """Σ_t Δ_t of these rows, with what was seen of every Δ_t."""
        base = None if self.are_deltas else self.base
        found = task_sum(self.experts, base, weights=self.weights, dtype=dtype, out=out)
        if self.weights is None:
            return found
        # What the kernel sees, it sees before the weights.
        size = found.squares.new_tensor(self.weights).abs()
        largest = None if found.largest is None else found.largest * size
        # A square that overflows, times a zero delta's, were NaN.
        squares = torch.where(found.squares == 0, found.squares, found.squares * size.square())
        return found._replace(squares=squares, largest=largest)

    def delta(self, task: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Δ_t of these rows."""
        if not self.are_deltas:
            delta = subtract(self.experts[task], self.base, dtype=dtype, out=out)
        elif out is not None:
            delta = out.copy_(self.experts[task])
        else:  # never the expert itself, where it is to be multiplied
            delta = self.experts[task].to(dtype, copy=self.weights is not None)
        return delta if self.weights is None else delta.mul_(self.weights[task])

    def part(self, rows: slice) -> RowBlock:
        """Some of these rows, counted from the first of them."""
        place = slice(self.rows.start + rows.start, self.rows.start + rows.stop)
        return replace(self, rows=place, experts=[expert[rows] for expert in self.experts], base=self.base[rows])


class RowSource(Protocol):
    """T deltas too large to be held, walked block by block, as often as it takes."""

    @property
    def n_tasks(self) -> int: ...

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype, float32 or float64."""
        ...

    @property
    def device(self) -> torch.device: ...

    def blocks(self) -> Iterator[RowBlock]:
        """All rows, in order; a block is valid until the next one is taken."""
        ...


class RowMap(Protocol):
    """The merged Δ as a function of single rows of the deltas: what a method has learnt from passes over all of them.

    The merged Δ itself is then never held: its rows are made in one last pass, in order.
    """

    def rows(self, block: RowBlock) -> Tensor:
        """The merged Δ of these rows, float32 or float64, fresh. Of methods for ``any_shape`` called from several
        threads at once.
        """
        ...

    def stats(self) -> MergeStats:
        """The evidence, when every row was asked for.

        Raises:
            NotFiniteError: naming the tasks that hold NaN or Inf.
        """
        ...


@dataclass(frozen=True)
class Check:
    """A number per matrix that is at most ``limit`` where the result is right."""

    value: Tensor
    limit: float


@dataclass(frozen=True)
class MergeStats:
    """Evidence of one merge. Tensors are read (and the device synchronised) by ``read``, all at once, or by ``missed``
    and ``to_dict``.

    Keys of ``values``, where the method has them: ``sigma_mean`` (σ̄), ``rank`` (directions kept), ``gap`` (relative gap
    at the cut k), ``k``, ``s``, ``delta_norms`` and ``delta_largest`` (‖Δ_t‖_F and
    max |Δ_t| per task, on the CPU, the latter of deltas from files).

    Keys of ``checks``, the certificate (docs/numerics.md): ``orthogonality`` and ``asymmetry`` of the
    polar factor, ``negative`` (its sign), ``rounding`` (the solver's own, which these hardly see), ``angle``
    (subspaces, as an error of the merged Δ), ``unresolved`` (directions that the solver's rounding hides).

    Of Iso-CTS ``values`` has ``same_directions`` too: how many directions of tasks count as one with others.
    """

    algorithm: str
    values: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    escalations: tuple[str, ...] = ()

    def read(self) -> MergeStats:
        """Return this with everything on the CPU. One read of the device."""
        found = {("value", key): value for key, value in self.values.items() if isinstance(value, Tensor)}
        found |= {("check", key): check.value for key, check in self.checks.items()}
        away = {key: value for key, value in found.items() if value.device.type != "cpu"}
        if not away:
            return self
        # Counts are whole numbers that float64 holds.
        together = torch.cat([value.double().flatten() for value in away.values()]).cpu()
        parts = together.split([value.numel() for value in away.values()])
        here = {
            key: part.to(value.dtype).view(value.shape) for (key, value), part in zip(away.items(), parts, strict=True)
        }
        return replace(
            self,
            values={key: here.get(("value", key), value) for key, value in self.values.items()},
            checks={
                key: replace(check, value=here.get(("check", key), check.value)) for key, check in self.checks.items()
            },
        )

    def missed(self) -> dict[str, Tensor]:
        """The checks that miss their limit, as booleans per matrix on the CPU. One read of the device."""
        if not self.checks:
            return {}
        # Not `>`: NaN has missed.
        flags = torch.stack([~(check.value <= check.limit) for check in self.checks.values()]).cpu()
        return {name: flag for name, flag in zip(self.checks, flags, strict=True) if bool(flag.any())}

    def describe(self, missed: Mapping[str, Tensor]) -> str:
        """The worst value of every check that was missed, with its limit."""
        worst = {name: self.checks[name].value[flags].amax().item() for name, flags in missed.items()}
        return ", ".join(f"{name} {value:.1e} > {self.checks[name].limit:.0e}" for name, value in worst.items())

    def after(self, before: MergeStats, remark: str) -> MergeStats:
        """This, with the remarks of ``before`` and one more."""
        return replace(self, escalations=(*before.escalations, remark))

    def replaced(self, rows: Tensor, part: MergeStats) -> MergeStats:
        """This, with the entries of the matrices ``rows`` (a mask over the batch) from ``part``."""

        zero = torch.zeros((), device="cpu")

        def put(whole: Any, new: Any) -> Any:
            # What is of every task may be as many numbers as there are matrices.
            if isinstance(whole, Tensor) and whole.shape == rows.shape and new.numel() in (1, int(rows.sum())):
                whole = whole.clone()
                whole[rows.to(whole.device)] = new.to(whole.dtype)
            return whole

        return replace(
            self,
            algorithm=self.algorithm if self.algorithm == part.algorithm else f"{self.algorithm}, {part.algorithm}",
            values={key: put(value, part.values.get(key)) for key, value in self.values.items()},
            # A check that the other solver does not need holds there.
            checks={
                key: Check(put(check.value, part.checks[key].value if key in part.checks else zero), check.limit)
                for key, check in self.checks.items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        values = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in self.values.items()}
        values |= {key: check.value.tolist() for key, check in self.checks.items()}
        result = {"algorithm": self.algorithm, **values}
        if self.checks:
            missed = self.missed()
            result["certified"] = not missed
            if missed:
                result["not_certified"] = self.describe(missed)
        if self.escalations:
            result["escalations"] = list(self.escalations)
        return result


class Method(Protocol):
    """A frozen dataclass of hyper-parameters; its fields are the keys of ``options`` in a config."""

    name: ClassVar[str]
    citation: ClassVar[str]
    default_exclude: ClassVar[tuple[str, ...]]
    any_shape: ClassVar[bool]
    """Whether it is defined on single elements, so that tensors of any shape can be cut up in any way."""
    deltas_taken: ClassVar[int]
    """How often ``merge`` takes every Δ_t by itself, beside their sum: what is not held is read again for it."""
    row_map_passes: ClassVar[int]
    """How often ``row_map`` goes through all rows, before they are gone through to be written."""

    def accepts(self, spec: TensorSpec) -> bool:
        """Whether tensors of this shape are merged by the method (others are averaged)."""
        ...

    def within(self, memory_bytes: int) -> Method:
        """The method with a ceiling on its ``workspace_bytes``, which decides between solvers."""
        ...

    def explain(self, spec: TensorSpec, tasks: int, device: torch.device) -> str:
        """Which solver a tensor gets, and why; how the tensor is merged where there is no choice."""
        ...

    def check(self, spec: TensorSpec, tasks: int) -> None:
        """Raises ConfigError when the options do not fit this tensor."""
        ...

    def workspace_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        """Peak bytes inside ``merge`` beyond what ``deltas`` holds, the result included."""
        ...

    def flops(self, spec: TensorSpec, tasks: int) -> float:
        """Floating-point operations of one merge, for estimates of time."""
        ...

    def merge(self, deltas: Deltas) -> tuple[Tensor, MergeStats]:
        """The merged Δ before ``scaling``, float32 or float64, and its evidence."""
        ...

    def row_map(self, source: RowSource) -> RowMap:
        """The merged Δ as a function of rows, for tensors whose ``row_map_bytes`` is a number."""
        ...

    def row_map_bytes(self, spec: TensorSpec, tasks: int, block_elements: int, device: torch.device) -> int | None:
        """Peak bytes of ``row_map`` and of ``RowMap.rows`` beyond the block's own raw tensors, with blocks of that many
        elements; None where the method has no such form for this tensor.
        """
        ...


# What is called of an object that is given for an option, by the option's type.
_CALLED = {"PolarSolver | None": ("polar",), "Solver | None": ("polar", "top_subspace")}


def read_option(method: str, option: Field[Any], value: Any) -> Any:
    """Return an option of a method as its field's type: of texts, the numbers that they stand for.

    Raises:
        ConfigError: something else.
    """
    what = f"option {option.name!r} of method {method!r}"
    if isinstance(option.default, float):
        return number(value, what)
    if isinstance(option.default, str):
        return word(value, what)
    if option.type == "int | None":
        return None if value is None else whole_number(value, what, 0)
    # Set by who has a solver at hand; no word or number stands for one.
    if value is not None and not all(
        callable(getattr(value, name, None)) for name in _CALLED.get(str(option.type), ())
    ):
        raise ConfigError(f"{what} is {shown(value)}; it is an object, set in Python")
    return value


def read_options(method: Any) -> None:
    """Read the options of a method that is being made, in the place where they stand."""
    for option in fields(method):
        object.__setattr__(method, option.name, read_option(method.name, option, getattr(method, option.name)))


def as_deltas(deltas: Deltas | Tensor | Sequence[Tensor]) -> Deltas:
    """A list of T tensors or one stack [T, ...] as ``Deltas``."""
    if isinstance(deltas, Tensor):
        if deltas.ndim == 0:
            raise InputError("deltas is a scalar: give T tensors, or one stacked along the first dimension")
        return TensorDeltas(deltas.unbind(0))
    return deltas if isinstance(deltas, Deltas) else TensorDeltas(list(deltas))


class NotFiniteError(InputError):
    """A delta holds NaN or Inf. ``tasks`` are the indices of those that do."""

    def __init__(self, tasks: list[int]) -> None:
        self.tasks = tasks
        super().__init__(f"deltas[{tasks[0]}] holds NaN or Inf (tasks with such values: {tasks})")


class OutOfRangeError(InputError):
    """Deltas that are all finite, and of sizes that no result can be made of."""


def finite_sum(deltas: Deltas, dtype: torch.dtype, batch_dims: int = 0) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(``deltas.sum``, its ``squares``, what ``MergeStats.values`` says of every Δ_t). One read of the device.

    Raises:
        As ``delta_sizes``.
    """
    total, squares, largest, nonfinite = deltas.sum(dtype, batch_dims)
    most = None if largest is None else _by_task(largest)
    return total, squares, delta_sizes(_by_task(squares), most, _by_task(nonfinite))


def delta_sizes(squares: Tensor, largest: Tensor | None, nonfinite: Tensor) -> dict[str, Any]:
    """What ``MergeStats.values`` says of every Δ_t, on the CPU, of what its parts are, [T, parts] each. One read of the
    device.

    Raises:
        NotFiniteError: naming the tasks that hold NaN or Inf.
        OutOfRangeError: a norm whose square float64 does not hold.
    """
    rows = [nonfinite.sum(1).double(), squares.sum(1).sqrt()]
    if largest is not None:
        rows.append(largest.amax(1).double())
    counts, norms, *rest = torch.stack(rows).cpu()
    bad = torch.nonzero(counts).flatten().tolist()
    if bad:
        raise NotFiniteError(bad)
    if not bool(norms.isfinite().all()):
        raise OutOfRangeError(f"‖Δ‖ of the tasks is {_shown(norms)}: more than float64 holds the squares of")
    return {"delta_norms": norms, **({"delta_largest": rest[0]} if rest else {})}


def require_comparable(norms: Tensor, origin: TensorSpec) -> None:
    """Raises OutOfRangeError where a spectral method can make nothing of deltas with these ‖Δ_t‖_F, [T].

    - Σ_t ‖Δ_t‖, which bounds every σ and σ̄, is beyond ``origin.dtype`` or ``COMPUTED_NORMS``.
    - One Δ_t is larger than any training makes it, and another one has all its singular values in what counts as the
      rounding of that: the result would be the large one's alone, and the others' absence a line in the report.
    """
    total, (least, most) = math.fsum(norms.tolist()), COMPUTED_NORMS
    dtype = str(origin.dtype).removeprefix("torch.")
    if not (total == 0 or least <= total <= min(most, torch.finfo(origin.dtype).max)):
        raise OutOfRangeError(f"‖Δ‖ of the tasks is {_shown(norms)}: out of the range of {dtype} arithmetic")
    rounding = rounding_of(norms.square().sum().sqrt(), origin)
    if total > LARGEST_TRAINED_NORM and bool(((norms > 0) & (norms <= rounding)).any()):
        raise OutOfRangeError(
            f"‖Δ‖ of the tasks is {_shown(norms)}: the small ones are lost in what {dtype} rounds of the largest"
        )


# Squares and their sums are normal numbers of float64, and those of a billionth as well.
COMPUTED_NORMS = (1e-140, 1e150)
# A matrix of 10^9 weights that moved by 3 each. A flipped bit of an exponent makes 7e36 of 0.02.
LARGEST_TRAINED_NORM = 1e5


def require_kept(stats: MergeStats) -> None:
    """Raises OutOfRangeError where nothing was kept of the one Δ_t that is not 0: of several, all may cancel."""
    rank, norms = stats.values.get("rank"), stats.values.get("delta_norms")
    if rank is None or norms is None or int((norms > 0).sum()) != 1:
        return
    if not bool(torch.as_tensor(rank).any()):
        raise OutOfRangeError(f"‖Δ‖ of the tasks is {_shown(norms)}: no direction of it is told from rounding")


def check_factors(what: str, values: Iterable[float], dtype: torch.dtype) -> None:
    """Raises ConfigError where a scaling or weight is no finite number in the dtype that is computed in."""
    for value in values:
        if not abs(value) <= torch.finfo(dtype).max:
            name = str(dtype).removeprefix("torch.")
            raise ConfigError(f"{what} {value:g} is no finite number in {name}, which this is computed in")


def _shown(norms: Tensor) -> str:
    return ", ".join(f"{norm:.3g}" for norm in norms.tolist())


def _by_task(seen: Tensor) -> Tensor:
    """[T] or [T, B, ...] as [T, members]."""
    return seen.flatten(1) if seen.ndim > 1 else seen[:, None]


def require_matrices(name: str, shape: torch.Size) -> None:
    """The spectral methods work on [..., M, N]."""
    if len(shape) < 2:
        raise InputError(f"{name} needs matrices [M, N] or batches [B, M, N]; got deltas of shape {list(shape)}")


def rounding_of(norm: Tensor, origin: TensorSpec) -> Tensor:
    """``rounding_tolerance`` of deltas with ‖Δ‖_F = ``norm``, by the sides and the dtype of what they are of."""
    return rounding_tolerance(norm, origin.shape[-2], origin.shape[-1], origin.dtype)


def check_rank_policy(rank_policy: str) -> None:
    if rank_policy not in RANK_POLICIES:
        raise ConfigError(f"rank_policy {rank_policy!r} is unknown{nearest(rank_policy, RANK_POLICIES)}")


def spectral_mean(total: Tensor, kept: Tensor, min_dim: int, rank_policy: str) -> Tensor:
    """σ̄ = Σσ over the number of kept directions (``range``) or over r (``min-dim``); 0 when nothing is kept."""
    count = kept.clamp_min(1) if rank_policy == "range" else torch.full_like(kept, max(1, min_dim))
    return total.double() / count
