"""Iso-C: the sum of the deltas with its singular values made equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg.auto import Candidate, polar_candidates
from ..linalg.certificate import symmetry
from ..linalg.protocol import PolarSolver
from .base import RowwiseMerge
from .rowwise.polar import RowwisePolar, fits_rowwise, rowwise_polar_bytes
from .source import DeltaSource, TensorSpec
from .spectral import Spectral, spectral_sum
from .stats import Check, MergeStats


@dataclass(frozen=True, kw_only=True)
class IsoC(Spectral):
    """Δ = σ̄ · U Vᵀ with U Σ Vᵀ = svd(Σ_t Δ_t) and σ̄ the mean singular value.

    Computed as σ̄·polar(S), σ̄ = ‖S‖_*/r: no singular vectors are needed.

    Args:
        Those of ``Spectral``.

    Reference: arXiv 2502.04959 (Iso-C).
    """

    name: ClassVar[str] = "iso-c"
    citation: ClassVar[str] = "arXiv 2502.04959"
    row_map_passes: ClassVar[int] = 1

    def solvers(self, spec: TensorSpec, tasks: int, device: torch.device) -> Sequence[Candidate[PolarSolver]]:
        """See ``Spectral``."""
        return polar_candidates(self.precision, spec.shape, spec.dtype, device)

    def solving_bytes(
        self, candidate: Candidate[PolarSolver], spec: TensorSpec, tasks: int, device: torch.device
    ) -> int:
        """See ``Spectral``."""
        rows, columns = spec.shape[-2:]
        members = spec.elements // max(1, rows * columns)
        sum_dtype = torch.promote_types(candidate.sum_dtype, spec.dtype)
        solving = candidate.solver.workspace_bytes(rows, columns, self.result_dtype(spec.dtype), device)
        return members * (sum_dtype.itemsize * rows * columns + solving)

    def rowwise(self, source: DeltaSource) -> RowwiseMerge:
        """See ``Method``: σ̄ S (SᵀS)^(-1/2), in float64 but for the last product where that is precise enough."""
        return RowwisePolar(source, f"{self.name}/by-rows", rank_policy=self.rank_policy, promise=self.promise)

    def row_map_bytes(self, spec: TensorSpec, tasks: int, block_elements: int, device: torch.device) -> int | None:
        """See ``Method``."""
        if self.solver is not None or not fits_rowwise(spec, self.precision):
            return None
        return rowwise_polar_bytes(spec, block_elements, device)

    def attempt(self, deltas: DeltaSource, candidate: Candidate[PolarSolver]) -> tuple[Tensor, MergeStats]:
        """See ``Spectral``."""
        sum_dtype = torch.promote_types(candidate.sum_dtype, deltas.dtype)
        total, squares, tolerance, of_deltas = spectral_sum(deltas, sum_dtype)
        dtype = self.result_dtype(deltas.dtype)
        if 0 in total.shape:
            return total.to(dtype), MergeStats(self.name, of_deltas)
        min_dim = min(deltas.full_spec.shape[-2:])
        q, stats = candidate.solver.polar(total, tolerance=tolerance, dtype=dtype)
        asymmetry, negative = symmetry(total, q)
        del total
        sigma_mean = self.mean(stats.nuclear_norm, stats.rank, min_dim)
        q *= sigma_mean.to(q.dtype)[..., None, None]
        values = {"sigma_mean": sigma_mean, "rank": stats.rank, "min_dim": min_dim, **of_deltas}
        promise = self.promise
        checks = {
            "orthogonality": Check(stats.orthogonality, promise),
            "asymmetry": Check(asymmetry, promise),
            "negative": Check(negative, promise),
            "unresolved": Check(torch.as_tensor(stats.unresolved, device=q.device).expand(stats.rank.shape), 0),
            "rounding": Check(torch.as_tensor(stats.error, device=q.device).expand(stats.rank.shape), promise),
        }
        if sum_dtype == torch.float32 and stats.spread is not None and stats.sigma is not None:
            # Measured: 0.2 ε rms(σ) rms(1/σ) for T = 8, from 160 x 64 to 4096 x 256; √T for the roundings of a sum. Of
            # experts that cancel, what is rounded is larger than S.
            size = torch.linalg.vector_norm(stats.sigma, dim=-1)
            cancelled = torch.where(size > 0, squares.sum(0).sqrt() / size, 1.0).clamp_min(1.0)
            error = stats.spread * cancelled * (0.1 * torch.finfo(sum_dtype).eps * math.sqrt(deltas.n_tasks))
            checks["sum_rounding"] = Check(error, 0.1 * promise)
        return q, MergeStats(f"{self.name}/{stats.solver}", values, checks)
