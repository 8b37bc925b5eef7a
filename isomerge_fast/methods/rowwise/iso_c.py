"""Merge tall matrices by Iso-C in passes over blocks b of rows; N x N numbers are kept from a pass.

Δ_b = σ̄ S_b A with A = V Σ⁻¹ Vᵀ from SᵀS = Σ_b S_bᵀ S_b = V Σ² Vᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...linalg.certificate import PROBES
from ...linalg.gram_spectrum import eigh_workspace_bytes
from ..source import DeltaSource, RowBlock, TensorSpec
from ..spectral import polar_checks, spectral_mean
from ..stats import MergeStats
from .passes import (
    ROUNDING,
    ResidualEstimator,
    RowwiseSpectral,
    chunk_bytes,
    newton_schulz,
    part_bytes,
    product_gram,
    product_rounding,
    sum_spectrum,
)


class RowwiseIsoC(RowwiseSpectral):
    """Make σ̄ · polar(S) by rows, after two passes, or three where S is ill-conditioned."""

    def learn(self, source: DeltaSource, rank_policy: str) -> None:
        columns = source.shape[1]
        spectrum, self._norm, _, of_deltas = sum_spectrum(source, columns, ROUNDING)
        self._unresolved, self._error = spectrum.unresolved.sum(), spectrum.skew_error()
        vectors, sigma = spectrum.top(spectrum.rank)
        self._evidence = ResidualEstimator(columns, source.device)
        self._expected = vectors @ (vectors.mT @ self._evidence.omega)
        del vectors
        rank = torch.tensor(spectrum.rank, device=source.device)
        self.sigma_mean = spectral_mean(sigma.sum(), rank, columns, rank_policy)
        self.values = {"sigma_mean": self.sigma_mean, "rank": rank, "min_dim": columns, **of_deltas}
        refine = bool(spectrum.polar_noise() > ROUNDING)
        a = spectrum.inverse_root()
        del spectrum
        if refine:
            a = newton_schulz(a, product_gram(source, a))
        self._a = a.float() if product_rounding(columns, (self._norm, a)) <= ROUNDING else a

    def fill(self, q: Tensor, part: RowBlock) -> None:
        total = part.sum(torch.float64).total
        if self._a.dtype == q.dtype:
            torch.mm(total.to(q.dtype), self._a, out=q)
        else:
            q.copy_(total @ self._a)
        self._evidence.add(q, total)

    def stats(self) -> MergeStats:
        orthogonality = self._evidence.orthogonality(self._expected)
        symmetric = self._evidence.symmetry(self._norm)
        checks = polar_checks(self.tolerance, orthogonality, symmetric, self._unresolved, self._error)
        return MergeStats(self.algorithm, self.values, checks)


def rowwise_iso_c_bytes(spec: TensorSpec, block_elements: int, device: torch.device) -> int:
    """Return the peak bytes of ``RowwiseIsoC``: the largest of its steps, in their order."""
    rows, columns = spec.shape
    square = 8 * columns**2
    return 8 * 8 * PROBES * columns + max(
        square + chunk_bytes(rows, columns, 1, 0, device),
        2 * square + eigh_workspace_bytes(columns),
        2 * square + chunk_bytes(rows, columns, 1, 1, device),
        3 * square,
        square + part_bytes(columns, block_elements, 1, device),
    )
