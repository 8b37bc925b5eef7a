"""Merge by Iso-C and Iso-CTS as published (arXiv 2502.04959), in plain numpy.

Iso-C takes one full SVD of a matrix, Iso-CTS T + 3, in the dtype of the deltas: what a reader of the paper would write
without a framework. In float32 and in float64 it is a baseline of the benchmarks; all errors are relative to float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def polar(x: np.ndarray) -> np.ndarray:
    """Return U Vᵀ of the thin SVD X = U Σ Vᵀ, [M, N] -> [M, N]."""
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def iso_c(deltas: Sequence[np.ndarray]) -> np.ndarray:
    """Return σ̄ U Vᵀ of S = Σ_t Δ_t, σ̄ the mean of its singular values; T deltas [M, N] -> [M, N]."""
    u, sigma, vt = np.linalg.svd(np.sum(deltas, axis=0), full_matrices=False)
    return sigma.mean() * (u @ vt)


def iso_cts(deltas: Sequence[np.ndarray]) -> np.ndarray:
    """Return σ̄ U° V°ᵀ: the top k directions of S and s of every Δ_t − U_k U_kᵀ Δ_t, orthogonalised; [M, N]."""
    total = np.sum(deltas, axis=0)
    short, tasks = min(total.shape), len(deltas)
    s = round((short - int(short * 0.8)) / tasks)
    k = short - s * tasks
    u, sigma, vt = np.linalg.svd(total, full_matrices=False)
    u_k, v_k = u[:, :k], vt[:k].T
    left, right, kept = [], [], [sigma[:k]]
    for delta in deltas:
        u_t, sigma_t, vt_t = np.linalg.svd(delta - u_k @ (u_k.T @ delta), full_matrices=False)
        left.append(u_t[:, :s])
        right.append(vt_t[:s].T)
        kept.append(sigma_t[:s])
    u_all = polar(np.concatenate([*left, u_k], axis=1))
    v_all = polar(np.concatenate([*right, v_k], axis=1))
    return np.concatenate(kept).sum() / short * (u_all @ v_all.T)
