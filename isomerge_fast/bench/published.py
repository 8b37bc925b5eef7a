"""Compute Iso-C and Iso-CTS as published (arXiv 2502.04959, §4 and §5): the baselines of the benchmarks.

Iso-C takes one full SVD a matrix, Iso-CTS T + 3, all by the library and in the dtype of the deltas: torch or numpy.
``driver`` is torch.linalg.svd's: on a GPU its default and others are far apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def svd(x: Any, driver: str | None = None) -> tuple[Any, Any, Any]:
    """Return U, σ and Vᵀ of the thin SVD of a tensor or an array."""
    if isinstance(x, np.ndarray):
        return np.linalg.svd(x, full_matrices=False)
    return torch.linalg.svd(x, full_matrices=False, driver=driver)


def polar(x: Any, driver: str | None = None) -> Any:
    """Return U Vᵀ of the thin SVD."""
    u, _, vt = svd(x, driver)
    return u @ vt


def iso_c(deltas: Sequence[Any], driver: str | None = None) -> Any:
    """Return σ̄ U Vᵀ of the sum, σ̄ the mean of its singular values."""
    library: Any = np if isinstance(deltas[0], np.ndarray) else torch
    u, sigma, vt = svd(library.stack(list(deltas)).sum(0), driver)
    return sigma.mean() * (u @ vt)


def iso_cts(deltas: Sequence[Any], common_fraction: float = 0.8, driver: str | None = None) -> Any:
    """Return the top k directions of the sum and s of every task's remainder, made orthogonal, equally long."""
    library: Any = np if isinstance(deltas[0], np.ndarray) else torch
    total = library.stack(list(deltas)).sum(0)
    short, tasks = min(total.shape), len(deltas)
    s = round((short - int(short * common_fraction)) / tasks)
    k = short - s * tasks
    u, sigma, vt = svd(total, driver)
    common, sum_sigma = u[:, :k], sigma[:k].sum()
    left, right = [], []
    for delta in deltas:
        ut, sigma_t, vtt = svd(delta - common @ (common.mT @ delta), driver)
        left.append(ut[:, :s])
        right.append(vtt[:s])
        sum_sigma = sum_sigma + sigma_t[:s].sum()
    all_left, all_right = library.concat([*left, common], 1), library.concat([*right, vt[:k]], 0)
    return sum_sigma / short * polar(all_left, driver) @ polar(all_right, driver)
