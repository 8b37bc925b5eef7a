"""The reference tier: a full thin SVD in float64 (LAPACK gesdd on a CPU, cuSOLVER on a GPU)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import traits_of
from .protocol import (
    PolarStats,
    Solver,
    Subspace,
    complement_basis,
    default_tolerance,
    polar_growth,
    relative_gap,
    rounding_angle,
)

EPS = torch.finfo(torch.float64).eps
# Relative to σ₁: what LAPACK leaves of zeros, and by how much every σ and σ_i (u_i, v_i) may be off, in all directions.
RESOLUTION, NOISE = 16.0 * EPS, 4.0 * EPS


@dataclass(frozen=True)
class FullSvd(Solver):
    """polar(X) = U Vᵀ and top triplets from X = U Σ Vᵀ; everything in float64 whatever the input's dtype."""

    @property
    def name(self) -> str:
        """See ``PolarSolver``."""
        return "svd-fp64"

    def polar(
        self, x: Tensor, *, tolerance: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, PolarStats]:
        """See ``PolarSolver``."""
        u, sigma, vh = thin_svd(x)
        keep = sigma > _limit(default_tolerance(x) if tolerance is None else tolerance, sigma)[..., None]
        kept_sigma = sigma * keep
        # Scaling the short side truncates without a copy of the long one.
        wide = x.shape[-2] <= x.shape[-1]
        q = (u * keep[..., None, :]) @ vh if wide else u @ (vh * keep[..., :, None])
        defect = u.mT @ u if wide else vh @ vh.mT
        defect.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        orthogonality = torch.linalg.matrix_norm(defect) / math.sqrt(max(1, sigma.shape[-1]))
        rank, (short, long) = keep.sum(-1), sorted(x.shape[-2:])
        entry = NOISE * sigma[..., :1].sum(-1) / math.sqrt(max(1, short))
        error = entry * polar_growth(kept_sigma, short, long) / rank.clamp_min(1).sqrt()
        stats = PolarStats(self.name, kept_sigma.sum(-1), rank, orthogonality, error=error, sigma=kept_sigma)
        return q.to(dtype or x.dtype), stats

    def top_subspace(
        self,
        x: Tensor,
        k: int,
        *,
        tolerance: Tensor | None = None,
        complement: bool = False,
        dtype: torch.dtype | None = None,
        short_only: bool = False,
    ) -> Subspace:
        """See ``SubspaceSolver``; the long side always comes along."""
        u, sigma, vh = thin_svd(x)
        wide = x.shape[-2] <= x.shape[-1]
        short, long = (u, vh.mT) if wide else (vh.mT, u)
        tolerance = _limit(default_tolerance(x) if tolerance is None else tolerance, sigma)
        keep = sigma[..., :k] > tolerance[..., None]
        top = short[..., :, :k] * keep[..., None, :]
        kept_sigma = sigma[..., :k] * keep
        return Subspace(
            short=top,
            long=(long[..., :, :k] * keep[..., None, :]).to(dtype or x.dtype),
            sigma=kept_sigma,
            complement=(
                complement_basis(short[..., :, k:], top, is_whole=bool((kept_sigma > 0).all())) if complement else None
            ),
            gap=relative_gap(sigma, k),
            # A few ε₆₄ σ₁ in X are twice that, times σ_k, in σ_k².
            angle=rounding_angle(sigma, k, tolerance, 2.0 * NOISE * sigma[..., 0] * sigma[..., max(0, k - 1)]),
            unresolved=torch.zeros_like(sigma[..., 0], dtype=torch.int64),
            wide=wide,
        )

    def complete(self, x: Tensor, subspace: Subspace, dtype: torch.dtype) -> Subspace:
        """Complete already."""
        return subspace

    def residual_subspace(
        self, delta: Tensor, total: Tensor, common: Subspace, s: int, *, norm: Tensor, tolerance: Tensor
    ) -> Subspace:
        """See ``SubspaceSolver``: the projection and the SVD as they are written."""
        u_k = common.u.double()
        residual = delta.double()
        # Twice: one projection leaves ε·‖Δ‖ in the common subspace, two leave ε·‖R‖.
        for _ in range(2):
            residual = residual - u_k @ (u_k.mT @ residual)
        return self.top_subspace(residual, s, tolerance=tolerance, dtype=torch.float64)


def thin_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, σ, Vᵀ of X in float64."""
    # Of cuSOLVER torch takes Jacobi's gesvdj unless asked, whose vectors are off: of a 4096 x 4096 sum in float32 by
    # 2e-3 on an H200, where QR's gesvd leaves 8e-6 in 1.2 s instead of 1.0. (gesvda's leaves 4e-7 in 0.1 s; whether it
    # keeps small directions in float64 has not been seen.)
    driver = "gesvd" if traits_of(x.device).capability is not None else None
    return torch.linalg.svd(x.double(), full_matrices=False, driver=driver)


def _limit(tolerance: Tensor, sigma: Tensor) -> Tensor:
    return torch.maximum(tolerance.double(), RESOLUTION * sigma[..., :1].sum(-1))
