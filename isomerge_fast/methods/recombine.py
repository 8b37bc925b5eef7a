"""U° V°ᵀ of Iso-CTS: the polar factors of [U_1 … U_T, U_k] and [V_1 … V_T, V_k], multiplied, in few dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.certificate import orthogonality
from ..linalg.gram_eigh import GramEigh
from ..linalg.protocol import PolarSolver, PolarStats, Subspace
from ..linalg.thin import thin_qr

# Two unit vectors closer than this are one direction. Bases are known to 1e-7 or better; distinct tasks of pure noise
# come as close as 2e-5 in one of a hundred draws.
SAME_DIRECTION = 1e-6


def recombine(common: Subspace, parts: list[Subspace], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U° V°ᵀ = W_k − U_a V_aᵀ + [polar(U_ts), U_a] · polar(Z)ᵀ · [V_a, Q_r]ᵀ where every direction is there.

    With A = V_kᵀ V_ts = Q_a A' and V_ts − V_k A = Q_r B' (thin QRs), V_a = V_k Q_a, U_a = U_k Q_a, W_k = U_k V_kᵀ and
    Z = [[A', I], [B', 0]]: in the basis [V_a, Q_r, rest of V_k] the matrix [V_ts, V_k] is Z beside an identity.

    Args:
        parts: emptied, to be freed as soon as they are not needed.
        dtype: of the result.

    Returns:
        The product [..., M, N] and its orthogonality (see ``PolarStats``).
    """
    u_tasks, v_tasks = _side_by_side(parts)
    # What is thin is float64: κ(U_ts) and κ(Z) are 1e3 on typical square sums, and 5e4 in one of a hundred; float32
    # would leave 1e-5 of the result undetermined.
    u_polar, u_stats = _polar_of_tasks(u_tasks, common)
    tasks_width = u_tasks.shape[-1]
    del u_tasks
    u_polar = u_polar.to(dtype)
    v_k = common.v if common.wide else common.short
    a = v_k.mT @ v_tasks
    # Once: what float64 leaves of V_k in it is ε₆₄, and its own singular values are above 1e-5 (see above).
    rest = v_tasks - v_k @ a
    del v_tasks
    small = small_problem(a, rest)
    del a, rest
    weights = small.weights.to(dtype)
    left = u_polar @ weights[..., :tasks_width, :]
    del u_polar
    u_k = common.u.to(dtype)
    _add_product(left, u_k @ small.q_a.to(dtype), weights[..., tasks_width:, :])
    right = torch.cat([v_k @ small.q_a, small.q_r], dim=-1).to(dtype)
    # Repeated tasks share directions, and the result then is no isometry: only its factors can be judged.
    full = (u_stats.rank == tasks_width) & small.is_full
    factors = torch.maximum(u_stats.orthogonality, small.orthogonality)
    del small
    value = u_k @ v_k.to(dtype).mT
    _add_product(value, left, right.mT)
    del left, right
    return value, torch.where(full, orthogonality(value).double(), factors)


@dataclass(frozen=True)
class SmallProblem:
    """polar(Z), and the bases in which Z is all of [V_ts, V_k] that is not an identity (see ``recombine``).

    Attributes:
        q_a, q_r: A = Q_a A' and V_ts − V_k A = Q_r B'.
        weights: polar(Z)ᵀ − [[0, 0], [I, 0]], so that [polar(U_ts), U_a] times these times [V_a, Q_r]ᵀ is to be added
            to U_k V_kᵀ.
        is_full: whether polar(Z) has full rank, [...].
        orthogonality: of polar(Z), [...].
    """

    q_a: Tensor
    q_r: Tensor
    weights: Tensor
    is_full: Tensor
    orthogonality: Tensor


def small_problem(a: Tensor, rest: Tensor, tolerance: Tensor | None = None) -> SmallProblem:
    """Of A = V_kᵀ V_ts and ``rest`` = V_ts − V_k A, both float64; ``tolerance`` is that of the polar factor."""
    q_a, a_small = thin_qr(a)
    q_r, b_small = thin_qr(rest)
    width, tasks_width = q_a.shape[-1], a.shape[-1]
    z = torch.zeros(*a.shape[:-2], width + q_r.shape[-1], tasks_width + width, dtype=a.dtype, device=a.device)
    z[..., :width, :tasks_width] = a_small
    z[..., width:, :tasks_width] = b_small
    z[..., :width, tasks_width:].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    z_polar, stats = GramEigh().polar(z, tolerance=tolerance)
    weights = z_polar.mT
    weights[..., tasks_width:, :width].diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return SmallProblem(q_a, q_r, weights, stats.rank == min(z.shape[-2:]), stats.orthogonality)


def recombine_literally(
    common: Subspace, parts: list[Subspace], dtype: torch.dtype, solver: PolarSolver
) -> tuple[Tensor, Tensor]:
    """U° V°ᵀ by two polar factors restricted to their ranges, for deficient sums and zero tasks; else as ``recombine``.

    The columns are unit vectors or zero: singular values below ``SAME_DIRECTION`` mean that directions repeat.
    """
    u_tasks, v_tasks = _side_by_side(parts)
    same = torch.full(u_tasks.shape[:-2], SAME_DIRECTION, dtype=torch.float64, device=u_tasks.device)
    u_polar, u_stats = solver.polar(torch.cat([u_tasks.to(dtype), common.u.to(dtype)], dim=-1), tolerance=same)
    v_polar, v_stats = solver.polar(torch.cat([v_tasks.to(dtype), common.v.to(dtype)], dim=-1), tolerance=same)
    return u_polar @ v_polar.mT, torch.maximum(u_stats.orthogonality, v_stats.orthogonality)


def _side_by_side(parts: list[Subspace]) -> tuple[Tensor, Tensor]:
    """[U_1 … U_T] and [V_1 … V_T]; ``parts`` is emptied."""
    u, v = [part.u for part in parts], [part.v for part in parts]
    parts.clear()
    u_tasks = torch.cat(u, dim=-1)
    u.clear()
    return u_tasks, torch.cat(v, dim=-1)


def _polar_of_tasks(u_tasks: Tensor, common: Subspace) -> tuple[Tensor, PolarStats]:
    """polar([U_1 … U_T]) in float64. Wide: [U_1 … U_T] = Q_c E with a square E, so it is Q_c polar(E)."""
    if common.wide and common.complement is not None:
        polar, stats = GramEigh().polar(common.complement.mT @ u_tasks)
        return common.complement @ polar, stats
    return GramEigh().polar(u_tasks)


def _add_product(value: Tensor, a: Tensor, b: Tensor) -> None:
    """value += A B without a temporary of the size of ``value``."""
    if value.ndim == 2:
        value.addmm_(a, b)
    else:
        value.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
