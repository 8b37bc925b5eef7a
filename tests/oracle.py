"""The judge: Iso-C and Iso-CTS as published (arXiv 2502.04959), in numpy float64, by full SVD and nothing else.

``rank_tolerance`` > 0 truncates singular directions below it (relative to the largest): the meaning this project gives
to rank-deficient sums, where the published formula is not a function.
"""

from __future__ import annotations

import numpy as np


def split_rank(min_dim: int, tasks: int, common_fraction: float) -> tuple[int, int]:
    """(k, s) with the released code's rounding; Python's round is banker's."""
    tasks_total = round((min_dim - int(min_dim * common_fraction)) / tasks) * tasks
    return min_dim - tasks_total, tasks_total // tasks


def thin_svd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, sigma, vt = np.linalg.svd(np.asarray(x, dtype=np.float64), full_matrices=False)
    return u, sigma, vt.T


def polar(x: np.ndarray, rank_tolerance: float = 0.0) -> np.ndarray:
    u, sigma, v = thin_svd(x)
    keep = sigma > rank_tolerance * (sigma[0] if sigma.size else 0.0)
    return u[:, keep] @ v[:, keep].T


def iso_c(
    deltas: list[np.ndarray], *, rank_tolerance: float = 0.0, rank: int | None = None, rank_policy: str = "range"
) -> np.ndarray:
    """``rank``: that many directions and no more, instead of a tolerance."""
    total = np.sum([np.asarray(delta, dtype=np.float64) for delta in deltas], axis=0)
    u, sigma, v = thin_svd(total)
    keep = sigma > rank_tolerance * (sigma[0] if sigma.size else 0.0)
    if rank is not None:
        keep = np.arange(sigma.size) < rank
    if not keep.any():
        return np.zeros_like(total)
    mean = sigma[keep].sum() / (keep.sum() if rank_policy == "range" else sigma.size)
    return mean * (u[:, keep] @ v[:, keep].T)


def iso_cts(deltas: list[np.ndarray], common_fraction: float = 0.8, *, rank_tolerance: float = 0.0) -> np.ndarray:
    """``rank_tolerance``: relative to the largest singular value of the sum, for the task parts too; σ̄ is then the mean
    over what is kept.
    """
    deltas = [np.asarray(delta, dtype=np.float64) for delta in deltas]
    total = np.sum(deltas, axis=0)
    min_dim, tasks = min(total.shape), len(deltas)
    k, s = split_rank(min_dim, tasks, common_fraction)
    assert k >= 0, "the published algorithm is not defined for a negative k"
    u, sigma, v = thin_svd(total)
    limit = rank_tolerance * sigma[0] if rank_tolerance else -1.0
    k = min(k, int((sigma > limit).sum()))
    u_k, v_k = u[:, :k], v[:, :k]
    left, right, kept = [], [], [sigma[:k]]
    for delta in deltas:
        residual = delta - u_k @ (u_k.T @ delta)
        u_t, sigma_t, v_t = thin_svd(residual)
        count = min(s, int((sigma_t > limit).sum()))
        left.append(u_t[:, :count])
        right.append(v_t[:, :count])
        kept.append(sigma_t[:count])
    u_all = polar(np.concatenate([*left, u_k], axis=1), rank_tolerance)
    v_all = polar(np.concatenate([*right, v_k], axis=1), rank_tolerance)
    sigmas = np.concatenate(kept)
    return sigmas.sum() / (sigmas.size if rank_tolerance else min_dim) * (u_all @ v_all.T)


def merge_tensor(
    name: str, base: np.ndarray, experts: list[np.ndarray], *, method: str, scaling: float, common_fraction: float = 0.8
) -> np.ndarray:
    """One merged float tensor in float64: 2-D tensors flattened unless named ``text_projection``, others averaged."""
    base = np.asarray(base, dtype=np.float64)
    deltas = [np.asarray(expert, dtype=np.float64) - base for expert in experts]
    if method == "task-arithmetic":
        merged = np.sum(deltas, axis=0)
    elif method == "mean" or base.ndim != 2 or "text_projection" in name:
        merged = np.mean(deltas, axis=0)
    elif not any(delta.any() for delta in deltas):
        merged = np.zeros_like(base)
    elif method == "iso-c":
        merged = iso_c(deltas)
    else:
        merged = iso_cts(deltas, common_fraction)
    return base + scaling * merged


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    """‖value − expected‖_F / ‖expected‖_F."""
    scale = float(np.linalg.norm(expected))
    return float(np.linalg.norm(np.asarray(value, dtype=np.float64) - expected)) / (scale if scale > 0 else 1.0)
