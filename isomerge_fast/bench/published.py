"""Compute Iso-C and Iso-CTS as published (arXiv 2502.04959, §4 and §5) in plain torch: the baseline of the benchmarks.

Iso-C takes one full SVD a matrix, Iso-CTS T + 3, all in the dtype of the deltas. ``driver`` is torch.linalg.svd's: on
a GPU its default and others are far apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def polar(x: Tensor, driver: str | None = None) -> Tensor:
    """Return U Vᵀ of the thin SVD."""
    u, _, vt = torch.linalg.svd(x, full_matrices=False, driver=driver)
    return u @ vt


def iso_c(deltas: Sequence[Tensor], driver: str | None = None) -> Tensor:
    """Return σ̄ U Vᵀ of the sum, σ̄ the mean of its singular values."""
    u, sigma, vt = torch.linalg.svd(torch.stack(list(deltas)).sum(0), full_matrices=False, driver=driver)
    return sigma.mean() * (u @ vt)


def iso_cts(deltas: Sequence[Tensor], common_fraction: float = 0.8, driver: str | None = None) -> Tensor:
    """Return the top k directions of the sum and s of every task's remainder, made orthogonal, equally long."""
    total = torch.stack(list(deltas)).sum(0)
    short, tasks = min(total.shape), len(deltas)
    s = round((short - int(short * common_fraction)) / tasks)
    k = short - s * tasks
    u, sigma, vt = torch.linalg.svd(total, full_matrices=False, driver=driver)
    common, sum_sigma = u[:, :k], sigma[:k].sum()
    left, right = [], []
    for delta in deltas:
        residual = delta - common @ (common.mT @ delta)
        ut, sigma_t, vtt = torch.linalg.svd(residual, full_matrices=False, driver=driver)
        left.append(ut[:, :s])
        right.append(vtt[:s])
        sum_sigma = sum_sigma + sigma_t[:s].sum()
    all_left, all_right = torch.cat([*left, common], 1), torch.cat([*right, vt[:k]], 0)
    return sum_sigma / short * polar(all_left, driver) @ polar(all_right, driver)
