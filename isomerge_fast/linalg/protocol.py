"""Define a solver, its answers, and when a singular value counts as zero.

All solvers work on ``[..., M, N]`` with any number of batch dimensions, on any device, and never modify their input.
Singular values at or below the tolerance are *truncated*: their directions are zero columns, so that every result lives
in the numerical range of the input and batches may mix ranks (no slicing by data-dependent sizes).

The short side of a matrix is its rows when M ≤ N ("wide"), else its columns ("tall"); r = min(M, N). Bases on the short
side are small and always float64; the long side is stored in the dtype that is asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..ops import traits_of

# Rows of the pairs of ``polar_growth`` that are made at once on a CPU: few, for the memory's sake.
GROWTH_ROWS = 64


@dataclass(frozen=True)
class HeatTraces:
    """Hold tr e^(−tH) of H = QᵀX, whose eigenvalues are the σ of X: sums over the σ follow (``heat_traces``)."""

    times: Tensor  # t, [..., nodes] float64
    weights: Tensor  # those of the trapezoidal rule for ∫ t² … d(log t), [..., nodes]
    values: Tensor  # the traces, [..., nodes]

    def sums(self, ones: int) -> tuple[Tensor, Tensor]:
        """Return (Σ_{i≠j} 2/(σ_i + σ_j)², Σ 1/σ²), [...] each; the former with ``ones`` further σ of 1."""
        squares = (self.weights * self.values).sum(-1)
        # Of pairs with i = j the term would be 2 / (2 σ)².
        pairs = 2.0 * (self.weights * self.values.square()).sum(-1) - 0.5 * squares
        if ones:
            mixed = (self.weights * torch.exp(-self.times) * self.values).sum(-1)
            pairs = pairs + 4.0 * ones * mixed + 0.5 * ones * (ones - 1)
        return pairs, squares


@dataclass(frozen=True)
class PolarStats:
    """Hold the evidence of one (batched) polar solve, on the device until it is read: no solve synchronises for it.

    Attributes:
        nuclear_norm: ‖X‖_* = Σσ over the kept directions, shape [...].
        rank: number of kept directions, shape [...].
        orthogonality: ‖QᵀQ − P‖_F / √r on the short side, P the projector on the kept directions, shape [...].
        unresolved: number of directions left out that may lie above the tolerance, hidden by the solver's own rounding,
            shape [...].
        error: ‖dQ‖_F / √rank that the solver's own rounding leaves, estimated from σ, shape [...]. ``orthogonality``
            does not see its skew part, and ``asymmetry`` hardly where σ is small.
        sigma: kept singular values, zero where truncated, shape [..., r]; None where the solver does not see σ.
        spread: rms(σ) · rms(1/σ) over the kept directions, shape [...]: rounding X to ε moves Q by about ε times this,
            relative to ‖Q‖. None where the solver does not see σ.
        traces: give the sums over pairs of σ in place of ``sigma``; None where nobody asks for them.
    """

    solver: str
    nuclear_norm: Tensor
    rank: Tensor
    orthogonality: Tensor
    unresolved: Tensor | int = 0
    error: Tensor | float = 0.0
    sigma: Tensor | None = None
    spread: Tensor | None = None
    traces: HeatTraces | None = None

    def growth(self, short: int, long: int, *, ones: int = 0) -> Tensor:
        """Return ``polar_growth`` from σ, or from the traces: [...]."""
        if self.sigma is not None:
            return polar_growth(self.sigma, short, long, ones=ones)
        assert self.traces is not None
        pairs, squares = self.traces.sums(ones)
        return _growth(pairs, squares, self.rank, short, long, ones)


@dataclass(frozen=True)
class Subspace:
    """Hold the top ``k`` singular triplets of X [..., M, N], by side.

    Attributes:
        short: [..., r, k] float64, the singular vectors of the short side (left when wide); zero where truncated.
        long: [..., max(M, N), k], those of the long side; zero where truncated. None until ``Factorization.complete``:
            it is the only part that is as large as X.
        sigma: [..., k] float64, descending; zero where truncated.
        complement: [..., r, c] float64, columns that span the short side's other directions: an orthonormal basis,
            c = r − k, or where directions were truncated the projector itself, c = r. None where nobody needs it.
        gap: (σ_k − σ_{k+1}) / σ_k, how well the split is determined, shape [...]; 1 where nothing lies beyond the cut.
        angle: ‖sin θ‖_F / √k between this subspace and the true one, shape [...]: a bound from the residual where it
            was searched for, an estimate from the solver's rounding and the gap where all directions were computed.
        unresolved: as in ``PolarStats``, of the k.
        wide: whether the short side is the left one.
        is_whole: whether none of the k directions of any matrix was truncated; None where nobody has looked.
        isometry: U_k V_kᵀ [..., M, N] float64, where that was found in place of the k directions one by one. ``short``
            then has the last few before the cut alone, and ``sigma`` k times the mean.
    """

    short: Tensor
    long: Tensor | None
    sigma: Tensor
    complement: Tensor | None
    gap: Tensor
    angle: Tensor
    unresolved: Tensor
    wide: bool
    is_whole: bool | None = None
    isometry: Tensor | None = None

    @cached_property
    def whitened(self) -> Tensor:
        """Return the short side's vectors over σ, [..., r, k]: X maps them to the long side's."""
        return self.short * reciprocal(self.sigma)[..., None, :]

    def unbind(self) -> list[Subspace]:
        """Return the members along the first batch dimension."""
        assert self.long is not None
        return [
            Subspace(short, long, sigma, None, gap, angle, unresolved, self.wide, self.is_whole)
            for short, long, sigma, gap, angle, unresolved in zip(
                self.short, self.long, self.sigma, self.gap, self.angle, self.unresolved, strict=True
            )
        ]

    @property
    def u(self) -> Tensor:
        """Return the left singular vectors [..., M, k] in the dtype of the long side."""
        assert self.long is not None
        return self.short.to(self.long.dtype) if self.wide else self.long

    @property
    def v(self) -> Tensor:
        """Return the right singular vectors [..., N, k] in the dtype of the long side."""
        assert self.long is not None
        return self.long if self.wide else self.short.to(self.long.dtype)


class PolarSolver(ABC):
    """Find polar(X) = U Vᵀ, with X = U Σ Vᵀ. A solver is a frozen dataclass that states ``name`` and ``polar``."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the name of the solver in reports."""

    @abstractmethod
    def polar(
        self, x: Tensor, *, tolerance: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, PolarStats]:
        """Return (Q, evidence); Q in ``dtype``, by default that of ``x``."""

    def workspace_bytes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return the peak bytes of one solve of a float64 ``x`` beyond ``x`` itself, the result in ``dtype`` included.

        By default those of a float64 SVD: LAPACK's copy and work (about 8 r²), U, Vᵀ, the product.
        """
        return 8 * (5 * rows * columns + 9 * min(rows, columns) ** 2)


@dataclass(frozen=True, eq=False)
class Factorization(ABC):
    """Give the singular values and vectors of X: computed when they are asked for, and kept until ``release``.

    A subclass keeps them as a ``cached_property`` of the name ``vectors``.
    """

    x: Tensor
    tolerance: Tensor  # σ up to this counts as zero, [...]

    @abstractmethod
    def polar(self, dtype: torch.dtype) -> tuple[Tensor, PolarStats]:
        """Return (polar(X) in ``dtype``, evidence)."""

    @abstractmethod
    def top(self, k: int) -> Subspace:
        """Return the top ``k`` triplets without their long side (see ``complete``)."""

    @abstractmethod
    def complement(self, top: Subspace) -> Tensor:
        """Return a basis of the short side's directions beyond ``top`` (see ``Subspace.complement``)."""

    @abstractmethod
    def complete(self, top: Subspace, dtype: torch.dtype) -> Subspace:
        """Return ``top`` with its long side, in ``dtype``."""

    @abstractmethod
    def residual(self, delta: Tensor, common: Subspace, s: int, *, norm: Tensor, tolerance: Tensor) -> Subspace:
        """Return the top ``s`` triplets of R = Δ − U_k U_kᵀ Δ, with U_k the left vectors of ``common``, which is of X.

        Both sides are float64: they are thin, and Iso-CTS orthogonalises them, which magnifies their rounding. ``norm``
        is ‖Δ‖_F, which the caller has; σ up to ``tolerance`` counts as zero.
        """

    def release(self) -> None:
        """Drop the vectors, which are as large as a Gram matrix or as X; the next request computes them anew."""
        vars(self).pop("vectors", None)


class Solver(PolarSolver):
    """Find dominant singular triplets too, of a matrix and of what a projection leaves of another: for Iso-CTS.

    A solver states ``name`` and ``factorize``; one that has an SVD of its own is a ``FullSvd`` with another ``svd``.

    Attributes:
        in_stack: whether nothing is decided for a batch as a whole, so that none of its matrices depends on another:
            what is not regular shows in a matrix's own evidence, and it is then solved by itself.
    """

    in_stack: bool = False

    @abstractmethod
    def factorize(self, x: Tensor, *, tolerance: Tensor | None = None) -> Factorization:
        """Return X as a ``Factorization`` that takes σ up to ``tolerance`` [...] (``default_tolerance``) for zero."""

    def polar(
        self, x: Tensor, *, tolerance: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, PolarStats]:
        return self.factorize(x, tolerance=tolerance).polar(dtype or x.dtype)

    def long_dtypes(
        self, wide: bool, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.dtype | None, torch.dtype]:
        """Return the dtypes of S's long side for ``Factorization.residual`` (None: not wanted), and for the result.

        The merged Δ is in ``dtype``.
        """
        return torch.float64, torch.float64

    def part_bytes(
        self, rows: int, columns: int, k: int, s: int, at_once: int, dtype: torch.dtype, device: torch.device
    ) -> int:
        """Return the peak bytes of ``Factorization.residual`` of ``at_once`` Δ in ``dtype``.

        The long side of S that it wants is counted; S, Δ and the result are not.
        """
        return at_once * self.workspace_bytes(rows, columns, dtype, device)

    def small_polar(self, device: torch.device) -> PolarSolver:
        """Return the solver of the small polar factors of Iso-CTS, of sides up to 0.4 r, on that device."""
        return self


def rounding_tolerance(norm: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the σ up to which the input's own rounding to ``dtype`` reaches: 2 ε · ‖X‖_F/√(MN) · (√M + √N).

    Rounding every entry to relative precision ε/2 adds a nearly random matrix, whose largest singular value is
    (ε/2)·rms(X)·(√M + √N) (the Marchenko-Pastur edge); the bound is four times that. It is far below the customary
    max(M, N)·ε·σ₁, which would call the well-determined small directions of square sums of deltas (κ of 1e4 and more)
    zero.
    """
    rms = norm.double() / math.sqrt(max(1, rows * columns))
    return rms * (2.0 * torch.finfo(dtype).eps * (math.sqrt(rows) + math.sqrt(columns)))


def default_tolerance(x: Tensor) -> Tensor:
    """Return ``rounding_tolerance`` of X in its own dtype, shape [...]."""
    return rounding_tolerance(torch.linalg.vector_norm(x, dim=(-2, -1)), x.shape[-2], x.shape[-1], x.dtype)


def relative_gap(sigma: Tensor, k: int) -> Tensor:
    """Return (σ_k − σ_{k+1}) / σ_k of descending σ, [..., r] -> [...]; 1 where σ_k is 0, or k is 0 or r."""
    if k <= 0 or k >= sigma.shape[-1]:
        return torch.ones(sigma.shape[:-1], dtype=torch.float64, device=sigma.device)
    upper, lower = sigma[..., k - 1], sigma[..., k]
    return torch.where(upper > 0, (upper - lower) / upper.clamp_min(torch.finfo(sigma.dtype).tiny), 1.0)


def rounding_angle(sigma: Tensor, k: int, tolerance: Tensor, noise: Tensor) -> Tensor:
    """Return ‖sin θ‖_F / √k that ``noise`` in σ² leaves at the cut: noise / (√k (σ_k² − σ_{k+1}²)), [..., r] -> [...].

    0 where nothing lies beyond the cut, and where the two differ by less than the tolerance: there the data does not
    determine the split, whatever the solver, and the gap says so.
    """
    if k <= 0 or k >= sigma.shape[-1]:
        return torch.zeros_like(noise)
    upper, lower = sigma[..., k - 1], sigma[..., k]
    gap = upper.square() - lower.square()
    angle = noise / (math.sqrt(k) * gap.clamp_min(torch.finfo(sigma.dtype).tiny))
    return torch.where((upper > tolerance) & (upper - lower > tolerance), angle, 0.0)


def polar_growth(sigma: Tensor, short: int, long: int, *, ones: int = 0) -> Tensor:
    """Return ‖dQ‖_F / e, with Q + dQ the polar factor of X + E, to first order: [..., r] -> [...].

    The entries of E [..., long, short] are random and of size e. In the basis of the singular vectors
    dQ_ij = (E_ij − E_ji) / (σ_i + σ_j), and E_ij / σ_j for the directions i beyond those kept. There is no i = j: one
    small σ alone does little in a square X. ``sigma`` is zero where a direction is not kept; ``ones`` more σ are 1.
    """
    kept, inverse = sigma > 0, reciprocal(sigma)
    squares = inverse.square().sum(-1)
    # Of pairs with i = j the term would be 2 / (2 σ)².
    pairs = -0.5 * squares
    width = max(1, sigma.numel())
    # Four such blocks are there at once.
    step = max(1, traits_of(sigma.device).block_elements(4 * GROWTH_ROWS * width) // (4 * width))
    for rows, there in zip(sigma.split(step, dim=-1), kept.split(step, dim=-1), strict=True):
        terms = 2.0 / (rows[..., :, None] + sigma[..., None, :]).square()
        both = there[..., :, None] & kept[..., None, :]
        pairs = pairs + torch.where(both, terms, 0.0).sum((-2, -1))
    if ones:
        pairs = pairs + ones * (4.0 * kept / (sigma + 1.0).square()).sum(-1) + 0.5 * ones * (ones - 1)
    return _growth(pairs, squares, kept.sum(-1), short, long, ones)


def _growth(pairs: Tensor, squares: Tensor, kept: Tensor, short: int, long: int, ones: int) -> Tensor:
    """Return ``polar_growth`` from Σ_{i≠j} 2/(σ_i + σ_j)² over the kept σ and the ones, and Σ 1/σ² over the kept."""
    beyond = long + short - 2 * (kept + ones)
    return (pairs.clamp_min(0.0) + beyond * (squares + ones)).sqrt()


def reciprocal(sigma: Tensor) -> Tensor:
    """Return 1/σ, and 0 where σ is 0."""
    return torch.where(sigma > 0, 1.0 / sigma.clamp_min(torch.finfo(sigma.dtype).tiny), 0.0)


def complement_basis(rest: Tensor, top: Subspace) -> Tensor:
    """Return the short side's directions beyond ``top``: ``rest``, or I − W Wᵀ where some of W were truncated."""
    if top.is_whole:
        return rest.clone()
    projector = -(top.short @ top.short.mT)
    projector.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return projector
