"""Compute the paper's two measures of a merge, task by task, and their correlation (docs/accuracy.md).

    SAR(Δ_t, Δ_M) = ‖U_k U_kᵀ Δ_t‖_F / ‖Δ_t‖_F    NAI_t = (merged_t − base_t) / (expert_t − base_t)

Reference: arXiv 2502.04959.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

TAIL = 0.05  # the paper's ε: what U_k may leave of ‖Δ_M‖_F
# Of NAI's denominator. 0.02 is eight of the demo's 400 test digits: below it a handful of digits decides the ratio.
SMALLEST_GAIN = 0.02
# To which SAR is rounded. Mean and task arithmetic span the same range, and full-rank updates have SAR 1: float32 tells
# them apart in the seventh digit, and Spearman's ranks would take that for an order.
DECIMALS = 5


@dataclass(frozen=True)
class Alignment:
    """Hold how the tasks' updates are aligned with one merged update: means over its matrices."""

    by_task: tuple[float, ...]  # SAR of each task
    chance: float  # √(k / M), the SAR (root mean square) of updates in random directions
    rank_share: float  # k / min(M, N)


def kept_rank(singular_values: Tensor, tail: float = TAIL) -> int:
    """Return the smallest k with √(Σ_{i>k} σ_i²) ≤ tail · √(Σ_i σ_i²) of σ `[r]`, largest first; 0 where all are 0."""
    squares = singular_values.double().square()
    # left[k] is what the first k leave; summed from the smallest, so that small ones are not lost beside large ones.
    left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return int((left > tail**2 * left[0]).sum())


def range_basis(merged: Tensor) -> Tensor:
    """Return U_k `[M, k]` in float64, the leading left singular vectors of Δ_M `[M, N]`; k as in ``kept_rank``."""
    left, values, _ = torch.linalg.svd(merged.double(), full_matrices=False)
    return left[:, : kept_rank(values)]


def alignment_ratio(delta: Tensor, basis: Tensor) -> float:
    """Return ‖U_k U_kᵀ Δ_t‖_F / ‖Δ_t‖_F of Δ_t `[M, N]` and U_k `[M, k]`; raise ValueError where Δ_t is zero."""
    exact = delta.double()
    norm = torch.linalg.vector_norm(exact)
    if norm == 0:
        raise ValueError(f"delta {list(delta.shape)} is zero: no share of it lies anywhere")
    return float(torch.linalg.vector_norm(basis.mT @ exact) / norm)


def align(deltas: Sequence[Mapping[str, Tensor]], merged: Mapping[str, Tensor]) -> Alignment:
    """Return the mean over all matrices of SAR(Δ_t, Δ_M), for every task; Δ_M may have its α or not."""
    ratios: list[list[float]] = [[] for _ in deltas]
    chances, shares = [], []
    for name, update in merged.items():
        if update.ndim != 2:
            continue
        basis = range_basis(update)
        chances.append(math.sqrt(basis.shape[1] / update.shape[0]))
        shares.append(basis.shape[1] / min(update.shape))
        for of_task, delta in zip(ratios, deltas, strict=True):
            of_task.append(alignment_ratio(delta[name], basis))
    return Alignment(
        tuple(round(statistics.fmean(of_task), DECIMALS) for of_task in ratios),
        statistics.fmean(chances),
        statistics.fmean(shares),
    )


def accuracy_improvement(base: float, expert: float, merged: float) -> float | None:
    """Return NAI = (merged − base) / (expert − base), or None if the expert gains less than ``SMALLEST_GAIN``.

    Tasks without NAI are left out of means and correlations, and counted.
    """
    gain = expert - base
    return (merged - base) / gain if gain >= SMALLEST_GAIN - 1e-12 else None


@dataclass(frozen=True)
class Correlation:
    """Hold Pearson's and Spearman's coefficients of ``n`` points; None where a coordinate is constant or n < 3."""

    n: int
    pearson: float | None
    spearman: float | None


def correlate(points: Sequence[tuple[float, float]]) -> Correlation:
    """Return Pearson's ρ of the points, and of their ranks, where equal values share the mean of theirs."""
    coordinates = list(zip(*points, strict=True))
    if len(points) < 3 or any(len(set(values)) == 1 for values in coordinates):
        return Correlation(len(points), None, None)
    xs, ys = coordinates
    found: list[Any] = [measure(xs, ys)[0] for measure in (stats.pearsonr, stats.spearmanr)]
    return Correlation(len(points), *map(float, found))


def without_group_means(groups: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return every point less its group's mean, coordinate by coordinate, so that groups no longer differ."""
    points = []
    for group in groups:
        if group:
            x, y = (statistics.fmean(coordinates) for coordinates in zip(*group, strict=True))
            # Rounded as SAR is, so that a group of equal values has no spread that rounding made.
            points += [(round(a - x, DECIMALS + 1), b - y) for a, b in group]
    return points
