"""Polar factor by the dynamically weighted Halley iteration: six steps at most, rational instead of polynomial.

For X [M, N] with M ≤ N (the tall case is the transpose), X₀ = X/σ₁ with singular values in [ℓ, 1]:

    X ← (a I + b G)(I + c G)⁻¹ X = (b/c) X + (a − b/c) (I + c G)⁻¹ X,    G = X Xᵀ,

the weights a, b, c being those that raise ℓ most. While c is large the inverse is not formed: with the thin QR
[√c Xᵀ; I] = [Q₁; Q₂] R it is (I + c G)⁻¹ X = Q₂ Q₁ᵀ / √c, which does not square the condition number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from isomerge_fast import ops

from .polar_iteration import (
    check_fields,
    default_target,
    dtype_suffix,
    empty_result,
    evidence,
    scaled,
    short_polynomial,
    start,
    workspace_bytes,
)
from .protocol import PolarSolver, PolarStats
from .sides import short_gram

LARGEST_CHOLESKY_WEIGHT = 100.0  # of Nakatsukasa and Higham, 2013: κ(I + c G) ≤ 101 costs two digits


class Halley(NamedTuple):
    """x ← x (a + b x²)/(1 + c x²), which takes [lower, 1] into [next_lower, 1]."""

    a: float
    b: float
    c: float
    lower: float
    next_lower: float


def halley_steps(lower: float, target: float) -> tuple[Halley, ...]:
    """The steps that take singular values from [lower, 1] to within ``target`` of 1.

    Reference: Nakatsukasa, Bai, Gygi, "Optimizing Halley's iteration", 2010, (3.19) and (3.20).
    """
    steps: list[Halley] = []
    lower = min(1.0, lower)
    while not steps or 1.0 - lower > target:
        squared = lower**2
        d = (4.0 * (1.0 - squared) / squared**2) ** (1 / 3)
        root = math.sqrt(1.0 + d)
        a = root + 0.5 * math.sqrt(max(0.0, 8.0 - 4.0 * d + 8.0 * (2.0 - squared) / (squared * root)))
        b = (a - 1.0) ** 2 / 4.0
        c = a + b - 1.0
        raised = min(1.0, lower * (a + b * squared) / (1.0 + c * squared))
        steps.append(Halley(a, b, c, lower, raised))
        lower = raised
    return tuple(steps)


@dataclass(frozen=True)
class Qdwh(PolarSolver):
    """Polar factor by ``halley_steps``, iterated in ``dtype``; does not truncate (see ``polar_iteration``).

    Attributes:
        dtype: to iterate in, float64 or float32.
        target: as in ``PolarExpress``.
    """

    dtype: torch.dtype = torch.float64
    target: float | None = None

    def __post_init__(self) -> None:
        check_fields(self.dtype, self.target)

    @property
    def name(self) -> str:
        return f"qdwh-{dtype_suffix(self.dtype)}"

    def polar(
        self, x: Tensor, *, tolerance: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, PolarStats]:
        """See ``PolarSolver``. Reads one number from the device, from which the weights follow."""
        dtype = dtype or x.dtype
        if 0 in x.shape:
            return empty_result(self.name, x, dtype)
        begun, gram = start(x, tolerance)
        y = scaled(x, begun.scale, self.dtype)
        steps = halley_steps(begun.lower, self.target or default_target(self.dtype, dtype))
        grams = [gram.to(self.dtype)] if steps[0].c <= LARGEST_CHOLESKY_WEIGHT else []  # given away by pop
        del gram
        for step in steps:
            if step.c > LARGEST_CHOLESKY_WEIGHT:
                y = qr_step(y, step)
            else:
                cholesky_step(y, grams.pop() if grams else short_gram(y, dtype=self.dtype), step)
        q = y.to(dtype)
        del y
        return q, evidence(self.name, q, x, begun)

    def workspace_bytes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
        """Peak bytes beyond the input: the iterate with [√c Xᵀ; I], the Q of its QR, R and LAPACK's blocks of 64, and
        what its threads take (32 columns; none on one thread).
        """
        short, elements, size = min(rows, columns), rows * columns, self.dtype.itemsize
        step = size * (3 * (elements + short**2) + 72 * short + 32 * (rows + columns))
        converted = (size + dtype.itemsize) * elements
        return workspace_bytes(rows, columns, max(step, converted), dtype, device)


def qr_step(y: Tensor, step: Halley) -> Tensor:
    """One step by the QR factorisation, into a new tensor; ``y`` stays as it is."""
    wide = y.shape[-2] <= y.shape[-1]
    length, short = max(y.shape[-2:]), min(y.shape[-2:])
    stacked = torch.zeros(*y.shape[:-2], length + short, short, dtype=y.dtype, device=y.device)
    torch.mul(y.mT if wide else y, math.sqrt(step.c), out=stacked[..., :length, :])
    stacked[..., length:, :].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    q = torch.linalg.qr(stacked).Q
    del stacked
    top, bottom = q[..., :length, :], q[..., length:, :]
    left, right = (bottom, top.mT) if wide else (top, bottom.mT)
    ratio = step.b / step.c
    return ops.mm_add(y, left, right, alpha=(step.a - ratio) / math.sqrt(step.c), beta=ratio)


def cholesky_step(y: Tensor, gram: Tensor, step: Halley) -> None:
    """One step on ``y`` in place, from its Gram matrix, which is overwritten too."""
    gram.mul_(step.c).diagonal(dim1=-2, dim2=-1).add_(1.0)
    lower = torch.linalg.cholesky_ex(gram).L
    del gram
    # The explicit inverse is one product with the long side instead of two triangular solves; κ ≤ 1 + c.
    inverse = torch.cholesky_inverse(lower)
    del lower
    ratio = step.b / step.c
    short_polynomial(inverse.mul_(step.a - ratio), y, y, beta=ratio)
