"""Iso-C and Iso-CTS as published (arXiv 2502.04959, §4 and §5), in plain torch: what one writes from the paper.

One full SVD a matrix for Iso-C; T + 3 for Iso-CTS. The baseline of the benchmarks, in the dtype of the deltas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def polar(x: Tensor) -> Tensor:
    """U Vᵀ of the thin SVD."""
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u @ vt


def iso_c(deltas: Sequence[Tensor]) -> Tensor:
    """σ̄ U Vᵀ of the sum, σ̄ the mean of its singular values."""
    u, sigma, vt = torch.linalg.svd(torch.stack(list(deltas)).sum(0), full_matrices=False)
    return sigma.mean() * (u @ vt)


def iso_cts(deltas: Sequence[Tensor], common_fraction: float = 0.8) -> Tensor:
    """The top k directions of the sum and s of every task's remainder, made orthogonal, equally long."""
    total = torch.stack(list(deltas)).sum(0)
    short, tasks = min(total.shape), len(deltas)
    s = round((short - int(short * common_fraction)) / tasks)
    k = short - s * tasks
    u, sigma, vt = torch.linalg.svd(total, full_matrices=False)
    common, sum_sigma = u[:, :k], sigma[:k].sum()
    left, right = [], []
    for delta in deltas:
        ut, sigma_t, vtt = torch.linalg.svd(delta - common @ (common.mT @ delta), full_matrices=False)
        left.append(ut[:, :s])
        right.append(vtt[:s])
        sum_sigma = sum_sigma + sigma_t[:s].sum()
    return sum_sigma / short * polar(torch.cat([*left, common], 1)) @ polar(torch.cat([*right, vt[:k]], 0))
