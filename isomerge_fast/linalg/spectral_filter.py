"""Find the bottom eigenvectors of a symmetric H ≥ 0 by products: a filter by the sign of H − μI, then Rayleigh-Ritz.

With X = sign(H − μI) the filter P = (I − X)/2 is the projector on the directions below μ. The sign is made by odd
polynomials, three symmetric products each; μ only has to leave about the right number of directions below it, as the
few at the cut are told apart by Rayleigh-Ritz in the range of P. An eigensolver goes through H column by column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..ops import mm_add, sym_mm, sym_mm_add, thin_mm
from .certificate import fixed_draw
from .cusolver import eigh
from .polar_express import quintics
from .thin import flagged_qr

# Columns beyond those wanted, as a share of all, and the fewest: half of them are for errors in counting, half for the
# directions that the filter leaves between 0 and 1. The count was off by at most 1.5 % of r (r = 512 … 1024, T = 8,
# decay and noise, square and wide).
PADDING, LEAST_PADDING = 0.08, 16
# ‖H‖ in units of μ is up to 740 (4096 x 4096, "decay"), and a direction 4 % of r away from μ differs by a fifth of it.
SIGN_LOWER, SIGN_TARGET = 2e-4, 1e-8
# Chebyshev polynomials and vectors by which the directions below μ are counted.
COUNTING_DEGREE, COUNTING_VECTORS = 160, 8
# Degrees whose images are held at once: all of them would be more than H where its side is below 1300.
COUNTING_BLOCK = 32
# Values of μ/‖H‖ that are looked at.
COUNTING_GRID = 768
SMALLEST_CUT = 1e-4
# How much of P may lie outside of its block, as a trace: what is missed below μ is 1 each. A direction that counts as
# below is one that P keeps by more than the rest.
MOST_OUTSIDE = 0.25


@dataclass(frozen=True)
class BottomBlock:
    """Hold approximate eigenvectors of the bottom of H [..., r, r], and how far they are to be trusted.

    Attributes:
        vectors: [..., r, w] float64, orthonormal, values ascending. The first ``count`` are those wanted.
        values: their Rayleigh quotients, [..., w].
        angle: ‖sin θ‖_F / √count between the span of the first ``count`` and the true one, [...]; a bound where not
            ``missed``.
        missed: bool, [...]: directions below the cut may lie outside.
    """

    vectors: Tensor
    values: Tensor
    angle: Tensor
    missed: Tensor


def block_width(side: int, count: int) -> int:
    """Return the columns of a block for ``count`` directions: a multiple of 8, or all."""
    padding = max(LEAST_PADDING, math.ceil(PADDING * side))
    return min(side, -(-(count + padding) // 8) * 8)


def bottom_block(
    h: Tensor, largest: Tensor, count: int, *, dtype: torch.dtype = torch.float64, products: str | None = None
) -> BottomBlock:
    """Return the bottom ``count`` eigenvectors of H [..., r, r] float64, with some more, certified.

    ``largest`` [...] bounds ‖H‖₂ from above. The filter is made in ``dtype``, of float32 by ``products`` (``ops.mm``),
    all else in float64. Nothing is read from the device, and nothing is decided for a batch as a whole.
    """
    side, width = h.shape[-1], block_width(h.shape[-1], count)
    if width == side:  # all of them
        values, vectors = eigh(h)
        whole = torch.zeros(h.shape[:-2], dtype=torch.float64, device=h.device)
        return BottomBlock(vectors, values, whole, whole > 0)
    scaled = h / largest[..., None, None]
    cut = counted_cut(scaled, (count + width) / 2.0)
    sign = sign_of(scaled, cut, dtype, products)
    x = fixed_draw(side, width, torch.float64, h.device).expand(*h.shape[:-1], width)
    missed = torch.zeros(h.shape[:-2], dtype=torch.bool, device=h.device)
    # Twice: what the first pass leaves of the large σ, 1e-8 of it, is filtered away by the second.
    for _ in range(2):
        x, _, again = flagged_qr(_filtered(sign, x))
        missed |= again
    image = thin_mm(scaled, x)
    values, turn = eigh(_symmetric(x.mT @ image))
    x = thin_mm(x, turn)
    residuals = torch.linalg.vector_norm(thin_mm(image, turn) - x * values[..., None, :], dim=-2)
    missed = missed | _is_incomplete(sign, x, count)
    return BottomBlock(x, values * largest[..., None], _angle_bound(values, residuals, cut, count), missed)


def _angle_bound(values: Tensor, residuals: Tensor, cut: Tensor, count: int) -> Tensor:
    """Bound ‖sin θ‖_F/√c between the first c Ritz vectors E of X = [E, F] and eigenvectors, to second order: [...].

    As ``subspace_chebyshev.angle_bound``, but each column of F with its own distance: the last ones are no eigenvectors
    at all, and far away. What lies outside of X, of which P keeps little, is above μ.
    """
    tiny = torch.finfo(values.dtype).tiny
    last = values[..., max(0, count - 1), None]
    far = (torch.minimum(values[..., -1], cut) - last[..., 0]).clamp_min(tiny)
    coupled = residuals[..., count:] / (values[..., count:] - last).clamp_min(tiny)
    own = torch.linalg.vector_norm(residuals[..., :count], dim=-1)
    return own / far * (1.0 + torch.linalg.vector_norm(coupled, dim=-1)) / math.sqrt(max(1, count))


def counted_cut(h: Tensor, below: float) -> Tensor:
    """Return μ with about ``below`` eigenvalues of H [..., r, r] below it, [...]; those of H are in [0, 1].

    The count is the trace of a Chebyshev series for the step, damped after Jackson so that it grows with μ, of which
    products with a few random vectors are an estimate: N(μ) = Σ_j c_j(μ) E vᵀ T_j(2H − I) v.

    Reference: Di Napoli, Polizzi, Saad, "Efficient estimation of eigenvalue counts in an interval", 2016.
    """
    side, device = h.shape[-1], h.device
    moved = 2.0 * h
    moved.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    draw = fixed_draw(side, COUNTING_VECTORS, torch.float64, device)
    start = draw * (math.sqrt(side / COUNTING_VECTORS) / torch.linalg.vector_norm(draw, dim=0))
    images = torch.empty(COUNTING_BLOCK + 2, *h.shape[:-1], COUNTING_VECTORS, dtype=torch.float64, device=device)
    images[0] = start
    images[1] = moved @ images[0]
    first = (images[0] * images[1]).sum((-2, -1))
    even, odd = [], []
    for _ in range(0, COUNTING_DEGREE, COUNTING_BLOCK):
        for before, now, out in zip(images, images[1:], images[2:], strict=False):
            mm_add(before, moved, now, alpha=2.0, beta=-1.0, out=out)
        # T_2j = 2 T_j² − 1 and T_2j+1 = 2 T_j T_j+1 − T_1.
        even.append(2.0 * images[:-2].square().sum((-2, -1)) - side)
        odd.append(2.0 * (images[:-2] * images[1:-1]).sum((-2, -1)) - first)
        images[:2] = images[-2:].clone()
    moments = torch.cat([*even, *odd], dim=0)
    grid, series = _counting_series(device)
    counts = (series @ moments.reshape(len(moments), -1)).view(-1, *h.shape[:-2])
    index = (counts < below).sum(0).clamp_max(len(grid) - 1)
    return grid[index]


@lru_cache(maxsize=4)
def _counting_series(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (μ [g], the coefficients c_j(μ) [g, moments]), even moments before odd ones; not to be written to."""
    with torch.inference_mode(False):
        last = 2 * COUNTING_DEGREE
        grid = torch.logspace(math.log10(SMALLEST_CUT), 0.0, COUNTING_GRID, dtype=torch.float64, device="cpu")
        j = torch.arange(last, dtype=torch.float64, device="cpu")
        step = math.pi / (last + 1)
        damping = ((last - j + 1) * (step * j).cos() + (step * j).sin() / math.tan(step)) / (last + 1)
        angle = torch.acos((2.0 * grid - 1.0).clamp(-1.0, 1.0))[:, None]
        series = torch.cat([(math.pi - angle) / math.pi, -2.0 / math.pi * (angle * j[1:]).sin() / j[1:]], dim=1)
        series *= damping
        return grid.to(device), torch.cat([series[:, ::2], series[:, 1::2]], dim=1).to(device)


def sign_of(h: Tensor, cut: Tensor, dtype: torch.dtype = torch.float64, products: str | None = None) -> Tensor:
    """Return sign(H − μI) in ``dtype`` of H [..., r, r] with ‖H‖ ≤ 1, by odd minimax quintics of symmetric products.

    What is nearer to μ than ``SIGN_LOWER`` ends between −1 and 1.

    Reference: Amsel, Persson, Musco, Gower, "The Polar Express", 2025 (arXiv 2505.16932), for the polynomials.
    """
    x = h.clone()
    x.diagonal(dim1=-2, dim2=-1).sub_(cut[..., None])
    # Of those below μ the farthest is μ away, of those above it 1 − μ.
    x = (x / torch.maximum(cut, 1.0 - cut)[..., None, None]).to(dtype)
    for step in quintics(SIGN_LOWER, SIGN_TARGET):
        square = sym_mm(x, x.mT, precision=products)
        polynomial = sym_mm_add(square, square.mT, alpha=step.c, beta=step.b, gamma=step.a, precision=products)
        x = sym_mm(x, polynomial.mT, precision=products)
    return x


def _filtered(sign: Tensor, x: Tensor) -> Tensor:
    """Return P X = (X − sign X)/2 in float64."""
    return 0.5 * (x - thin_mm(sign, x.to(sign.dtype)))


def _symmetric(x: Tensor) -> Tensor:
    return 0.5 * (x + x.mT)


def _is_incomplete(sign: Tensor, x: Tensor, count: int) -> Tensor:
    """Return whether some of the bottom ``count`` directions may be missing from the block X, [...].

    What P keeps outside of X is tr P − tr XᵀPX. It is at least what P keeps of any direction there; and of each that is
    wanted P has to keep more.
    """
    kept = (x * _filtered(sign, x)).sum(-2)
    outside = 0.5 * (sign.shape[-1] - sign.diagonal(dim1=-2, dim2=-1).double().sum(-1)) - kept.sum(-1)
    # Not `>`: NaN is incomplete.
    is_complete = (outside <= MOST_OUTSIDE) & (kept[..., :count].amin(-1) >= 1.0 - MOST_OUTSIDE)
    return ~is_complete
