"""Find polar factors by Newton-Schulz on the Gram matrix alone: X itself is touched once per restart.

For X [M, N] with M ≤ N (the tall case is the transpose), G = X Xᵀ and the quintics p_k(x) = x h_k(x²) of
``polar_express``:

    H = a I + b G + c G²,    P ← P H,    G ← H G H,    and in the end    Q = P X.

All of that is r x r: at aspect 4 a step takes a third of the operations that it takes on X, on a square X as many. The
price is precision: G holds the squares of the singular values, each with an error of ε times the largest. A restart,
X ← P X and G = X Xᵀ anew, comes before that tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isomerge_fast import ops

from .blockwise import multiply_short_side, short_side_gram
from .polar_express import Quintic, quintics
from .polar_iteration import Bounds, PolarIteration, dtype_suffix, largest_block
from .protocol import PolarStats

RESTARTS = 3  # how often, at most, the Gram matrix is formed anew


@dataclass(frozen=True)
class GramNewtonSchulz(PolarIteration):
    """Find polar(X) by polynomials of the Gram matrix; does not truncate (see ``polar_iteration``).

    Reference: Dao-AILab/gram-newton-schulz, 2025 (the iteration and its restarts).
    """

    @property
    def name(self) -> str:
        return f"gram-newton-schulz-{dtype_suffix(self.dtype)}"

    def iterate(self, x: Tensor, bounds: Bounds, grams: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, PolarStats]:
        """Iterate on G; without a restart the only tensor of the size of X is the result."""
        *early, last = split(quintics(bounds.lower, self.target_for(dtype)), self.dtype)
        grams.append(grams.pop().to(self.dtype))
        y, scale = x, bounds.scale.to(self.dtype)[..., None, None]
        for segment in early:
            polynomial = _accumulate(grams.pop(), segment).mul_(scale)
            out = torch.empty(x.shape, dtype=self.dtype, device=x.device) if y is x else y
            y, scale = multiply_short_side(polynomial, y, out, in_blocks=True), 1.0
            del polynomial, out
            grams.append(short_side_gram(y, dtype=self.dtype))
        polynomial = _accumulate(grams.pop(), last).mul_(scale)
        q = multiply_short_side(polynomial, y, torch.empty(x.shape, dtype=dtype, device=x.device), in_blocks=True)
        del y, polynomial
        return q, self.evidence(q, x, bounds)

    def iterating_bytes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return the bytes of the iterate, which a restart needs, with four r x r or with the result."""
        short, elements, size = min(rows, columns), rows * columns, self.dtype.itemsize
        applying = dtype.itemsize * elements + size * (short**2 + largest_block(rows, columns, device))
        return size * elements + max(4 * size * short**2, applying)


def split(steps: Sequence[Quintic], dtype: torch.dtype) -> list[Sequence[Quintic]]:
    """Cut ``steps`` into segments between which the Gram matrix is formed anew, by equal shares of the growth of ℓ.

    A Gram matrix with values in [ℓ², 1] gives the smallest a relative error of ε/ℓ². Every segment begins at an ℓ of
    ε^(1/6) or more (2e-3 in float64, 7e-2 in float32), as far as ``RESTARTS`` allows.
    """
    growth = math.log(steps[0].upper / steps[0].lower)
    segments = min(RESTARTS + 1, max(1, math.ceil(growth / (-math.log(torch.finfo(dtype).eps) / 6))))
    cuts = [0]
    for share in range(1, segments):
        left = growth * (1 - share / segments)
        cut = next((i for i, step in enumerate(steps) if math.log(step.upper / step.lower) <= left), len(steps) - 1)
        cuts.append(max(cut, cuts[-1] + 1))
    cuts = [cut for cut in cuts if cut < len(steps)]
    return [steps[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(steps)], strict=True)]


def _accumulate(gram: Tensor, steps: Sequence[Quintic]) -> Tensor:
    """Return P = Π h_k, the polynomial of G by which ``steps`` multiply X; overwrites G.

    Second factors are given as their transposes, which they equal: tiles of both then lie along rows (H200: 1.47 ms
    instead of 1.70 at 4096).
    """
    polynomial = None
    for index, step in enumerate(steps):
        factor = ops.sym_mm_add(gram, gram, alpha=step.c, beta=step.b, gamma=step.a)
        if index + 1 < len(steps):
            ops.sym_mm(ops.sym_mm(factor, gram.mT), factor.mT, out=gram)
        polynomial = factor if polynomial is None else ops.sym_mm(polynomial, factor.mT)
    assert polynomial is not None
    return polynomial
