"""Hold singular triplets of a matrix, make them in a given space, and judge whether they are the top ones.

A Rayleigh-Ritz step with A itself, in float64, gives A V = U S + E in the span of an orthonormal X, E no more than
rounding of S. W = AᵀU − V S is then all that is missing, and orthogonal to V: an angle follows from both and a bound μ
on the eigenvalues of AᵀA beyond V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..ops import thin_mm
from .blockwise import short_side_gram, to_long_side, to_short_side
from .cusolver import eigh
from .gram_eigh import GramEigh
from .thin import thin_qrs

# Relative to σ₁, over the gap: LAPACK's float64 SVD leaves up to 34 ε of ‖Aᵀu − s v‖ and ‖A v − s u‖ (3072 x 768; 7 to
# 30 from 64 x 64 to 1536 x 1536), and half of each, twice, enters ``angle_to_top``. With a margin of two.
SVD_ROUNDING = 128.0 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Triplets:
    """Hold b triplets of A by side, float64, and a bound on the eigenvalues of the Gram matrix beyond them."""

    short: Tensor  # [..., r, b]
    long: Tensor  # [..., max(M, N), b]
    sigma: Tensor  # [..., b], descending
    forward: Tensor  # ‖A v − s u‖ of each, for v on the short side
    backward: Tensor  # ‖Aᵀu − s v‖
    beyond: Tensor  # [...]; infinite where nothing is known


@dataclass(frozen=True, eq=False)
class Problem:
    """Hold one matrix A [M, N] or a batch [B, M, N], and what is wanted of it."""

    a: Tensor
    rank: int
    width: int  # k + p, r at most
    tolerance: float

    @cached_property
    def squares(self) -> Tensor:
        """Return ‖A‖_F², [...] float64."""
        return torch.linalg.vector_norm(self.a, dim=(-2, -1), dtype=torch.float64).square()

    @cached_property
    def gram(self) -> Tensor:
        """Return the Gram matrix of the short side in float64."""
        return short_side_gram(self.a)

    @property
    def noise(self) -> Tensor:
        """Return the rounding of the Gram matrix's eigenvalues, [...]."""
        return GramEigh().noise * self.squares

    def members(self, rows: Tensor) -> Problem:
        """Return those of a batch for which ``rows`` is true, without what has been computed of them."""
        return Problem(self.a[rows], self.rank, self.width, self.tolerance)


def rayleigh_ritz(a: Tensor, x: Tensor) -> tuple[Triplets, Tensor]:
    """Return triplets of A in the span of orthonormal X [..., r, b], and the image of their long side [..., r, b].

    Of Y = A X: the eigenvectors of YᵀY make its columns orthogonal but for √ε σ₁, a QR makes them so to rounding. What
    is then beside the diagonal of the triangular factor shows in ``Triplets.forward``. ``beyond`` is 0.
    """
    y = to_long_side(a, x, torch.float64)
    turn = eigh(y.mT @ y)[1].flip(-1)
    x, y = thin_mm(x, turn), thin_mm(y, turn)
    # Columns of one size: CholeskyQR2 is safe for them, whatever the decay.
    sizes = torch.linalg.vector_norm(y, dim=-2, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    long, factor = thin_qrs(y / sizes)[0]
    sigma = factor.diagonal(dim1=-2, dim2=-1) * sizes.squeeze(-2)
    long = long * torch.where(sigma < 0, -1.0, 1.0)[..., None, :]
    sigma, order = sigma.abs().sort(-1, descending=True)
    x, y, long = (torch.take_along_dim(side, order[..., None, :], -1) for side in (x, y, long))
    back = to_short_side(a, long)
    beyond = torch.zeros_like(sigma[..., 0])
    return Triplets(x, long, sigma, column_norms(y, long, sigma), column_norms(back, x, sigma), beyond), back


def column_norms(image: Tensor, side: Tensor, sigma: Tensor) -> Tensor:
    """Return ‖y − σ x‖ of each pair of columns, [..., n, b] -> [..., b]."""
    return torch.linalg.vector_norm(image - side * sigma[..., None, :], dim=-2)


# Rows of what ``judged`` returns.
MEASURES = ("residual", "orthogonality", "angle", "gap", "captured", "determined", "certified")
CERTIFIED = MEASURES.index("certified")
# What is true of no triplets.
NOTHING = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64, device="cpu")


def judged(problem: Problem, found: Triplets) -> Tensor:
    """Return ``MEASURES`` of the first k triplets, [7, ...]; see ``SvdEvidence``."""
    rank, tolerance, sigma = problem.rank, problem.tolerance, found.sigma
    largest, last, short = sigma[..., 0], sigma[..., rank - 1], min(problem.a.shape[-2:])
    zero = torch.zeros_like(largest)
    following = sigma[..., rank] if sigma.shape[-1] > rank else zero
    scale = torch.where(largest > 0, largest, 1.0)
    residual = torch.maximum(found.forward, found.backward)[..., :rank].amax(-1) / scale
    orthogonality = torch.maximum(*(_defect(side[..., :rank]) for side in (found.short, found.long)))
    if rank == short:  # no cut
        angle, gap, determined, is_top = zero, zero + 1.0, zero == 0, zero == 0
    else:
        angle = angle_to_top(found, rank)
        gap = torch.where(last > 0, (last - following) / torch.where(last > 0, last, 1.0), 0.0)
        # Where this does not hold, no solver in float64 can tell, as σ_{k+1} is no less than what was found of it.
        determined = tolerance * (last - following) > SVD_ROUNDING * largest
        is_top = found.beyond.sqrt() <= last + tolerance * largest
    captured = sigma[..., :rank].square().sum(-1) / torch.where(problem.squares > 0, problem.squares, 1.0)
    is_exact = (residual <= tolerance) & (orthogonality <= tolerance)
    certified = is_exact & is_top & ((angle <= tolerance) | ~determined)
    return torch.stack([residual, orthogonality, angle, gap, captured, determined.double(), certified.double()])


def angle_to_top(found: Triplets, rank: int) -> Tensor:
    """Bound ‖sin θ‖_F/√k between the first k of b triplets and the true ones, to second order: [...].

    G = AᵀA couples v_i to what is outside of V by σ_i w_i, and to the columns F beyond the k by way of that. What is
    left of A V − U S couples it to both, as ‖(I − V Vᵀ) Aᵀ‖ ≤ √μ:

        θ_i ≤ σ_i ‖w_i‖ / (σ_i² − μ) · (1 + ‖(σ w)_F‖ / (σ_i² − ν²)) + (σ_i ‖E_F‖ + (ν + ‖E_F‖) ‖e_i‖) / (σ_i² − ν²),

    with ν² = max(μ, σ_{k+1}²). The left vectors span A V, and are no farther off.

    This is ``angle_bound`` column by column. With one bound for all of them the rounding of the largest ones, over the
    gap at the cut, is most of it, 2.9e-5 without c, where this is 1.9e-6, 8.1e-6 with c, and the angle 4.3e-7 (rank 32
    and noise of 1e-4, 3072 x 768, k = 76). It is 1 where μ is not below the cut.
    """
    sigma, mu = found.sigma, found.beyond[..., None]
    top, e, tiny = sigma[..., :rank], found.forward[..., :rank], torch.finfo(sigma.dtype).tiny
    missing = sigma * found.backward
    rest, e_f = (torch.linalg.vector_norm(each[..., rank:], dim=-1, keepdim=True) for each in (missing, found.forward))
    nu = torch.cat([sigma[..., rank:], mu.sqrt()], -1).amax(-1, keepdim=True)
    far, near = ((top.square() - each).clamp_min(tiny) for each in (mu, nu.square()))
    angles = missing[..., :rank] / far * (1.0 + rest / near) + (top * e_f + (nu + e_f) * e) / near
    bound = torch.linalg.vector_norm(angles, dim=-1)
    return torch.where(found.beyond < top[..., -1].square(), (bound / math.sqrt(rank)).clamp_max(1.0), 1.0)


def _defect(side: Tensor) -> Tensor:
    gram = side.mT @ side
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return torch.linalg.matrix_norm(gram) / math.sqrt(side.shape[-1])


def shortcoming(measures: Tensor, tolerance: float) -> str:
    """Return in words what keeps one matrix from being certified, from its ``judged``."""
    errors = list(zip(MEASURES, measures.tolist(), strict=True))[:3]
    wrong = [f"{name} {value:.1e}" for name, value in errors if not value <= tolerance]
    if not wrong:
        return "something larger may lie beyond"
    return ", ".join(wrong) + f" above {tolerance:.0e}"
