"""Find polar factors of matrices of full rank by products, with the sums over σ that Iso-CTS asks for.

The eigenvalues of the symmetric positive definite H = QᵀX of a polar factor are the singular values of X. With

    1/s² = ∫ t e^(−ts) dt = ∫ t² e^(−ts) d(log t),    Σ_ij 1/(σ_i + σ_j)² = ∫ t² (tr e^(−tH))² d(log t),

and likewise Σ 1/σ² and Σ 1/(σ + 1)². With t doubled from node to node the trapezoidal rule is off by 5e-5 of it, and
every node costs one symmetric product: e^(−2tH) is the square of e^(−tH).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import sym_mm, sym_mm_add
from .polar_express import PolarExpress
from .polar_iteration import bounds_and_gram
from .protocol import HeatTraces, PolarSolver, PolarStats

# The first t, in units of 1/σ₁. Below it all e^(−tσ) count as 1 more or less, and the nodes that are left out add up to
# a third of the first; the truncated series for e^(−tH) is off by 3e-7.
FIRST = 0.125
# t σ_r of the last node at least: what lies beyond is 1e-5 of the whole.
LAST = 8.0


@dataclass(frozen=True)
class TracedPolar(PolarSolver):
    """Find polar(X) by ``PolarExpress`` in float64, with ``PolarStats.traces`` in place of ``PolarStats.sigma``."""

    otherwise: PolarSolver  # of a batch that has a matrix with a singular value at or below the tolerance
    lower: float | None = None  # as of ``PolarIteration``; nothing is solved ``otherwise`` then

    @property
    def name(self) -> str:
        return f"{PolarExpress().name}, {self.otherwise.name}"

    def polar(
        self, x: Tensor, *, tolerance: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, PolarStats]:
        """Return (Q, evidence); read one number from the device, and what ``otherwise`` reads."""
        dtype = dtype or x.dtype
        if 0 not in x.shape:
            bounds, *grams = bounds_and_gram(x, tolerance, self.lower)
            if bounds.all_solved:
                q, stats = PolarExpress().iterate(x, bounds, grams, torch.float64)
                h = sym_mm(x, q.mT) if x.shape[-2] <= x.shape[-1] else sym_mm(q.mT, x)
                return q.to(dtype), replace(stats, traces=heat_traces(h, bounds.scale, bounds.lower))
            del grams
        return self.otherwise.polar(x, tolerance=tolerance, dtype=dtype)

    def workspace_bytes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return the peak bytes of either solver, or of the result with H and four of its size for its powers."""
        traced = 8 * rows * columns + 5 * 8 * min(rows, columns) ** 2
        solvers = (PolarExpress(), self.otherwise)
        return max(traced, *(solver.workspace_bytes(rows, columns, dtype, device) for solver in solvers))


def heat_traces(h: Tensor, scale: Tensor, lower: float) -> HeatTraces:
    """Return the traces of a symmetric H [..., r, r] float64 with eigenvalues in [lower, 1] / ``scale``."""
    x = h * (FIRST * scale)[..., None, None]
    square = sym_mm(x)
    # e^(−x) = 1 − x + x²/2 + x² (x²/24 − x/6).
    power = sym_mm_add(0.5 * square - x, square, square / 24 - x / 6, gamma=1.0)
    del x, square
    first, norms = power.diagonal(dim1=-2, dim2=-1).sum(-1), []
    for _ in range(math.ceil(math.log2(LAST / (FIRST * lower)))):
        if norms:
            power = sym_mm(power)
        norms.append(torch.linalg.vector_norm(power, dim=(-2, -1)))
    traces = torch.cat([first[..., None], torch.stack(norms, dim=-1).square()], dim=-1)
    nodes = torch.arange(traces.shape[-1], dtype=torch.float64, device=h.device)
    times = scale[..., None] * FIRST * torch.exp2(nodes)
    weights = math.log(2.0) * times.square() * torch.where(nodes == 0, 4 / 3, 1.0)
    return HeatTraces(times, weights, traces)
