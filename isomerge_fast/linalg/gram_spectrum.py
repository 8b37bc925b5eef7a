"""Find σ and the short-side vectors of a matrix that is never held, from its Gram matrix, which is overwritten."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import sym_mm
from . import openblas
from .gram_eigh import GramEigh, skew_error
from .protocol import reciprocal, rounding_angle

# A Gram matrix added up in blocks gathers the rounding of every addition.
NOISE_BLOCKS = 64
# LAPACK's syevd takes 2 n² + 6 n + 1 numbers and 5 n + 3 integers; what else was seen came to 0.2 n² (n = 3000).
EIGH_MATRICES = 2.2
# Of σ₁: directions below are solved again, where that is needed. What they share with those above is off by
# ε σ₁² / (σ_i σ_j), what they share with each other by ε σ₁ SMALL σ₁ / σ_j²: alike at κ = 1e6.
SMALL = 1e-2


def gram_noise(blocks: int) -> float:
    """Return the error of the eigenvalues of a float64 Gram matrix added up in so many blocks, relative to λ₁."""
    return GramEigh().noise * max(1.0, math.sqrt(blocks / NOISE_BLOCKS))


def eigh_workspace_bytes(columns: int) -> int:
    """Return the peak bytes of ``spectrum_in_place`` beyond the matrix itself."""
    return int(8 * EIGH_MATRICES * columns**2) + 64 * columns


@dataclass(frozen=True)
class GramSpectrum:
    """Hold XᵀX = V Σ² Vᵀ."""

    vectors: Tensor  # V [N, N] float64, its columns in order of *ascending* σ: turning them round would be a copy
    sigma: Tensor  # [N] float64, descending; so are the next two
    unresolved: Tensor  # [N] bool, those left out that the rounding of the Gram matrix may hide above the tolerance
    noise: Tensor  # [N], the error of σ²
    rank: int  # how many lie above both the tolerance and the noise
    tolerance: Tensor  # σ up to this counts as zero

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """Return (V, σ) of the largest ``count``, or of those that are kept where these are fewer; σ ascending."""
        count = min(count, self.rank)
        first = len(self.sigma) - count
        return self.vectors[:, first:], self.sigma[:count].flip(0)

    def kept_sigma(self, count: int) -> Tensor:
        """Return the largest ``count`` σ, descending, zero where not kept."""
        kept = self.sigma[:count].clone()
        kept[self.rank :] = 0.0
        return kept

    def angle(self, count: int) -> Tensor:
        """Return ``Subspace.angle`` at a cut after ``count``."""
        return rounding_angle(self.sigma, count, self.tolerance, self.noise[max(0, count - 1)])

    def inverse_root(self) -> Tensor:
        """Return V Σ⁻¹ Vᵀ over the kept directions; ``vectors`` is overwritten."""
        vectors, sigma = self.top(self.rank)
        vectors *= sigma.rsqrt()
        return sym_mm(vectors)

    def polar_noise(self) -> Tensor:
        """Return ‖QᵀQ − I‖_F / √rank that the noise leaves in Q = X V Σ⁻¹ Vᵀ."""
        # As if every eigenvalue were off by all of it, in quadrature.
        return (self._relative_noise().square().sum() / max(1, self.rank)).sqrt()

    def skew_error(self) -> Tensor:
        """Return the skew error that the noise leaves in that Q, [] (see ``gram_eigh.skew_error``)."""
        return skew_error(self._relative_noise())

    def _relative_noise(self) -> Tensor:
        return self.noise * reciprocal(self.kept_sigma(len(self.sigma))).square()

    def is_blurred(self, count: int, limit: float) -> bool:
        """Return whether the noise blurs the largest ``count`` directions.

        It hides one of them, or is more than ``limit`` of a kept σ² or of the angle.
        """
        blurred = self.unresolved[:count].any() | (self.angle(count) > limit)
        last = min(count, self.rank) - 1
        if last >= 0:
            blurred |= self.noise[last] > limit * self.sigma[last].square()
        return bool(blurred)

    def sharpened(self, gram_of: Callable[[Tensor], Tensor], noise: float) -> GramSpectrum:
        """Return this spectrum with its directions below ``SMALL`` σ₁ solved again; ``vectors`` is overwritten.

        Their own Gram matrix, ``gram_of(W [N, m])`` = (X W)ᵀ X W with ``gram_noise`` ``noise``, has no large entries
        whose rounding would hide them.
        """
        largest = self.sigma[0]
        count = int((self.sigma < SMALL * largest).sum())
        rest = len(self.sigma) - count
        if count == 0 or rest == 0:
            return self
        small = self.vectors[:, :count]
        gram = gram_of(small)
        # X W itself is rounded to ε ‖X‖.
        part = spectrum_in_place(gram, self.tolerance, noise, scale=(largest * self.sigma[rest]).sqrt())
        del gram
        small.copy_(small @ part.vectors)
        return replace(
            self,
            sigma=torch.cat([self.sigma[:rest], part.sigma]),
            unresolved=torch.cat([self.unresolved[:rest], part.unresolved]),
            noise=torch.cat([self.noise[:rest], part.noise]),
            rank=rest + part.rank,
        )


def spectrum_in_place(gram: Tensor, tolerance: Tensor, noise: float, *, scale: Tensor | None = None) -> GramSpectrum:
    """Return the spectrum of a symmetric ``gram`` [N, N] float64, which its eigenvectors overwrite.

    σ up to ``tolerance`` [] counts as zero. ``noise`` is the error of the eigenvalues, relative to λ₁; to ``scale``²
    where ``gram`` is a difference of larger matrices. One number is copied to the host, for which a GPU is waited for.
    """
    eigenvalues = openblas.eigh_in_place(gram)
    if eigenvalues is None:
        eigenvalues = torch.empty(len(gram), dtype=gram.dtype, device=gram.device)
        # Column by column, as LAPACK has it: anything else is copied first.
        torch.linalg.eigh(gram.mT, out=(eigenvalues, gram.mT))
    sigma = eigenvalues.flip(0).clamp_min_(0.0).sqrt_()
    off = noise * (sigma[0] if scale is None else scale).square()
    squares = sigma.square()
    hidden = squares <= 2.0 * off
    rank = int(((sigma > tolerance) & ~hidden).sum())
    # What came out as zero, or below, may be anything up to the noise.
    unresolved = hidden & (squares + off > tolerance.square())
    return GramSpectrum(gram.mT, sigma, unresolved, off.expand_as(sigma), rank, tolerance)
