"""Solve by a full thin SVD in float64: the reference tier (LAPACK gesdd on a CPU, cuSOLVER on a GPU)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..ops import traits_of
from .protocol import (
    Factorization,
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
    """Find polar(X) = U Vᵀ and top triplets from X = U Σ Vᵀ; everything in float64 whatever the input's dtype.

    Every answer depends on the SVD alone. Another SVD is a subclass with its ``svd``.
    """

    @property
    def name(self) -> str:
        return "svd-fp64"

    def svd(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return U, σ, Vᵀ of the thin SVD of X [..., M, N], in float64."""
        # Of cuSOLVER torch takes Jacobi's gesvdj unless asked, whose vectors are off: of a 4096 x 4096 sum in float32
        # by 2e-3 on an H200, where QR's gesvd leaves 8e-6 in 1.2 s instead of 1.0. (gesvda's leaves 4e-7 in 0.1 s;
        # whether it keeps small directions in float64 has not been seen.)
        driver = "gesvd" if traits_of(x.device).capability is not None else None
        return torch.linalg.svd(x.double(), full_matrices=False, driver=driver)

    def factorize(self, x: Tensor, *, tolerance: Tensor | None = None) -> SvdFactorization:
        return SvdFactorization(x, default_tolerance(x) if tolerance is None else tolerance, self)


@dataclass(frozen=True, eq=False)
class SvdFactorization(Factorization):
    """Hold X = U Σ Vᵀ."""

    solver: FullSvd

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U, σ, Vᵀ."""
        return self.solver.svd(self.x)

    @property
    def _wide(self) -> bool:
        return self.x.shape[-2] <= self.x.shape[-1]

    @property
    def _limit(self) -> Tensor:
        return torch.maximum(self.tolerance.double(), RESOLUTION * self.vectors[1][..., :1].sum(-1))

    @property
    def _sides(self) -> tuple[Tensor, Tensor]:
        """Return the vectors of the short side and of the long one."""
        u, _, vh = self.vectors
        return (u, vh.mT) if self._wide else (vh.mT, u)

    def polar(self, dtype: torch.dtype) -> tuple[Tensor, PolarStats]:
        u, sigma, vh = self.vectors
        keep = sigma > self._limit[..., None]
        kept_sigma = sigma * keep
        # Scaling the short side truncates without a copy of the long one.
        wide = self._wide
        q = (u * keep[..., None, :]) @ vh if wide else u @ (vh * keep[..., :, None])
        defect = u.mT @ u if wide else vh @ vh.mT
        defect.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        orthogonality = torch.linalg.matrix_norm(defect) / math.sqrt(max(1, sigma.shape[-1]))
        rank, (short, long) = keep.sum(-1), sorted(self.x.shape[-2:])
        entry = NOISE * sigma[..., :1].sum(-1) / math.sqrt(max(1, short))
        error = entry * polar_growth(kept_sigma, short, long) / rank.clamp_min(1).sqrt()
        name = self.solver.name
        return q.to(dtype), PolarStats(name, kept_sigma.sum(-1), rank, orthogonality, error=error, sigma=kept_sigma)

    def top(self, k: int) -> Subspace:
        sigma, tolerance = self.vectors[1], self._limit
        keep = sigma[..., :k] > tolerance[..., None]
        kept_sigma = sigma[..., :k] * keep
        return Subspace(
            short=self._sides[0][..., :, :k] * keep[..., None, :],
            long=None,
            sigma=kept_sigma,
            complement=None,
            gap=relative_gap(sigma, k),
            # A few ε₆₄ σ₁ in X are twice that, times σ_k, in σ_k².
            angle=rounding_angle(sigma, k, tolerance, 2.0 * NOISE * sigma[..., 0] * sigma[..., max(0, k - 1)]),
            unresolved=torch.zeros_like(sigma[..., 0], dtype=torch.int64),
            wide=self._wide,
            is_whole=bool((kept_sigma > 0).all()),
        )

    def complement(self, top: Subspace) -> Tensor:
        return complement_basis(self._sides[0][..., :, top.sigma.shape[-1] :], top)

    def complete(self, top: Subspace, dtype: torch.dtype) -> Subspace:
        keep = top.sigma > 0
        return replace(top, long=(self._sides[1][..., :, : keep.shape[-1]] * keep[..., None, :]).to(dtype))

    def residual(self, delta: Tensor, common: Subspace, s: int, *, norm: Tensor, tolerance: Tensor) -> Subspace:
        """Return the top ``s`` triplets of R by the projection and the SVD as they are written."""
        u_k = common.u.double()
        residual = delta.double()
        # Twice: one projection leaves ε·‖Δ‖ in the common subspace, two leave ε·‖R‖.
        for _ in range(2):
            residual = residual - u_k @ (u_k.mT @ residual)
        factors = self.solver.factorize(residual, tolerance=tolerance)
        return factors.complete(factors.top(s), torch.float64)
