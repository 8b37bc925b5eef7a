"""Merge by Iso-C: the sum of the deltas with its singular values made equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg.auto import Candidate, polar_candidates
from ..linalg.certificate import symmetry
from ..linalg.filtered import polar_iteration
from ..linalg.protocol import PolarSolver
from .base import RowwiseMerge
from .rowwise.iso_c import RowwiseIsoC, rowwise_iso_c_bytes
from .rowwise.passes import fits_rowwise
from .small import small_iso_c
from .source import DeltaSource, TensorSpec
from .spectral import Spectral, polar_checks, spectral_mean
from .stats import Check, MergeStats
from .sums import spectral_sum


@dataclass(frozen=True, kw_only=True)
class IsoC(Spectral):
    """Merge by Δ = σ̄ · U Vᵀ with U Σ Vᵀ = svd(Σ_t Δ_t) and σ̄ the mean singular value.

    Computed as σ̄·polar(S), σ̄ = ‖S‖_*/r: no singular vectors are needed.

    Reference: arXiv 2502.04959 (Iso-C).
    """

    name: ClassVar[str] = "iso-c"
    citation: ClassVar[str] = "arXiv 2502.04959"
    rowwise_passes: ClassVar[int] = 1

    def solvers(self, spec: TensorSpec, tasks: int, device: torch.device) -> Sequence[Candidate[PolarSolver]]:
        return polar_candidates(self.precision, spec.shape, spec.dtype, device)

    def stack_candidate(self, spec: TensorSpec, tasks: int) -> Candidate[PolarSolver]:
        solver = polar_iteration(*spec.shape, in_stack=True)
        return Candidate(solver, "products only, the same steps for all matrices of a stack")

    def solving_bytes(
        self, candidate: Candidate[PolarSolver], spec: TensorSpec, tasks: int, device: torch.device
    ) -> int:
        rows, columns = spec.shape[-2:]
        members = spec.elements // max(1, rows * columns)
        sum_dtype = torch.promote_types(candidate.sum_dtype, spec.dtype)
        solving = candidate.solver.workspace_bytes(rows, columns, self.result_dtype(spec.dtype), device)
        return members * (sum_dtype.itemsize * rows * columns + solving)

    def rowwise(self, source: DeltaSource) -> RowwiseMerge:
        """Return σ̄ S (SᵀS)^(-1/2) by rows, in float64 but for the last product where that is precise enough."""
        return RowwiseIsoC(source, f"{self.name}/by-rows", self)

    def rowwise_bytes(self, spec: TensorSpec, tasks: int, block_elements: int, device: torch.device) -> int | None:
        if self.solver is not None or not fits_rowwise(spec, self.precision):
            return None
        return rowwise_iso_c_bytes(spec, block_elements, device)

    def attempt(self, deltas: DeltaSource, candidate: Candidate[PolarSolver]) -> tuple[Tensor, MergeStats]:
        sum_dtype = torch.promote_types(candidate.sum_dtype, deltas.dtype)
        total, squares, zero_limit, of_deltas = spectral_sum(deltas, sum_dtype)
        dtype = self.result_dtype(deltas.dtype)
        if 0 in total.shape:
            return total.to(dtype), MergeStats(self.name, of_deltas)
        if candidate.is_small and deltas.shape == deltas.full_spec.shape:
            found = small_iso_c(total, float(zero_limit))
            if found is not None and found.holds(self.tolerance):
                return found.merged(f"{self.name}/{candidate.solver.name}", dtype, self.tolerance, of_deltas)
        min_dim = min(deltas.full_spec.shape[-2:])
        q, stats = candidate.solver.polar(total, tolerance=zero_limit, dtype=dtype)
        symmetric = symmetry(total, q)
        del total
        sigma_mean = spectral_mean(stats.nuclear_norm, stats.rank, min_dim, self.rank_policy)
        q *= sigma_mean.to(q.dtype)[..., None, None]
        values = {"sigma_mean": sigma_mean, "rank": stats.rank, "min_dim": min_dim, **of_deltas}
        unresolved = torch.as_tensor(stats.unresolved, device=q.device).expand(stats.rank.shape)
        rounding = torch.as_tensor(stats.error, device=q.device).expand(stats.rank.shape)
        checks = polar_checks(self.tolerance, stats.orthogonality, symmetric, unresolved, rounding)
        if sum_dtype == torch.float32 and stats.spread is not None and stats.sigma is not None:
            # Measured: 0.2 ε rms(σ) rms(1/σ) for T = 8, from 160 x 64 to 4096 x 256; √T for the roundings of a sum. Of
            # experts that cancel, what is rounded is larger than S.
            size = torch.linalg.vector_norm(stats.sigma, dim=-1)
            cancelled = torch.where(size > 0, squares.sum(0).sqrt() / size, 1.0).clamp_min(1.0)
            error = stats.spread * cancelled * (0.1 * torch.finfo(sum_dtype).eps * math.sqrt(deltas.n_tasks))
            checks["sum_rounding"] = Check(error, 0.1 * self.tolerance)
        return q, MergeStats(f"{self.name}/{stats.solver}", values, checks)
