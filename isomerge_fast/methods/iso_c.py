"""Iso-C: the sum of the deltas with its singular values made equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg.protocol import Solver, rounding_tolerance
from .protocol import (
    Deltas,
    MergeStats,
    TensorSpec,
    check_rank_policy,
    delta_norms,
    finite_sum,
    pick,
    require_matrices,
    spectral_mean,
)


@dataclass(frozen=True)
class IsoC:
    """Δ = σ̄ · U Vᵀ with U Σ Vᵀ = svd(Σ_t Δ_t) and σ̄ the mean singular value.

    Computed as σ̄·polar(S), σ̄ = ‖S‖_*/r: no singular vectors are needed.

    Args:
        rank_policy: what a rank-deficient S means, where the published formula is not a function (it pairs the null
            space arbitrarily). ``"range"``: the result stays in the range of S and σ̄ is the mean over its numerical
            rank; ``"min-dim"``: the same directions, σ̄ = Σσ / min(M, N). On full-rank S both are the published formula.
        precision: ``"default"`` or ``"reference"`` (see ``linalg.auto.choose``).
        solver: used instead of the one that ``auto`` picks.

    Reference: arXiv 2502.04959 (Iso-C).
    """

    rank_policy: str = "range"
    precision: str = "default"
    solver: Solver | None = None

    name: ClassVar[str] = "iso-c"
    citation: ClassVar[str] = "arXiv 2502.04959"
    default_exclude: ClassVar[tuple[str, ...]] = ("*text_projection*",)

    def __post_init__(self) -> None:
        check_rank_policy(self.rank_policy)

    def accepts(self, spec: TensorSpec) -> bool:
        return len(spec.shape) == 2

    def check(self, spec: TensorSpec, tasks: int) -> None:
        pick(self.solver, self.precision, spec.dtype)

    def workspace_bytes(self, spec: TensorSpec, tasks: int) -> int:
        rows, columns = spec.shape
        solver = pick(self.solver, self.precision, spec.dtype)
        return 8 * spec.elements + solver.workspace_bytes(rows, columns, spec.dtype)

    def flops(self, spec: TensorSpec, tasks: int) -> float:
        short = min(spec.shape)
        # Two float64 GEMMs count double; LAPACK's eigensolver costs about six.
        return 12.0 * spec.elements * short + 12.0 * short**3

    def merge(self, deltas: Deltas) -> tuple[Tensor, MergeStats]:
        """Merged Δ [..., M, N] of deltas [..., M, N].

        Raises:
            ValueError: fewer than two dimensions, or NaN or Inf in a delta.
        """
        require_matrices(self.name, deltas.shape)
        # In float64: rounding S to float32 alone was an error of 6e-5 in Iso-CTS (768 x 300, gap at the cut 0.3 %).
        total, squares = finite_sum(deltas, torch.float64)
        if 0 in total.shape:
            return total.to(deltas.dtype), MergeStats(self.name, {"delta_norms": delta_norms(squares)})
        rows, columns = total.shape[-2:]
        min_dim = min(rows, columns)
        solver = pick(self.solver, self.precision, deltas.dtype)
        tolerance = rounding_tolerance(squares.sum(0).sqrt(), rows, columns, deltas.dtype)
        q, stats = solver.polar(total, tolerance=tolerance, dtype=solver.storage_dtype(deltas.dtype))
        del total
        sigma_mean = spectral_mean(stats.nuclear_norm, stats.rank, min_dim, self.rank_policy)
        q *= sigma_mean.to(q.dtype)[..., None, None]
        values = {
            "sigma_mean": sigma_mean,
            "rank": stats.rank,
            "min_dim": min_dim,
            "orthogonality": stats.orthogonality,
            "delta_norms": delta_norms(squares),
        }
        return q, MergeStats(f"{self.name}/{stats.solver}", values)
