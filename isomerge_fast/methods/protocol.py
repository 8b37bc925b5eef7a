"""What a method is, what it is given, and what it answers."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, InputError, nearest, shown
from ..values import number, whole_number, word
from .source import DeltaSource, RowBlock, TensorSpec
from .stats import MergeStats

RANK_POLICIES = ("range", "min-dim")


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

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        """The merged Δ before ``scaling``, float32 or float64, and its evidence."""
        ...

    def row_map(self, source: DeltaSource) -> RowMap:
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


def require_matrices(name: str, shape: torch.Size) -> None:
    """The spectral methods work on [..., M, N]."""
    if len(shape) < 2:
        raise InputError(f"{name} needs matrices [M, N] or batches [B, M, N]; got deltas of shape {list(shape)}")


def check_rank_policy(rank_policy: str) -> None:
    if rank_policy not in RANK_POLICIES:
        raise ConfigError(f"rank_policy {rank_policy!r} is unknown{nearest(rank_policy, RANK_POLICIES)}")


def spectral_mean(total: Tensor, kept: Tensor, min_dim: int, rank_policy: str) -> Tensor:
    """σ̄ = Σσ over the number of kept directions (``range``) or over r (``min-dim``); 0 when nothing is kept."""
    count = kept.clamp_min(1) if rank_policy == "range" else torch.full_like(kept, max(1, min_dim))
    return total.double() / count
