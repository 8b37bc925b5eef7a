"""Iso-C: the sum of the deltas with its singular values made equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg.auto import PROMISES, Choice, check_precision, fitting, polar_ladder
from ..linalg.certificate import symmetry
from ..linalg.protocol import PolarSolver
from .certified import merge_certified
from .protocol import RowMap, check_rank_policy, read_options, require_matrices, spectral_mean
from .row_maps import PolarMap, has_row_map, polar_map_bytes
from .source import DeltaSource, TensorSpec
from .stats import Check, MergeStats
from .sums import finite_sum, require_comparable, rounding_of


@dataclass(frozen=True)
class IsoC:
    """Δ = σ̄ · U Vᵀ with U Σ Vᵀ = svd(Σ_t Δ_t) and σ̄ the mean singular value.

    Computed as σ̄·polar(S), σ̄ = ‖S‖_*/r: no singular vectors are needed.

    Args:
        rank_policy: what a rank-deficient S means, where the published formula is not a function (it pairs the null
            space arbitrarily). ``"range"``: the result stays in the range of S and σ̄ is the mean over its numerical
            rank; ``"min-dim"``: the same directions, σ̄ = Σσ / min(M, N). On full-rank S both are the published formula.
        precision: ``"fast"``, ``"default"`` or ``"reference"``: relative Frobenius error of the merged Δ at most 1e-2,
            1e-5 or 1e-8 on full-rank input. ``auto`` picks the solver for it, and another one where the certificate
            misses.
        solver: used instead, whatever its certificate says.
        memory_bytes: ceiling on ``workspace_bytes``: solvers that need more are left out.

    Reference: arXiv 2502.04959 (Iso-C).
    """

    rank_policy: str = "range"
    precision: str = "default"
    solver: PolarSolver | None = None
    memory_bytes: int | None = None

    name: ClassVar[str] = "iso-c"
    citation: ClassVar[str] = "arXiv 2502.04959"
    default_exclude: ClassVar[tuple[str, ...]] = ("*text_projection*",)
    any_shape: ClassVar[bool] = False
    deltas_taken: ClassVar[int] = 0
    row_map_passes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        read_options(self)
        check_rank_policy(self.rank_policy)
        check_precision(self.precision)

    def accepts(self, spec: TensorSpec) -> bool:
        return len(spec.shape) == 2

    def check(self, spec: TensorSpec, tasks: int) -> None:
        pass

    def within(self, memory_bytes: int) -> IsoC:
        return replace(self, memory_bytes=memory_bytes)

    def ladder(self, spec: TensorSpec, device: torch.device) -> Sequence[Choice[PolarSolver]]:
        """The solvers to be tried, in order."""
        if self.solver is not None:
            return (Choice(self.solver, "given"),)
        ladder = polar_ladder(self.precision, spec.shape, spec.dtype, device)
        return fitting(ladder, lambda choice: self._workspace_bytes(choice, spec, device), self.memory_bytes)

    def explain(self, spec: TensorSpec, tasks: int, device: torch.device) -> str:
        choice = self.ladder(spec, device)[0]
        return f"{choice.solver.name}: {choice.reason}"

    def workspace_bytes(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        # Of what is expected to be taken: without a ceiling, an escalation to a full SVD may need more.
        return self._workspace_bytes(self.ladder(spec, device)[0], spec, device)

    def _workspace_bytes(self, choice: Choice[PolarSolver], spec: TensorSpec, device: torch.device) -> int:
        rows, columns = spec.shape[-2:]
        members = spec.elements // max(1, rows * columns)
        sum_dtype = torch.promote_types(choice.sum_dtype, spec.dtype)
        solving = choice.solver.workspace_bytes(rows, columns, self._result_dtype(spec.dtype), device)
        return members * (sum_dtype.itemsize * rows * columns + solving)

    def row_map(self, source: DeltaSource) -> RowMap:
        """See ``Method``: σ̄ S (SᵀS)^(-1/2), in float64 but for the last product where that is precise enough."""
        promise = PROMISES[self.precision]
        return PolarMap(source, f"{self.name}/by-rows", rank_policy=self.rank_policy, promise=promise)

    def row_map_bytes(self, spec: TensorSpec, tasks: int, block_elements: int, device: torch.device) -> int | None:
        if self.solver is not None or not has_row_map(spec, self.precision):
            return None
        return polar_map_bytes(spec, block_elements, device)

    def flops(self, spec: TensorSpec, tasks: int) -> float:
        short = min(spec.shape)
        # Two float64 GEMMs count double; LAPACK's eigensolver costs about six.
        return 12.0 * spec.elements * short + 12.0 * short**3

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        """Merged Δ [..., M, N] of deltas [..., M, N].

        Raises:
            ValueError: fewer than two dimensions, or NaN or Inf in a delta.
        """
        require_matrices(self.name, deltas.shape)
        spec = TensorSpec("", tuple(deltas.shape), deltas.origin.dtype)
        return merge_certified(self._attempt, deltas, self.ladder(spec, deltas.device))

    def _result_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """The reference judges the others: its result is never rounded."""
        return torch.float64 if self.precision == "reference" else compute_dtype

    def _attempt(self, deltas: DeltaSource, choice: Choice[PolarSolver]) -> tuple[Tensor, MergeStats]:
        sum_dtype = torch.promote_types(choice.sum_dtype, deltas.dtype)
        total, squares, of_deltas = finite_sum(deltas, sum_dtype, len(deltas.shape) - 2)
        require_comparable(of_deltas["delta_norms"], deltas.origin)
        dtype = self._result_dtype(deltas.dtype)
        if 0 in total.shape:
            return total.to(dtype), MergeStats(self.name, of_deltas)
        min_dim = min(deltas.origin.shape[-2:])
        tolerance = rounding_of(squares.sum(0).sqrt(), deltas.origin)
        q, stats = choice.solver.polar(total, tolerance=tolerance, dtype=dtype)
        asymmetry, negative = symmetry(total, q)
        del total
        sigma_mean = spectral_mean(stats.nuclear_norm, stats.rank, min_dim, self.rank_policy)
        q *= sigma_mean.to(q.dtype)[..., None, None]
        values = {
            "sigma_mean": sigma_mean,
            "rank": stats.rank,
            "min_dim": min_dim,
            **of_deltas,
        }
        promise = PROMISES[self.precision]
        checks = {
            "orthogonality": Check(stats.orthogonality, promise),
            "asymmetry": Check(asymmetry, promise),
            "negative": Check(negative, promise),
            "unresolved": Check(torch.as_tensor(stats.unresolved, device=q.device).expand(stats.rank.shape), 0),
            "rounding": Check(torch.as_tensor(stats.error, device=q.device).expand(stats.rank.shape), promise),
        }
        if sum_dtype == torch.float32 and stats.spread is not None and stats.sigma is not None:
            # Measured: 0.2 ε rms(σ) rms(1/σ) for T = 8, from 160 x 64 to 4096 x 256; √T for the roundings of a sum. Of
            # experts that cancel, what is rounded is larger than S.
            size = torch.linalg.vector_norm(stats.sigma, dim=-1)
            cancelled = torch.where(size > 0, squares.sum(0).sqrt() / size, 1.0).clamp_min(1.0)
            error = stats.spread * cancelled * (0.1 * torch.finfo(sum_dtype).eps * math.sqrt(deltas.n_tasks))
            checks["sum_rounding"] = Check(error, 0.1 * promise)
        return q, MergeStats(f"{self.name}/{stats.solver}", values, checks)
