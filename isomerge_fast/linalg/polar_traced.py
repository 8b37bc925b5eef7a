"""Polar factors of matrices of full rank by products, with what else is asked of those in Iso-CTS."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import sym_mm
from .heat_traces import heat_traces
from .polar_express import PolarExpress
from .polar_iteration import start
from .protocol import PolarSolver, PolarStats


@dataclass(frozen=True)
class TracedPolar(PolarSolver):
    """Polar factor by ``PolarExpress`` in float64, with ``PolarStats.traces`` in place of ``PolarStats.sigma``.

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
        """See ``PolarSolver``. Reads one number from the device, and what ``otherwise`` reads."""
        dtype = dtype or x.dtype
        if 0 in x.shape:
            return self.otherwise.polar(x, tolerance=tolerance, dtype=dtype)
        begun, gram = start(x, tolerance)
        if not begun.complete:
            del gram
            return self.otherwise.polar(x, tolerance=tolerance, dtype=dtype)
        grams = [gram]
        del gram
        q, stats = PolarExpress().iterate(x, begun, grams, torch.float64)
        h = sym_mm(x, q.mT) if x.shape[-2] <= x.shape[-1] else sym_mm(q.mT, x)
        return q.to(dtype), replace(stats, traces=heat_traces(h, begun.scale, begun.lower))

    def workspace_bytes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
        """Peak bytes beyond the input: of either solver; or the result with H, and four of its size for its powers."""
        traced = 8 * rows * columns + 5 * 8 * min(rows, columns) ** 2
        solvers = (PolarExpress(), self.otherwise)
        return max(traced, *(solver.workspace_bytes(rows, columns, dtype, device) for solver in solvers))
