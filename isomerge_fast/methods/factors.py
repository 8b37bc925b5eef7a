"""Merge deltas that are products of thin factors (LoRA): Δ_t = w_t B_t A_t = Q_b C_t Q_aᵀ in the range of them all.

With [B_1 … B_T] = Q_b R_b and [A_1ᵀ … A_Tᵀ] = Q_a R_a, C_t = w_t R_b[:, t] R_a[:, t]ᵀ; see docs/peft.md, "In factor
space". No matrix of the tensor's size is ever factored.

Reference: Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", arXiv 2509.17786 (the
coordinates, there for any method).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConfigError
from ..linalg.thin import thin_qrs
from .base import Method
from .certified import exact_products
from .source import Factors, MemoryDeltas, TensorSpec
from .stats import MergeStats, NotFiniteError

# Of the diagonal of a Cholesky factor: κ is about its inverse, and one pass leaves κ² ε of what is not orthonormal.
SMALLEST_DIAGONAL_RATIO = 1e-3
# Of the directions that a truncation may choose between, those stay that weigh most in S: its share in what is cut.
TIE_BREAK = 1e-3
# Singular values of C below this times the largest are what float64 leaves of zeros.
NOTHING = 1e-12


@dataclass(frozen=True)
class Basis:
    """Hold X = Q R with orthonormal Q = X R⁻¹, which is multiplied out late, on smaller matrices."""

    stack: Tensor  # X [L, c], float64, or Q itself where ``inverse`` is None
    inverse: Tensor | None  # R⁻¹ [c, c]
    coordinates: Tensor  # R

    def __matmul__(self, weights: Tensor) -> Tensor:
        """Return Q W."""
        return self.stack @ (weights if self.inverse is None else self.inverse @ weights)

    @property
    def q(self) -> Tensor:
        return self.stack if self.inverse is None else self.stack @ self.inverse


def orthonormal(stack: Tensor) -> Basis:
    """Return an orthonormal basis of ``stack`` by one Cholesky factor, or by ``thin_qrs`` where that is not exact.

    Exact is orthonormal to 1e-9 or so, as it is of most adapters: 8192 x 128 takes 2 ms, and 15 by ``thin_qrs`` (2-core
    CPU).
    """
    if stack.shape[0] >= stack.shape[1]:
        lower, failed = torch.linalg.cholesky_ex(stack.mT @ stack)
        diagonal = lower.diagonal()
        # Not `<`: NaN, which a failed factorisation may leave, has to end up below too.
        if not bool(failed) and bool(diagonal.amin() > SMALLEST_DIAGONAL_RATIO * diagonal.amax()):
            unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            return Basis(stack, torch.linalg.solve_triangular(lower.mT, unit, upper=True), lower.mT)
    ((q, r),) = thin_qrs(stack)
    return Basis(q, None, r)


@dataclass(frozen=True)
class LowRank:
    """Hold a merged Δ = Q_b C Q_aᵀ, in float64."""

    left_basis: Basis  # of Q_b [M, p]
    core: Tensor  # C [p, q]
    right_basis: Basis  # of Q_a [N, q]
    sum: Tensor  # S in the same coordinates

    @property
    def left(self) -> Tensor:
        """Return Q_b C [M, q], so that Δ = left right."""
        return self.left_basis @ self.core

    @property
    def right(self) -> Tensor:
        """Return Q_aᵀ [q, N]."""
        return self.right_basis.q.mT

    @property
    def shape(self) -> tuple[int, int]:
        return self.left_basis.stack.shape[0], self.right_basis.stack.shape[0]

    def truncated(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """Return (left [M, rank], right [rank, N], ‖Δ − left right‖_F / ‖Δ‖_F), both of about the same norm.

        Padded with zeros where Δ has fewer directions. Iso-C weighs all directions of Δ alike: of such, those are kept
        that weigh most in S.
        """
        norm, size = (torch.linalg.matrix_norm(x) for x in (self.core, self.sum))
        left = self.core.new_zeros(self.shape[0], rank)
        right = self.core.new_zeros(rank, self.shape[1])
        if not self.core.numel() or not bool(norm > 0):
            return left, right, 0.0
        tilted = self.core + self.sum * (TIE_BREAK * norm / size if bool(size > 0) else 0.0)
        # Within the directions of C, so that nothing is lost where there is room for all of them.
        inside, sigma, _ = torch.linalg.svd(self.core, full_matrices=False)
        inside = inside[:, sigma > NOTHING * sigma[0]]
        u = inside @ torch.linalg.svd(inside.mT @ tilted, full_matrices=False)[0][:, :rank]
        kept = u.mT @ self.core
        lost = torch.linalg.matrix_norm(self.core - u @ kept) / norm
        # B and A of one norm, as in training.
        balance = torch.linalg.matrix_norm(kept).div(math.sqrt(u.shape[1])).sqrt().clamp_min(1e-30)
        left[:, : u.shape[1]] = self.left_basis @ (u * balance)
        right[: u.shape[1]] = (self.right_basis @ (kept.mT / balance)).mT
        return left, right, float(lost)


def product_bound(left: Tensor, right: Tensor) -> float:
    """Bound the entries of left right, which is never formed: ‖a row of left‖ ‖a column of right‖."""
    return float(torch.linalg.vector_norm(left, dim=1).amax() * torch.linalg.vector_norm(right, dim=0).amax())


def require_basis_free(method: Method) -> None:
    """Raise ConfigError for a method whose result depends on coordinates: factors are merged in theirs."""
    if not method.basis_free:
        raise ConfigError(
            f"method {method.name!r} takes no adapters, whose deltas are merged as thin factors in coordinates of "
            "their own: merge every adapter into its base first (task-arithmetic with it as the one expert)"
        )


def merge_factors(
    method: Method, factors: Sequence[Factors | None], shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[LowRank, MergeStats]:
    """Return the merged Δ [M, N] of T deltas given as factors, and its evidence; None for a task is a zero delta.

    The tensor's own ``shape`` decides r, and with it k and s. ``dtype`` is that of the deltas, were they computed: it
    decides what counts as rounding.

    Raises:
        ConfigError: as ``require_basis_free``.
        ValueError: factors that do not fit ``shape`` or each other.
        NotFiniteError: naming the tasks that hold NaN or Inf.
    """
    require_basis_free(method)
    rows, columns = shape
    present = [(task, factor) for task, factor in enumerate(factors) if factor is not None]
    if not present:
        raise ValueError("factors: at least one task has to have some")
    for task, factor in present:
        if factor.left.shape != (rows, factor.rank) or factor.right.shape != (factor.rank, columns):
            raise ValueError(
                f"factors[{task}] are {list(factor.left.shape)} and {list(factor.right.shape)}, "
                f"expected [{rows}, r] and [r, {columns}]"
            )
    # Where it is but the product that overflows, the method finds it.
    finite = torch.stack([factor.left.isfinite().all() & factor.right.isfinite().all() for _, factor in present])
    flags = zip(present, finite.tolist(), strict=True)
    bad = [task for (task, factor), flag in flags if not flag or not math.isfinite(factor.scale)]
    if bad:
        raise NotFiniteError(bad)
    with exact_products(present[0][1].left.device):
        left = orthonormal(torch.cat([each.left for _, each in present], dim=1).double())
        right = orthonormal(torch.cat([each.right.mT for _, each in present], dim=1).double())
        cores = _cores(factors, left.coordinates, right.coordinates)
        # Small matrices have room under any ceiling.
        core, stats = method.within(None).merge(MemoryDeltas(cores, full_spec=TensorSpec("", (rows, columns), dtype)))
        total = torch.stack(cores).sum(0)
    algorithm = f"{stats.algorithm}/factors"
    rank = sum(each.rank for _, each in present)
    stats = replace(stats, algorithm=algorithm, values={**stats.values, "factor_rank": rank})
    return LowRank(left, core.double(), right, total), stats


def _cores(factors: Sequence[Factors | None], left: Tensor, right: Tensor) -> list[Tensor]:
    """Return C_t = scale_t L_t R_tᵀ of every task; zero where a task has no factors.

    ``left`` and ``right`` are the coordinates of the stacked factors in their common bases; L_t and R_t are the columns
    of task t.
    """
    ranks = [0 if factor is None else factor.rank for factor in factors]
    scales = [0.0 if factor is None else factor.scale for factor in factors]
    pieces = zip(scales, left.split(ranks, dim=1), right.split(ranks, dim=1), strict=True)
    return [rows @ (scale * columns.mT) for scale, rows, columns in pieces]
