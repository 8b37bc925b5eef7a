"""Find polar factors by minimax-optimal odd quintics: products only, and one Cholesky factor for the bounds.

For X [M, N] with M ≤ N (the tall case is the transpose), X₀ = X/σ₁ with singular values in [ℓ, 1]:

    G = X Xᵀ,    X ← a X + (b G + c G²) X,

with (a, b, c) the odd quintic that is nearest to 1 on the interval where the singular values lie by then. Apart from
the little room left to rounding, no other sequence of quintics gets the worst of them nearer to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from isomerge_fast import ops

from .blockwise import multiply_short_side
from .polar_iteration import PRODUCT_EPS, Bounds, PolarIteration, dtype_suffix, inverse_size, largest_block
from .protocol import PolarStats

SMALLEST_LOWER = 1e-8
STEPS_PER_DECADE = 20  # ℓ is rounded down to this grid, by 12 % at most: a few dozen sequences serve all matrices
# The interval that a step is made for reaches beyond the values of the step before by this share of its error: rounding
# puts some beyond their end, and the next quintics magnify the excess twelvefold each. With 0, 384 x 384 in float32
# ends in NaN at κ = 1e6; 0.001 is enough there, and 0.03 costs no step yet.
HEADROOM = 0.01
# Relative half width of an interval below which the Padé step, of error (5/2) δ³, is exact.
NARROWEST = 1e-5

# ‖dQ‖_F / √r by rounding to ε, as it came out in float32 and bf16x3 from 128 x 128 to 600 x 600 and from 512 x 64 to
# 128 x 300, κ = 10 … 1e6. The spectra: log-spaced, flat beneath a few large values, in two halves, with one small
# value, and all where the first quintic is least. At most 1.2 ε σ₁/σ_r, for which float64 has room. In terms of
# ε σ₁ rms(1/σ), what is an error of a tier and no asymmetry is at most 0.45 for square matrices and
# 2.7 √(1 − short/long) for long ones, where every direction turns by itself to what is beyond the short side.
WORST_ROUNDING = 2.0
PAIRS_ROUNDING, BEYOND_ROUNDING = 0.5, 3.0
# Of products of two parts that round by up to 2⁻¹⁶, as they come out together.
TYPICAL_EPS = {"bf16x3": 2.0**-19}


class Quintic(NamedTuple):
    """Hold p(x) = a x + b x³ + c x⁵, with |p − 1| ≤ error on [lower, upper]."""

    a: float
    b: float
    c: float
    lower: float
    upper: float
    error: float


def minimax_quintic(lower: float, upper: float) -> Quintic:
    """Return the odd quintic with the smallest max |p(x) − 1| on [lower, upper], by Remez exchange.

    p − 1 takes ±error in turn at four points: both ends and the two extremes of p. With p = x (α + β t + γ t²) and
    t = (x² − m)/w, which covers [−1, 1], the linear system is well-conditioned however narrow the interval is.

    Reference: Amsel, Persson, Musco, Gower, "The Polar Express", 2025 (arXiv 2505.16932), §3.
    """
    m, w = (lower**2 + upper**2) / 2, (upper**2 - lower**2) / 2
    if upper - lower <= NARROWEST * (upper + lower):
        middle = (lower + upper) / 2
        half = (upper - lower) / (upper + lower)
        return Quintic(15 / 8 / middle, -10 / 8 / middle**3, 3 / 8 / middle**5, lower, upper, 2.5 * half**3)
    inner = np.array([-0.5, 0.5])
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    alpha = beta = gamma = error = 0.0
    for _ in range(100):
        t = np.array([-1.0, *inner, 1.0])
        x = np.sqrt(m + w * t)
        x[0], x[-1] = lower, upper
        alpha, beta, gamma, error = np.linalg.solve(np.stack([x, x * t, x * t**2, signs], axis=1), np.ones(4)).tolist()
        # dp/dx = 0 is a quadratic in t.
        half_sum = -(3 * beta + 4 * gamma * m / w) / (10 * gamma)
        root = math.sqrt(max(0.0, half_sum**2 - (alpha + 2 * beta * m / w) / (5 * gamma)))
        moved = np.clip(np.array([half_sum - root, half_sum + root]), -1.0, 1.0)
        settled = float(np.abs(moved - inner).max()) <= 1e-10
        inner = moved
        if settled:
            break
    a = alpha - beta * m / w + gamma * (m / w) ** 2
    return Quintic(a, beta / w - 2 * gamma * m / w**2, gamma / w**2, lower, upper, abs(error))


def quintics(lower: float, target: float) -> tuple[Quintic, ...]:
    """Return the steps that take singular values in [lower, 1] to within ``target`` of 1; ``lower`` is rounded down."""
    exponent = math.floor(STEPS_PER_DECADE * math.log10(min(1.0, max(lower, SMALLEST_LOWER))) + 1e-9)
    return _quintics(exponent, target)


@lru_cache(maxsize=1024)
def _quintics(exponent: int, target: float) -> tuple[Quintic, ...]:
    lower, upper = 10 ** (exponent / STEPS_PER_DECADE), 1.0
    steps: list[Quintic] = []
    while not steps or steps[-1].error > target:
        step = minimax_quintic(lower, upper)
        steps.append(step)
        # At a tiny lower end, 1 − error would be all cancellation.
        lower = lower * (step.a + step.b * lower**2 + step.c * lower**4)
        upper = 1.0 + (1.0 + HEADROOM) * step.error
    return tuple(steps)


@dataclass(frozen=True)
class PolarExpress(PolarIteration):
    """Find polar(X) by ``quintics``; does not truncate (see ``polar_iteration``).

    Attributes:
        products: precision of float32 products (``ops.mm``): ``"bf16x3"`` where 2⁻¹⁶ is enough.
        largest_error: the largest error of Q by rounding, relative to its norm. Where more is predicted for every
            matrix of a batch, the iteration is not begun: it takes most of the time, and its result would be discarded.
    """

    products: str | None = None
    largest_error: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.products is not None and (self.products not in PRODUCT_EPS or self.dtype != torch.float32):
            known = ", ".join(PRODUCT_EPS)
            raise ValueError(f"products: float32 ones have {known}, got {self.products!r} for {self.dtype}")

    @property
    def name(self) -> str:
        return f"polar-express-{self.products or dtype_suffix(self.dtype)}"

    def iterate(self, x: Tensor, bounds: Bounds, grams: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, PolarStats]:
        """Iterate on X itself; raise LinAlgError where more than ``largest_error`` is predicted, which is one read."""
        error = self._rounding(bounds, grams[0], x)
        if self.largest_error is not None and bool((error > self.largest_error).all()):
            raise torch.linalg.LinAlgError(
                f"rounding would leave an error of {float(error.amin()):.0e}, {self.largest_error:.0e} is allowed"
            )
        # Not by mul(out=…), which makes a copy of X in its own dtype where ``self.dtype`` is another.
        scale = bounds.scale.to(self.dtype)[..., None, None]
        y = torch.empty(x.shape, dtype=self.dtype, device=x.device).copy_(x).mul_(scale)
        grams.append(grams.pop().to(self.dtype))
        wide = x.shape[-2] <= x.shape[-1]
        for step in quintics(bounds.lower, self.target_for(dtype, self.products)):
            gram = grams.pop() if grams else ops.sym_mm(y if wide else y.mT, precision=self.products)
            polynomial = ops.sym_mm_add(gram, gram, alpha=step.c, beta=step.b, precision=self.products)
            del gram
            multiply_short_side(polynomial, y, y, beta=step.a, precision=self.products)
            del polynomial
        q = y.to(dtype)
        del y
        return q, replace(self.evidence(q, x, bounds), error=error)

    def iterating_bytes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return the bytes of the iterate with G and its polynomial, or with the result.

        The parts of products in bf16x3 are twelve bytes of every element, and eight while they are made.
        """
        short, elements, size = min(rows, columns), rows * columns, self.dtype.itemsize
        step = size * (elements + short**2 + max(short**2, largest_block(rows, columns, device)))
        if self.products:
            step += 20 * (elements + short**2)
        converted = 0 if dtype == self.dtype else dtype.itemsize * elements
        return max(step, size * elements + converted)

    def _rounding(self, bounds: Bounds, gram: Tensor, x: Tensor) -> Tensor:
        """Estimate ``PolarStats.error``."""
        if self.dtype == torch.float64:
            error = WORST_ROUNDING * torch.finfo(self.dtype).eps / (bounds.smallest * bounds.scale)
        else:
            eps = TYPICAL_EPS.get(self.products or "", torch.finfo(self.dtype).eps)
            short, long = sorted(x.shape[-2:])
            error = math.hypot(PAIRS_ROUNDING, BEYOND_ROUNDING * math.sqrt(1 - short / long)) * eps * inverse_size(gram)
        return torch.where(bounds.solved, error, 0.0)
