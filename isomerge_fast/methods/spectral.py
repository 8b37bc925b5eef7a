"""Share what the spectral methods have in common: options, the solvers that are tried in turn, certificates, σ̄."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import ConfigError, InputError, nearest
from ..linalg.auto import TOLERANCES, Candidate, check_precision, spectrum_candidates, stack_places
from ..linalg.blockwise import multiply_short_side, to_long_side, to_short_side
from ..linalg.certificate import probes, symmetry
from ..linalg.protocol import PolarSolver, Solver, reciprocal
from .base import Method
from .certified import exact_products, run_with_fallback
from .source import DeltaSource, TensorSpec
from .stacks import DeltaStack, as_batch, merge_together
from .stats import Check, MergeStats
from .sums import spectral_sum

RANK_POLICIES = ("range", "min-dim")


@dataclass(frozen=True, kw_only=True)
class Spectral(Method):
    """Merge matrices by their singular values, with solvers that are tried in turn until a certificate holds.

    A method states ``solvers``, ``attempt`` and ``solving_bytes``.

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
        return self.memory_bytes

    def within(self, memory_bytes: int | None) -> Self:
        return replace(self, memory_bytes=memory_bytes)

    def exact(self) -> Self:
        return replace(self, precision="reference")

    @property
    def tolerance(self) -> float:
        """Return the limit of the checks."""
        return TOLERANCES[self.precision]

    @property
    def promise(self) -> float:
        """Return ``tolerance``, under the name that it had; for one release more."""
        warnings.warn("Spectral.promise is now tolerance", DeprecationWarning, stacklevel=2)
        return self.tolerance

    def mean(self, total: Tensor, kept: Tensor, min_dim: int) -> Tensor:
        """Return ``spectral_mean`` by the method's policy; for one release more."""
        warnings.warn("Spectral.mean is now spectral_mean(…, rank_policy)", DeprecationWarning, stacklevel=2)
        return spectral_mean(total, kept, min_dim, self.rank_policy)

    @abstractmethod
    def solvers(self, spec: TensorSpec, tasks: int, device: torch.device) -> Sequence[Candidate[Any]]:
        """Return the solvers to be tried, in order, whatever memory they take."""

    @abstractmethod
    def solving_bytes(self, candidate: Candidate[Any], spec: TensorSpec, tasks: int, device: torch.device) -> int:
        """Return ``workspace_bytes`` with that solver."""

    @abstractmethod
    def attempt(self, deltas: DeltaSource, candidate: Candidate[Any]) -> tuple[Tensor, MergeStats]:
        """Return ``merge`` by one solver, with its evidence, of deltas [..., M, N]."""

    def candidates(self, spec: TensorSpec, tasks: int, device: torch.device) -> Sequence[Candidate[Any]]:
        """Return the solvers to be tried, in order: the one that is given, or those that keep to the ceiling."""
        if self.solver is not None:
            return (Candidate(self.solver, "given"),)
        solvers = self.solvers(spec, tasks, device)
        if self.memory_bytes is None:
            return solvers

        def needed(candidate: Candidate[Any]) -> int:
            return self.solving_bytes(candidate, spec, tasks, device)

        # Where none keeps to the ceiling, the one that needs least.
        return [each for each in solvers if needed(each) <= self.memory_bytes] or [min(solvers, key=needed)]

    def explain(self, spec: TensorSpec, tasks: int, device: torch.device) -> str:
        candidate = self.candidates(spec, tasks, device)[0]
        return f"{candidate.solver.name}: {candidate.reason}"

    def workspace_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        """Return ``solving_bytes`` of the first candidate. Without a ceiling, the next may need more."""
        return self.solving_bytes(self.candidates(spec, tasks, device)[0], spec, tasks, device)

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        """Return the merged Δ [..., M, N] of deltas [..., M, N].

        Raises:
            ValueError: fewer than two dimensions, or NaN or Inf in a delta.
            ConfigError: as ``check``.
        """
        require_matrices(self.name, deltas.shape)
        if len(deltas.shape) > 2 and self._has_stacks(deltas):
            return self._merge_in_stacks(deltas)
        spec = TensorSpec("", tuple(deltas.shape), deltas.full_spec.dtype)
        return run_with_fallback(self.attempt, deltas, self.candidates(spec, deltas.n_tasks, deltas.device))

    def stack_candidate(self, spec: TensorSpec, tasks: int) -> Candidate[Any] | None:
        """Return the solver of a stack of such matrices, None where each is solved by itself."""
        return None

    def stack_size(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        is_open = self.solver is None and self.precision != "reference" and 0 not in spec.shape
        size = stack_places(spec.shape, spec.dtype, device) if is_open else 1
        return size if size > 1 and self.stack_candidate(spec, tasks) is not None else 1

    def stack_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        size, candidate = self.stack_size(spec, tasks, device), self.stack_candidate(spec, tasks)
        if size == 1 or candidate is None:
            return self.workspace_bytes(spec, tasks, device)
        stack = TensorSpec(spec.name, (size, *spec.shape), spec.dtype)
        # Of one matrix what is made for its place, and what is merged alone after all.
        beside = spec.dtype.itemsize * spec.elements
        return beside + max(
            self.solving_bytes(candidate, stack, tasks, device),
            spec.dtype.itemsize * stack.elements + self.workspace_bytes(spec, tasks, device),
        )

    def merge_stack(self, sources: Sequence[DeltaSource]) -> list[tuple[Tensor, MergeStats]]:
        first = sources[0]
        spec = TensorSpec("", tuple(first.shape), first.full_spec.dtype)
        size = self.stack_size(spec, first.n_tasks, first.device)
        candidate = self.stack_candidate(spec, first.n_tasks)
        if size == 1 or candidate is None:
            return [self.merge(source) for source in sources]
        with exact_products(first.device):
            return merge_together(partial(self.attempt, candidate=candidate), self.merge, DeltaStack(sources, size))

    def _has_stacks(self, deltas: DeltaSource) -> bool:
        """Return whether the matrices of a batch are merged in stacks, and those fit under the ceiling."""
        spec = TensorSpec("", tuple(deltas.shape[-2:]), deltas.full_spec.dtype)
        if 0 in deltas.shape or self.stack_size(spec, deltas.n_tasks, deltas.device) == 1:
            return False
        ceiling = math.inf if self.memory_bytes is None else self.memory_bytes
        return self.stack_bytes(spec, deltas.n_tasks, deltas.device) <= ceiling

    def _merge_in_stacks(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        batch = deltas.shape[:-2]
        spec = TensorSpec("", tuple(deltas.shape[-2:]), deltas.full_spec.dtype)
        size = self.stack_size(spec, deltas.n_tasks, deltas.device)
        members = [deltas.member(place) for place in range(batch.numel())]
        starts = range(0, len(members), size)
        return as_batch([each for at in starts for each in self.merge_stack(members[at : at + size])], batch)

    def result_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the merged Δ. The reference judges the others: its result is never rounded."""
        return torch.float64 if self.precision == "reference" else compute_dtype


@dataclass(frozen=True, kw_only=True)
class SingularValues(Spectral):
    """Merge by Δ = U f(Σ) Vᵀ with U Σ Vᵀ = svd(Σ_t Δ_t). A method states f (``new_values``)."""

    solver: Solver | None = field(default=None, metadata={"kind": Solver})

    @abstractmethod
    def new_values(self, sigma: Tensor) -> Tensor:
        """Return f of the singular values [..., r], float64 and descending. Those that are 0 stay 0."""

    def solvers(self, spec: TensorSpec, tasks: int, device: torch.device) -> Sequence[Candidate[Solver]]:
        return spectrum_candidates(self.precision, spec.dtype)

    def solving_bytes(self, candidate: Candidate[Solver], spec: TensorSpec, tasks: int, device: torch.device) -> int:
        rows, columns = spec.shape[-2:]
        solving = candidate.solver.workspace_bytes(rows, columns, torch.float64, device)
        return spec.elements // max(1, rows * columns) * (8 * rows * columns + solving)

    def attempt(self, deltas: DeltaSource, candidate: Candidate[Solver]) -> tuple[Tensor, MergeStats]:
        """Return U f(Σ) Vᵀ = W f(Σ) Σ⁻¹ Wᵀ S, on the short side, with W its vectors."""
        total, _, zero_limit, of_deltas = spectral_sum(deltas, torch.float64)
        dtype = self.result_dtype(deltas.dtype)
        if 0 in total.shape:
            return total.to(dtype), MergeStats(self.name, of_deltas)
        top = candidate.solver.factorize(total, tolerance=zero_limit).top(min(total.shape[-2:]))
        sigma = top.sigma
        wanted = torch.where(sigma > 0, self.new_values(sigma), 0.0)
        weights = (top.short * (wanted * reciprocal(sigma))[..., None, :]) @ top.short.mT
        value = multiply_short_side(weights, total, torch.empty(total.shape, dtype=dtype, device=total.device))
        del weights
        # ΔΔᵀ = W f(Σ)² Wᵀ, and SΔᵀ is symmetric: with both, Δ is right.
        omega = probes(sigma.shape[-1], torch.float64, total.device)
        defect = to_short_side(value, to_long_side(value, omega, torch.float64))
        defect -= top.short @ (wanted.square()[..., None] * (top.short.mT @ omega))
        size, largest = torch.linalg.vector_norm(wanted.square(), dim=-1), wanted.abs().amax(-1)
        checks = {
            "values": Check(torch.linalg.matrix_norm(defect) / torch.where(size > 0, size, 1.0), self.tolerance),
            "asymmetry": Check(symmetry(total, value)[0] / torch.where(largest > 0, largest, 1.0), self.tolerance),
            "unresolved": Check(top.unresolved, 0),
        }
        values = {"rank": (sigma > 0).sum(-1), "min_dim": min(deltas.full_spec.shape[-2:]), **of_deltas}
        return value, MergeStats(f"{self.name}/{candidate.solver.name}", values, checks)


def polar_checks(
    tolerance: float, orthogonality: Tensor, symmetry: tuple[Tensor, Tensor], unresolved: Tensor, error: Tensor
) -> dict[str, Check]:
    """Return the certificate of a polar factor, with the ``symmetry`` of ``certificate``."""
    asymmetry, negative = symmetry
    return {
        "orthogonality": Check(orthogonality, tolerance),
        "asymmetry": Check(asymmetry, tolerance),
        "negative": Check(negative, tolerance),
        "unresolved": Check(unresolved, 0),
        "rounding": Check(error, tolerance),
    }


def require_matrices(name: str, shape: torch.Size) -> None:
    """Raise InputError for deltas that are not [..., M, N]."""
    if len(shape) < 2:
        raise InputError(f"{name} needs matrices [M, N] or batches [B, M, N]; got deltas of shape {list(shape)}")


def spectral_mean(total: Tensor, kept: Tensor, min_dim: int, rank_policy: str) -> Tensor:
    """Return σ̄ = Σσ over the number of kept directions (``range``) or over r (``min-dim``); 0 when nothing is kept."""
    count = kept.clamp_min(1) if rank_policy == "range" else torch.full_like(kept, max(1, min_dim))
    return total.double() / count
