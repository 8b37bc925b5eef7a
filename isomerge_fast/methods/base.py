"""Define a method: a base class with defaults, its options, and its form by rows."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from ..errors import ConfigError, shown
from ..parsing.values import number, whole_number, word
from .source import DeltaSource, RowBlock, TensorSpec
from .stats import MergeStats

RENAMED_HOOKS = {"row_map": "rowwise", "row_map_bytes": "rowwise_bytes", "row_map_passes": "rowwise_passes"}


class RowwiseMerge(Protocol):
    """Make the merged Δ row by row, from what a method has learnt in passes over all rows.

    The merged Δ itself is then never held: its rows are made in one last pass, in order.
    """

    def rows(self, block: RowBlock) -> Tensor:
        """Return the merged Δ of these rows, float32 or float64, fresh. Ask for every row once.

        Methods for ``any_shape`` are called from several threads at once.
        """
        ...

    def stats(self) -> MergeStats:
        """Return the evidence, after every row was asked for.

        Raises:
            NotFiniteError: naming the tasks that hold NaN or Inf.
        """
        ...


@dataclass(frozen=True)
class Method(ABC):
    """Merge T deltas into one: a frozen dataclass of hyper-parameters, which are the keys of ``options`` in a config.

    A method states its ``name``, its ``merge`` and what differs from the defaults here. ``linear.Linear``,
    ``elementwise.Elementwise`` and ``spectral.Spectral`` state more.
    """

    name: ClassVar[str]
    citation: ClassVar[str] = ""
    default_exclude: ClassVar[tuple[str, ...]] = ()
    """Shell patterns of tensors that are averaged, unless an override says otherwise."""
    any_shape: ClassVar[bool] = False
    """Whether it is defined on single elements, so that tensors of any shape can be cut up in any way; it then has a
    ``rowwise``."""
    basis_free: ClassVar[bool] = False
    """Whether it commutes with a change to orthonormal coordinates, so that adapters are merged as thin factors."""
    deltas_taken: ClassVar[int] = 0
    """How often ``merge`` takes every Δ_t by itself, beside their sum: what is not held is read again for it."""
    rowwise_passes: ClassVar[int] = 0
    """How often ``rowwise`` goes through all rows, before they are gone through to be written."""

    def __init_subclass__(cls) -> None:
        """Take hooks under the names that they had, for one release more."""
        super().__init_subclass__()
        for old, new in RENAMED_HOOKS.items():
            if old in cls.__dict__ and new not in cls.__dict__:
                warnings.warn(f"method hook {old} is now {new}", DeprecationWarning, stacklevel=2)
                setattr(cls, new, cls.__dict__[old])

    def __post_init__(self) -> None:
        for option in _options(type(self)):
            object.__setattr__(self, option.name, read_option(self.name, option, getattr(self, option.name)))

    @property
    def ceiling(self) -> int | None:
        """Return the ceiling on ``workspace_bytes`` that decides between solvers; None where there is none."""
        return None

    def within(self, memory_bytes: int | None) -> Self:
        """Return the method with that ``ceiling``: itself, where it has no choice."""
        return self

    def exact(self) -> Self:
        """Return the method with its reference solver, by which others are judged: itself, where it has no solvers."""
        return self

    def accepts(self, spec: TensorSpec) -> bool:
        """Return whether tensors of this shape are merged by the method (others are averaged)."""
        return self.any_shape or len(spec.shape) == 2

    def explain(self, spec: TensorSpec, tasks: int, device: torch.device) -> str:
        """Return which solver a tensor gets, and why; which tensors are merged, where there is no choice."""
        return "every float tensor" if self.any_shape else "every matrix"

    def check(self, spec: TensorSpec, tasks: int) -> None:  # noqa: B027  # most fit every tensor
        """Raise ConfigError when the options do not fit this tensor."""

    def workspace_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        """Return the peak bytes inside ``merge`` beyond what ``deltas`` holds, the result included.

        By default room for all Δ_t, and for a float64 SVD of one.
        """
        return tasks * spec.bytes + 8 * 6 * spec.elements

    def flops(self, spec: TensorSpec, tasks: int) -> float:
        """Return the floating-point operations of one merge, for estimates of time.

        By default those of a sum; where matrices are taken those of a Gram matrix, its eigenvectors and a product.
        """
        if self.any_shape:
            return 2.0 * tasks * spec.elements
        # Two float64 GEMMs count double; LAPACK's eigensolver costs about six.
        short = min(spec.shape)
        return 12.0 * spec.elements * short + 12.0 * short**3

    @abstractmethod
    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        """Return the merged Δ before ``scaling``, float32 or float64, and its evidence.

        Raises:
            NotFiniteError: naming the tasks that hold NaN or Inf.
        """

    def stack_size(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        """Return how many places a stack of matrices of this shape has; 1 where each is merged by itself.

        It depends on these alone: neither on how many such matrices there are nor on the memory that is free.
        """
        return 1

    def merge_stack(self, sources: Sequence[DeltaSource]) -> list[tuple[Tensor, MergeStats]]:
        """Return ``merge`` of matrices of one shape, as many as ``stack_size`` at most.

        Each result has the bytes that it has in any other company.
        """
        return [self.merge(source) for source in sources]

    def stack_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        """Return the peak bytes inside ``merge_stack`` beyond what the sources hold, the results included."""
        return self.workspace_bytes(spec, tasks, device)

    def rowwise(self, source: DeltaSource) -> RowwiseMerge:
        """Return the merged Δ as a function of rows, for tensors whose ``rowwise_bytes`` is a number."""
        raise NotImplementedError(f"method {self.name!r} has no rowwise form")

    def rowwise_bytes(self, spec: TensorSpec, tasks: int, block_elements: int, device: torch.device) -> int | None:
        """Return the peak bytes of ``rowwise`` and of ``RowwiseMerge.rows`` beyond the raw tensors of a block.

        None where the method has no such form for this tensor.
        """
        return None

    def thread_bytes(self, spec: TensorSpec, tasks: int) -> int:
        """Return the bytes of ``RowwiseMerge.rows`` of every thread beside the first, where threads share a block."""
        return 0


@cache
def _options(kind: type[Method]) -> tuple[Field[Any], ...]:
    return fields(kind)


def read_option(method: str, option: Field[Any], value: Any) -> Any:
    """Return an option of a method as its field's type; a text becomes the number that it stands for.

    A field that takes objects names their class in its ``metadata``, under ``kind``.
    """
    what = f"option {option.name!r} of method {method!r}"
    if isinstance(option.default, float):
        return number(value, what)
    if isinstance(option.default, str):
        return word(value, what)
    if option.type == "int | None":
        return None if value is None else whole_number(value, what, 0)
    # Set by who has such an object at hand; no word or number stands for one.
    kind = option.metadata.get("kind", object)
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{what} is {shown(value)}; it is an object, set in Python: a {kind.__name__}")
    return value
