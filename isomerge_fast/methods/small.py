"""Merge one small matrix on a CPU: by Gram matrices in float64 as elsewhere, in as few calls of torch as there can be.

A call takes 1 to 4 us whatever it has to do. The general forms make hundreds, where 16 x 16 numbers have 20 us of
arithmetic. Evidence is plain numbers here, by the formulas of ``linalg``. What is not clearly of full rank and
well-conditioned is no case for these forms, which then return None: the general ones look closer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from ..linalg.gram_eigh import GramEigh
from .recombine import PROJECTION, TURNED
from .source import DeltaSource
from .stats import Check, MergeStats

INFO = torch.finfo(torch.float64)
# How much of the smallest σ² may be noise: κ up to 7,500. That much is rounded off a result in float32.
CLEAR = 1e-7
NOISE = GramEigh().noise


@dataclass(frozen=True)
class SmallMerge:
    """Hold U Vᵀ or U° V°ᵀ of a small matrix, in float64, with its evidence by the names of ``MergeStats``."""

    isometry: Tensor
    sigma_sum: float
    checks: dict[str, float]
    gap: float | None = None

    def holds(self, tolerance: float) -> bool:
        """Return whether every check is within its limit."""
        return all(value <= tolerance for value in self.checks.values())  # not `>`: NaN misses

    def merged(
        self, algorithm: str, dtype: torch.dtype, tolerance: float, values: dict[str, Any]
    ) -> tuple[Tensor, MergeStats]:
        """Return the merged Δ and its evidence, with further ``values``."""
        min_dim = min(self.isometry.shape)
        # By way of numpy, in half of the time.
        rank, none = torch.from_numpy(numpy.array([min_dim, 0], numpy.int64)).unbind()
        numbers = [self.sigma_sum / min_dim, self.gap or 0.0, *self.checks.values()]
        sigma_mean, gap, *checks = torch.from_numpy(numpy.array(numbers, numpy.float64)).unbind()
        found = {"sigma_mean": sigma_mean, "rank": rank, "min_dim": min_dim}
        if self.gap is not None:
            found["gap"], found["same_directions"] = gap, none
        judged = {name: Check(value, tolerance) for name, value in zip(self.checks, checks, strict=True)}
        judged["unresolved"] = Check(none, 0)
        return (self.isometry * numbers[0]).to(dtype), MergeStats(algorithm, {**found, **values}, judged)


def small_iso_c(total: Tensor, zero_limit: float) -> SmallMerge | None:
    """Return polar(S) of a small S [M, N] in float64, or None where that takes a closer look."""
    is_wide = total.shape[0] <= total.shape[1]
    squares, vectors = torch.linalg.eigh(_gram(total, is_wide))
    values = squares.tolist()
    if not _is_clear(values, values[-1], zero_limit):
        return None
    root = (vectors * squares.rsqrt()) @ vectors.mT
    q = root @ total if is_wide else total @ root
    image = total @ q.mT if is_wide else q.mT @ total
    skew, least = torch.linalg.vector_norm(image - image.mT), image.diagonal().amin()
    size, scale = math.sqrt(math.fsum(values)), math.sqrt(len(values))
    checks = {
        "orthogonality": _defect(q, is_wide),
        "asymmetry": float(skew) / size,
        "negative": max(0.0, -float(least)) * scale / size,
        "rounding": _skew_error(values) / scale,
    }
    return SmallMerge(q, math.fsum(map(math.sqrt, values)), checks)


def small_iso_cts(
    deltas: DeltaSource, total: Tensor, k: int, s: int, norms: list[float], zero_limit: float
) -> SmallMerge | None:
    """Return U° V°ᵀ of a small matrix as ``IsoCTS`` describes it, or None where that takes a closer look.

    ``total`` is S [M, N] in float64, ``norms`` are ‖Δ_t‖_F.
    """
    is_wide = total.shape[0] <= total.shape[1]
    squares, vectors = torch.linalg.eigh(_gram(total, is_wide))
    values = squares.tolist()
    if k == 0 or not _is_clear(values, values[-1], zero_limit):
        return None
    short, rest = vectors[:, -k:], vectors[:, :-k]
    long = (total.mT if is_wide else total) @ (short * squares[-k:].rsqrt())
    stack = torch.stack([deltas.delta(task) for task in range(deltas.n_tasks)]).double()
    # R_t; of a wide matrix in the coordinates of the left vectors that U_k leaves.
    residuals = rest.mT @ stack if is_wide else stack.sub_(long @ (long.mT @ stack))
    task_squares, task_vectors = torch.linalg.eigh(_gram(residuals, is_wide))
    task_values, limits = task_squares.tolist(), [norm * zero_limit / math.hypot(*norms) for norm in norms]
    if not all(_is_clear(each[-s:], each[-1], limit) for each, limit in zip(task_values, limits, strict=True)):
        return None
    top = task_vectors[..., -s:]
    image = (residuals.mT if is_wide else residuals) @ (top * task_squares[:, None, -s:].rsqrt())
    left, right = (rest @ top, image) if is_wide else (image, top)
    u_k, v_k = (short, long) if is_wide else (long, short)
    u_tasks, v_tasks = _side_by_side(left), _side_by_side(right)
    # U_ts is orthogonal to U_k, and where wide it is ``rest`` times a square matrix.
    u = _inverse_root(u_tasks, rest.shape[1] if is_wide else len(u_tasks), u_tasks.shape[1])
    v_all = torch.cat([v_tasks, v_k], dim=1)
    v = _inverse_root(v_all, len(v_all), v_tasks.shape[1])
    if u is None or v is None:
        return None
    value = torch.cat([u_tasks @ u.root, u_k], dim=1) @ v.root @ v_all.mT
    turned = math.sqrt(k) * _cut_angle(values, k, zero_limit)
    angles = [
        _part_angle(each, s, len(values), norm, turned, limit)
        for each, norm, limit in zip(task_values, norms, limits, strict=True)
    ]
    growth = u.growth**2 + v.growth**2
    off = 2.0 * turned**2 + growth * s * math.fsum(angle**2 for angle in angles) + u.error**2 + v.error**2
    checks = {"orthogonality": _defect(value, is_wide), "angle": math.sqrt(off / len(values))}
    kept = [*values[-k:], *(value for each in task_values for value in each[-s:])]
    return SmallMerge(value, math.fsum(map(math.sqrt, kept)), checks, _gap(values, k))


@dataclass(frozen=True)
class _InverseRoot:
    """Hold G^(-1/2) of G = XᵀX, by which X becomes its polar factor."""

    root: Tensor
    growth: float  # of random errors in some columns, as ``Recombined.growth``
    error: float  # ‖·‖_F of the estimated error of the polar factor


def _inverse_root(x: Tensor, long: int, width: int) -> _InverseRoot | None:
    """Return G^(-1/2) of unit vectors side by side; None where some may be one direction.

    Errors are those of ``width`` of the columns, of length ``long``.
    """
    squares, vectors = torch.linalg.eigh(x.mT @ x)
    values = squares.tolist()
    if not _is_clear(values, values[-1], 0.0):
        return None
    sigma = squares.sqrt()
    inverses = math.fsum(1.0 / value for value in values)
    # ``polar_growth`` where all directions are kept.
    pairs = 2.0 * float((sigma[:, None] + sigma).square().reciprocal().sum()) - 0.5 * inverses
    growth = max(0.0, pairs) + (long - len(values)) * inverses
    return _InverseRoot(
        (vectors * squares.rsqrt()) @ vectors.mT, math.sqrt(growth / (width * long)), _skew_error(values)
    )


def _gram(x: Tensor, is_wide: bool) -> Tensor:
    return x @ x.mT if is_wide else x.mT @ x


def _side_by_side(parts: Tensor) -> Tensor:
    """Return [T, n, s] as [n, T s]."""
    return parts.transpose(0, 1).flatten(1)


def _defect(q: Tensor, is_wide: bool) -> float:
    """Return ‖Q Qᵀ − I‖_F / √r."""
    gram = _gram(q, is_wide)
    gram.diagonal().sub_(1.0)
    return float(torch.linalg.vector_norm(gram)) / math.sqrt(len(gram))


def _noise(largest: float) -> float:
    """Return the error of the eigenvalues of a Gram matrix, of which this is the largest (``GramEigh.blur``)."""
    return NOISE * largest + INFO.tiny / INFO.eps


def _is_clear(values: list[float], largest: float, zero_limit: float) -> bool:
    """Return whether all these σ², ascending, are above what counts as zero and far above their noise."""
    return values[0] > zero_limit**2 and _noise(largest) <= CLEAR * values[0]


def _skew_error(values: list[float]) -> float:
    """Return ‖·‖_F of what ``skew_error`` estimates for the polar factor, from all σ²."""
    noise = _noise(values[-1])
    parts = [noise / value for value in values]
    total, squares = math.fsum(parts), math.fsum([part**2 for part in parts])
    return math.sqrt(max(0.0, total**2 - squares)) / (4.0 * math.sqrt(len(values)))


def _gap(values: list[float], count: int) -> float:
    """Return ``relative_gap`` at the cut of the top ``count``, from all σ², ascending."""
    if count == len(values):
        return 1.0
    return 1.0 - math.sqrt(max(0.0, values[-count - 1]) / values[-count])


def _cut_angle(values: list[float], count: int, zero_limit: float) -> float:
    """Return ``rounding_angle`` of the top ``count``, from all σ², ascending."""
    if count == len(values):
        return 0.0
    upper, lower = values[-count], max(0.0, values[-count - 1])
    if math.sqrt(upper) - math.sqrt(lower) <= zero_limit:
        return 0.0
    return _noise(values[-1]) / (math.sqrt(count) * (upper - lower))


def _part_angle(values: list[float], s: int, min_dim: int, norm: float, turned: float, zero_limit: float) -> float:
    """Return ‖sin θ‖_F / √s of the top s of R_t: of its eigenvectors, its projection, and of U_k (``turned``)."""
    edge = math.sqrt(values[-s]) * _gap(values, s)
    if edge <= 0.0:
        return math.inf
    off = PROJECTION * norm + TURNED * turned * (norm + math.sqrt(values[-1]))
    return _cut_angle(values, s, zero_limit) + (INFO.eps * norm + off / math.sqrt(min_dim)) / (edge * math.sqrt(s))
