"""The judge: Iso-C and Iso-CTS as published (arXiv 2502.04959), in numpy float64, by full SVD and nothing else.

``rank_tolerance`` > 0 truncates singular directions below it (relative to the largest): the meaning this project gives
to rank-deficient sums, where the published formula is not a function.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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


# What this project's rules make of input for which the published formula is no function (docs/numerics.md, "Rank").
SAME_DIRECTION = 1e-6
FLOAT64 = float(np.finfo(np.float64).eps)


@dataclass
class Judgement:
    """The answer to one input by the published formula and the rules of docs/numerics.md, and how well it is known.

    Attributes:
        value: the merged Δ.
        doubts: why the input does not determine it: a singular value at the limit where ranks are cut, singular values
            on both sides of a cut that are one but for the input's rounding, vectors at the limit where two directions
            are one.
        uncertainty: relative error that float64 leaves in ``value``: three times the largest change, of two tries, when
            every entry is moved by its last bit or so and rows and columns are put in another order.
    """

    value: np.ndarray
    doubts: set[str] = field(default_factory=set)
    uncertainty: float = 0.0


def judge(deltas: list[np.ndarray], method: str, eps: float, common_fraction: float = 0.8) -> Judgement:
    """``iso_c`` or ``iso_cts`` under the rules of docs/numerics.md; ``eps`` is that of the dtype of the deltas.

    Singular values are left out up to ``rounding_level``; a limit counts as clear where nothing lies within a factor of
    2 of it, a cut where its gap is twice that level or more.
    """
    found = Judgement(_ruled(deltas, method, eps, common_fraction, doubts := set()), doubts)
    chance = np.random.default_rng(0)
    for _ in range(2):
        rows, columns = (chance.permutation(size) for size in found.value.shape)
        moved = [
            (delta * (1.0 + FLOAT64 * chance.uniform(-1, 1, delta.shape)))[np.ix_(rows, columns)] for delta in deltas
        ]
        again = _ruled(moved, method, eps, common_fraction, set())
        found.uncertainty = max(found.uncertainty, 3.0 * relative_error(again, found.value[np.ix_(rows, columns)]))
    return found


def rounding_level(norm: float, shape: tuple[int, ...], eps: float) -> float:
    """2 ε ‖Δ‖_F (√M + √N) / √(M N)."""
    return 2.0 * eps * norm * (shape[0] ** 0.5 + shape[1] ** 0.5) / (shape[0] * shape[1]) ** 0.5


def _ruled(deltas: list[np.ndarray], method: str, eps: float, common_fraction: float, doubts: set[str]) -> np.ndarray:
    total = np.sum(deltas, axis=0)
    shape, min_dim = total.shape, min(total.shape)
    norms = [float(np.linalg.norm(delta)) for delta in deltas]
    size = float(np.linalg.norm(norms))
    if 0.0 < np.linalg.norm(total) < 1e-12 * size:
        doubts.add("a sum that is zero but for rounding")
    if not total.any():
        return np.zeros(shape)
    k, s = split_rank(min_dim, len(deltas), common_fraction) if method == "iso-cts" else (min_dim, 0)
    assert k >= 0
    u, v, sigma, level = _kept(total, k, rounding_level(size, shape, eps), doubts)
    left, right, kept = [], [], [sigma]
    for delta, norm in zip(deltas, norms, strict=True) if s else ():
        limit = rounding_level(norm, shape, eps)
        if len(sigma) < k:
            # What an error of that size in S leaves of the common directions in the residual.
            limit += level * float(np.linalg.norm(u.T @ delta / sigma[:, None]))
        residual = delta - u @ (u.T @ delta)
        residual -= u @ (u.T @ residual)
        u_t, v_t, sigma_t, _ = _kept(residual, s, limit, doubts)
        left.append(u_t)
        right.append(v_t)
        kept.append(sigma_t)
    sigmas = np.concatenate(kept)
    if not sigmas.size:
        return np.zeros(shape)
    factors = [_joined([*parts, common], doubts) if s else common for parts, common in ((left, u), (right, v))]
    return sigmas.mean() * (factors[0] @ factors[1].T)


def _kept(
    x: np.ndarray, count: int, level: float, doubts: set[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(U, V, σ) of the top ``count`` above the level, and the level, which is no less than what float64 leaves."""
    u, sigma, v = thin_svd(x)
    level = max(level, 16.0 * FLOAT64 * (sigma[0] if sigma.size else 0.0))
    if ((sigma[:count] > level / 2) & (sigma[:count] < 2 * level)).any():
        doubts.add("rank")
    if count < sigma.size and sigma[count - 1] > level and sigma[count - 1] - sigma[count] < 2 * level:
        doubts.add("gap")
    keep = sigma[:count] > level
    return u[:, :count][:, keep], v[:, :count][:, keep], sigma[:count][keep], level


def _joined(blocks: list[np.ndarray], doubts: set[str]) -> np.ndarray:
    """The polar factor of unit vectors side by side, in its range."""
    u, sigma, v = thin_svd(np.concatenate(blocks, axis=1))
    if ((sigma > SAME_DIRECTION / 2) & (sigma < 2 * SAME_DIRECTION)).any():
        doubts.add("same direction")
    keep = sigma > SAME_DIRECTION
    return u[:, keep] @ v[:, keep].T
