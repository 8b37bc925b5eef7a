"""Find polar factors of matrices of full rank by products, with the sums over σ that Iso-CTS asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import sym_mm
from .heat_traces import heat_traces
from .polar_express import PolarExpress
from .polar_iteration import bounds_and_gram
from .protocol import PolarSolver, PolarStats


@dataclass(frozen=True)
class TracedPolar(PolarSolver):
    """Find polar(X) by ``PolarExpress`` in float64, with ``PolarStats.traces`` in place of ``PolarStats.sigma``.

    Attributes:
        otherwise: the solver of a batch that has a matrix with a singular value at or below the tolerance.
    """

    otherwise: PolarSolver

    @property
    def name(self) -> str:
        return f"{PolarExpress().name}, {self.otherwise.name}"

    def polar(
        self, x: Tensor, *, tolerance: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, PolarStats]:
        """Return (Q, evidence); read one number from the device, and what ``otherwise`` reads."""
        dtype, grams = dtype or x.dtype, []
        if 0 not in x.shape:
            bounds, gram = bounds_and_gram(x, tolerance)
            if bounds.all_solved:
                grams.append(gram)
                del gram
                q, stats = PolarExpress().iterate(x, bounds, grams, torch.float64)
                h = sym_mm(x, q.mT) if x.shape[-2] <= x.shape[-1] else sym_mm(q.mT, x)
                return q.to(dtype), replace(stats, traces=heat_traces(h, bounds.scale, bounds.lower))
            del gram
        return self.otherwise.polar(x, tolerance=tolerance, dtype=dtype)

    def workspace_bytes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return the peak bytes of either solver, or of the result with H and four of its size for its powers."""
        traced = 8 * rows * columns + 5 * 8 * min(rows, columns) ** 2
        solvers = (PolarExpress(), self.otherwise)
        return max(traced, *(solver.workspace_bytes(rows, columns, dtype, device) for solver in solvers))
