"""Polar factor by minimax-optimal odd quintics: products only, nothing is factored but one Cholesky for the bounds.

For X [M, N] with M ≤ N (the tall case is the transpose), X₀ = X/σ₁ with singular values in [ℓ, 1]:

    G = X Xᵀ,    X ← a X + (b G + c G²) X,

with (a, b, c) the odd quintic that is nearest to 1 on the interval where the singular values lie by then. But for the
little room left to rounding, no other sequence of quintics gets the worst of them nearer to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from isomerge_fast import ops

from .polar_iteration import (
    block_elements,
    check_fields,
    default_target,
    dtype_suffix,
    evidence,
    nothing,
    scaled,
    short_polynomial,
    start,
    workspace_bytes,
)
from .protocol import PolarStats
from .sides import short_gram

SMALLEST_LOWER = 1e-8
STEPS_PER_DECADE = 20  # ℓ is rounded down to this grid, by 12 % at most: a few dozen sequences serve all matrices
# The interval that a step is made for reaches beyond the values of the step before by this share of its error: rounding
# puts some beyond their end, and the next quintics magnify the excess twelvefold each. With 0, 384 x 384 in float32
# ends in NaN at κ = 1e6; 0.001 is enough there, and 0.03 costs no step yet.
HEADROOM = 0.01
# Relative half width of an interval below which the Padé step, of error (5/2) δ³, is exact.
NARROWEST = 1e-5


class Quintic(NamedTuple):
    """p(x) = a x + b x³ + c x⁵, with |p − 1| ≤ error on [lower, upper]."""

    a: float
    b: float
    c: float
    lower: float
    upper: float
    error: float


def minimax_quintic(lower: float, upper: float) -> Quintic:
    """The odd quintic with the smallest max |p(x) − 1| on [lower, upper], by Remez exchange.

    p − 1 takes ±error in turn at four points: both ends and the two extremes of p. Solved for as p = x (α + β t + γ t²)
    in t = (x² − m)/w, which covers [−1, 1], the linear system is well-conditioned however narrow the interval is.

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
    """The steps that take singular values from [lower, 1] to within ``target`` of 1; ``lower`` is rounded down."""
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
class PolarExpress:
    """Polar factor by ``quintics``, iterated in ``dtype``; does not truncate (see ``polar_iteration``).

    Attributes:
        dtype: to iterate in, float64 or float32. Small directions are lost to its rounding: the error grows with κ.
        target: how far from 1 the singular values of Q may end by the iteration itself; by default the rounding of
            ``dtype`` or of the result, whichever is coarser.
    """

    dtype: torch.dtype = torch.float64
    target: float | None = None

    def __post_init__(self) -> None:
        check_fields(self.dtype, self.target)

    @property
    def name(self) -> str:
        return f"polar-express-{dtype_suffix(self.dtype)}"

    def polar(
        self, x: Tensor, *, tolerance: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, PolarStats]:
        """See ``PolarSolver``. Reads one number from the device, from which the number of steps follows."""
        dtype = dtype or x.dtype
        if 0 in x.shape:
            return nothing(self.name, x, dtype)
        begun, gram = start(x, tolerance)
        y = scaled(x, begun.scale, self.dtype)
        grams = [gram.to(self.dtype)]  # given away by pop, to be freed as soon as its polynomial is made
        del gram
        for step in quintics(begun.lower, self.target or default_target(self.dtype, dtype)):
            _step(y, grams.pop() if grams else short_gram(y, dtype=self.dtype), step)
        q = y.to(dtype)
        del y
        return q, evidence(self.name, q, x, begun)

    def workspace_bytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """Peak bytes beyond the input: the iterate with G and its polynomial, or with the result."""
        short, elements, size = min(rows, columns), rows * columns, self.dtype.itemsize
        step = size * (elements + short**2 + max(short**2, block_elements(rows, columns)))
        converted = (size + dtype.itemsize) * elements
        return workspace_bytes(rows, columns, max(step, converted), dtype)


def _step(y: Tensor, gram: Tensor, step: Quintic) -> None:
    """In place."""
    polynomial = ops.sym_mm_add(gram, gram, alpha=step.c, beta=step.b)
    del gram
    short_polynomial(polynomial, y, y, beta=step.a)
