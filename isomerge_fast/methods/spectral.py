"""What the spectral methods share: their options, the solvers that are tried in turn, and σ̄."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import ConfigError, InputError, nearest
from ..linalg.auto import PROMISES, Choice, check_precision, fitting
from ..linalg.protocol import PolarSolver
from .base import Method
from .certified import merge_certified
from .source import DeltaSource, TensorSpec
from .stats import MergeStats

RANK_POLICIES = ("range", "min-dim")


@dataclass(frozen=True, kw_only=True)
class Spectral(Method):
    """Merges matrices by their singular values, with solvers that are tried in turn until a certificate holds.

    A method states ``ladder``, ``attempt`` and ``solving_bytes``.

    Args:
        rank_policy: what a rank-deficient S means, where the published formula is not a function (it pairs the null
            space arbitrarily). ``"range"``: the result stays in the range of S and σ̄ is the mean over its numerical
            rank; ``"min-dim"``: the same directions, σ̄ = Σσ / min(M, N). On full-rank S both are the published formula.
        precision: ``"fast"``, ``"default"`` or ``"reference"``: relative Frobenius error of the merged Δ at most 1e-2,
            1e-5 or 1e-8 on full-rank input. ``auto`` picks the solver for it, and another one where the certificate
            misses.
        solver: used instead, whatever its certificate says.
        memory_bytes: ceiling on ``workspace_bytes``: solvers that need more are left out.
    """

    rank_policy: str = "range"
    precision: str = "default"
    solver: PolarSolver | None = field(default=None, metadata={"kind": PolarSolver})
    memory_bytes: int | None = None

    default_exclude: ClassVar[tuple[str, ...]] = ("*text_projection*",)
    basis_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_policy not in RANK_POLICIES:
            raise ConfigError(f"rank_policy {self.rank_policy!r} is unknown{nearest(self.rank_policy, RANK_POLICIES)}")
        check_precision(self.precision)

    @property
    def ceiling(self) -> int | None:
        """See ``Method``."""
        return self.memory_bytes

    def within(self, memory_bytes: int | None) -> Self:
        """See ``Method``."""
        return replace(self, memory_bytes=memory_bytes)

    def exact(self) -> Self:
        """See ``Method``."""
        return replace(self, precision="reference")

    @property
    def promise(self) -> float:
        """The limit of the checks."""
        return PROMISES[self.precision]

    @abstractmethod
    def ladder(self, spec: TensorSpec, tasks: int, device: torch.device) -> Sequence[Choice[Any]]:
        """Return the solvers to be tried, in order, whatever memory they take."""
        ...

    @abstractmethod
    def solving_bytes(self, choice: Choice[Any], spec: TensorSpec, tasks: int, device: torch.device) -> int:
        """Return ``workspace_bytes`` with that solver."""
        ...

    @abstractmethod
    def attempt(self, deltas: DeltaSource, choice: Choice[Any]) -> tuple[Tensor, MergeStats]:
        """Return what ``merge`` does with one solver, and how well, of deltas [..., M, N]."""
        ...

    def candidates(self, spec: TensorSpec, tasks: int, device: torch.device) -> Sequence[Choice[Any]]:
        """Return the solvers to be tried, in order: the one that is given, or those that keep to the ceiling."""
        if self.solver is not None:
            return (Choice(self.solver, "given"),)
        ladder = self.ladder(spec, tasks, device)
        return fitting(ladder, lambda choice: self.solving_bytes(choice, spec, tasks, device), self.memory_bytes)

    def explain(self, spec: TensorSpec, tasks: int, device: torch.device) -> str:
        """See ``Method``."""
        choice = self.candidates(spec, tasks, device)[0]
        return f"{choice.solver.name}: {choice.reason}"

    def workspace_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        """See ``Method``; of the solver that is expected to be taken. Without a ceiling, the next may need more."""
        return self.solving_bytes(self.candidates(spec, tasks, device)[0], spec, tasks, device)

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        """Return the merged Δ [..., M, N] of deltas [..., M, N].

        Raises:
            ValueError: fewer than two dimensions, or NaN or Inf in a delta.
            ConfigError: as ``check``.
        """
        require_matrices(self.name, deltas.shape)
        spec = TensorSpec("", tuple(deltas.shape), deltas.origin.dtype)
        return merge_certified(self.attempt, deltas, self.candidates(spec, deltas.n_tasks, deltas.device))

    def result_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the merged Δ. The reference judges the others: its result is never rounded."""
        return torch.float64 if self.precision == "reference" else compute_dtype

    def mean(self, total: Tensor, kept: Tensor, min_dim: int) -> Tensor:
        """Return ``spectral_mean`` by the method's policy."""
        return spectral_mean(total, kept, min_dim, self.rank_policy)


def require_matrices(name: str, shape: torch.Size) -> None:
    """Raise InputError for what is not [..., M, N]."""
    if len(shape) < 2:
        raise InputError(f"{name} needs matrices [M, N] or batches [B, M, N]; got deltas of shape {list(shape)}")


def spectral_mean(total: Tensor, kept: Tensor, min_dim: int, rank_policy: str) -> Tensor:
    """Return σ̄ = Σσ over the number of kept directions (``range``) or over r (``min-dim``); 0 when nothing is kept."""
    count = kept.clamp_min(1) if rank_policy == "range" else torch.full_like(kept, max(1, min_dim))
    return total.double() / count
