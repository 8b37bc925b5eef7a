"""Multiply U° V°ᵀ, the polar factors of [U_1 … U_T, U_k] and [V_1 … V_T, V_k] of Iso-CTS, in few dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linalg.blockwise import multiply_short_side, to_long_side, to_short_side
from ..linalg.certificate import orthogonality
from ..linalg.gram_eigh import float32_rounding
from ..linalg.protocol import PolarSolver, PolarStats, Solver, Subspace, reciprocal
from ..linalg.thin import flagged_qr, thin_qrs
from ..ops import sym_mm, thin_mm

# Two unit vectors closer than this are one direction. Bases are known to 1e-7 or better; distinct tasks of pure noise
# come as close as 2e-5 in one of a hundred draws.
SAME_DIRECTION = 1e-6
# Relative error that rounding the bases to float32 may leave.
ROUNDING = 1e-6
# As much as a float32 product with S may leave.
PRODUCT_ROUNDING = 3e-6
# Of a subspace's ``angle``, which takes the rounding of its matrix for one of full size at the cut, what is taken for
# its share in the residuals; and ‖dR‖ over ‖Δ‖ in float64. With both, the error of 512 x 64 at κ = 1e6 is a third of
# what is estimated, and that of most others far less.
TURNED = 0.03
PROJECTION = 0.7 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Recombined:
    """Hold U° V°ᵀ and its evidence, [...] each."""

    value: Tensor  # [..., M, N]
    orthogonality: Tensor  # see ``PolarStats``
    growth: Tensor  # an error θ of the tasks' directions, ‖·‖_F of both sides, is about ``growth`` θ in ``value``
    error: Tensor  # ‖·‖_F of the estimated error of the small polar factors
    same_directions: Tensor  # how many are one with others by ``SAME_DIRECTION``, of the side that has more


def projection_angle(sigma: Tensor, gap: Tensor, turned: Tensor, share: Tensor, min_dim: int, norm: Tensor) -> Tensor:
    """Return ‖sin θ‖_F / √s that the projection leaves in the top s of R = Δ − U_k U_kᵀ Δ, [...].

    It has two causes: its own rounding, and the error of U_k, which turns what Δ has of U_k beside the cut into what is
    beyond it.

    Args:
        sigma, gap: of the s directions, as in ``Subspace``.
        turned: ‖sin θ‖_F of U_k; a single entry of such a turn is that over √r.
        share: ‖uᵀΔ‖ for such a u, [...]: that of R is beyond.
        norm: ‖Δ‖_F, which rounding is relative to.
    """
    kept = sigma > 0
    smallest = torch.where(kept, sigma, math.inf).amin(-1)
    # Where directions were left out nothing lies near the cut.
    gap = torch.where(kept.all(-1), gap, 1.0)
    off = PROJECTION * norm + TURNED * turned * (share + sigma[..., 0])
    return off * reciprocal(smallest * gap) / math.sqrt(max(1, min_dim) * max(1, kept.shape[-1]))


def recombine(
    common: Subspace, parts: list[Subspace], dtype: torch.dtype, solver: Solver, total: Tensor | None = None
) -> Recombined:
    """Return U° V°ᵀ = W_k − U_a V_aᵀ + [polar(U_ts), U_a] · polar(Z)ᵀ · [V_a, Q_r]ᵀ where every direction is there.

    With A = V_kᵀ V_ts = Q_a A' and V_ts − V_k A = Q_r B' (thin QRs), V_a = V_k Q_a, U_a = U_k Q_a, W_k = U_k V_kᵀ and
    Z = [[A', I], [B', 0]]: in the basis [V_a, Q_r, rest of V_k] the matrix [V_ts, V_k] is Z beside an identity.

    ``parts`` is emptied, to be freed as soon as they are not needed. ``solver`` is that of the subspaces. Where
    ``common``, of a wide S = ``total``, has no long side, none is made of it (``FactoredRight``).
    """
    small_solver = solver.small_polar(common.sigma.device)
    u_tasks, v_tasks = _side_by_side(parts)
    # What is thin is float64: κ(U_ts) and κ(Z) are 1e3 on typical square sums, and 5e4 in one of a hundred; float32
    # would leave 1e-5 of the result undetermined.
    u_polar, u_stats, u_growth = _polar_of_tasks(u_tasks, common, small_solver)
    tasks_width = u_tasks.shape[-1]
    del u_tasks
    u_polar = u_polar.to(dtype)
    side = _right_side(common, dtype, total)
    a = side.coordinates(v_tasks)
    # Once: what float64 leaves of V_k in it is ε₆₄, and its own singular values are above 1e-5 (see above).
    rest = v_tasks - side.vectors(a)
    columns = v_tasks.shape[-2]
    del v_tasks
    small = small_problem(a, rest, small_solver, in_stack=solver.in_stack)
    del a, rest
    weights = small.weights.to(dtype)
    left = thin_mm(u_polar, weights[..., :tasks_width, :])
    del u_polar
    _add_product(left, side.left(small.q_a), weights[..., tasks_width:, :])
    right = side.basis(small)
    # Repeated tasks share directions, and the result then is no isometry: only its factors can be judged.
    same = torch.maximum(tasks_width - u_stats.rank, small.same_directions)
    factors = torch.maximum(u_stats.orthogonality, small.stats.orthogonality)
    v_growth = small.growth(columns, common.sigma.shape[-1])
    error = _in_quadrature(u_stats.error * u_stats.rank.sqrt(), small.stats.error * small.stats.rank.sqrt())
    del small
    value = side.product(left, right)
    del left, right
    found = torch.where((same == 0) & factors.isfinite(), orthogonality(value).double(), factors)
    return Recombined(value, found, _in_quadrature(u_growth, v_growth), error, same)


def _right_side(common: Subspace, dtype: torch.dtype, total: Tensor | None) -> MadeRight:
    if common.isometry is not None:
        return IsometricRight(common, dtype)
    return MadeRight(common, dtype) if total is None else FactoredRight(common, dtype, total)


@dataclass(frozen=True)
class MadeRight:
    """Multiply with the right side V_k of ``common``, which it has."""

    common: Subspace
    dtype: torch.dtype  # of the result

    @property
    def u_k(self) -> Tensor:
        return (self.common.short if self.common.wide else self.common.u).to(self.dtype)

    @property
    def v_k(self) -> Tensor:
        return self.common.v if self.common.wide else self.common.short

    def coordinates(self, x: Tensor) -> Tensor:
        """Return V_kᵀ X in float64."""
        return thin_mm(self.v_k.mT, x)

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Return V_k C in float64."""
        return thin_mm(self.v_k, coordinates)

    def left(self, coordinates: Tensor) -> Tensor:
        """Return U_k C in the dtype of the result."""
        return thin_mm(self.u_k, coordinates.to(self.dtype))

    def basis(self, small: SmallProblem) -> list[Tensor]:
        """Return what ``product`` makes [V_a, Q_r] of."""
        return [torch.cat([self.vectors(small.q_a), small.q_r], dim=-1).to(self.dtype)]

    def product(self, left: Tensor, right: list[Tensor]) -> Tensor:
        """Return U_k V_kᵀ + left [V_a, Q_r]ᵀ."""
        value = self.u_k @ self.v_k.to(self.dtype).mT
        _add_product(value, left, right[0].mT)
        return value


@dataclass(frozen=True)
class IsometricRight(MadeRight):
    """Multiply with V_k by W_k = U_k V_kᵀ alone: coordinates C of V_k are given and taken as U_k C."""

    @property
    def isometry(self) -> Tensor:
        assert self.common.isometry is not None
        return self.common.isometry

    def coordinates(self, x: Tensor) -> Tensor:
        return thin_mm(self.isometry, x)

    def vectors(self, coordinates: Tensor) -> Tensor:
        return thin_mm(self.isometry.mT, coordinates)

    def left(self, coordinates: Tensor) -> Tensor:
        return coordinates.to(self.dtype)

    def product(self, left: Tensor, right: list[Tensor]) -> Tensor:
        value = self.isometry.to(self.dtype, copy=True)
        _add_product(value, left, right[0].mT)
        return value


@dataclass(frozen=True)
class FactoredRight(MadeRight):
    """Multiply with V_k = Sᵀ U_k Σ_k⁻¹ by its factors: of a wide S that is a third of the operations of making it.

    U_k V_kᵀ and the part of V_a = V_k Q_a in the result are one product with S.
    """

    total: Tensor  # S

    def coordinates(self, x: Tensor) -> Tensor:
        return thin_mm(self.common.whitened.mT, to_short_side(self.total, x))

    def vectors(self, coordinates: Tensor) -> Tensor:
        return to_long_side(self.total, thin_mm(self.common.whitened, coordinates), torch.float64)

    def basis(self, small: SmallProblem) -> list[Tensor]:
        return [thin_mm(self.common.whitened, small.q_a), small.q_r.to(self.dtype)]

    def product(self, left: Tensor, right: list[Tensor]) -> Tensor:
        """Return (U_k Σ_k⁻¹ U_kᵀ + left_a (U_k Σ_k⁻¹ Q_a)ᵀ) S + left_r Q_rᵀ, in float64 where float32 would show."""
        common, total = self.common, self.total
        is_narrow = self.dtype != torch.float64 and bool((float32_rounding(common.sigma) <= PRODUCT_ROUNDING).all())
        factor, q_r = right
        left_a, left_r = left.split([factor.shape[-1], q_r.shape[-1]], dim=-1)
        dtype = self.dtype if is_narrow else torch.float64
        coefficients = sym_mm((common.short * reciprocal(common.sigma).sqrt()[..., None, :]).to(dtype))
        _add_product(coefficients, left_a.to(dtype), factor.to(dtype).mT)
        value = torch.empty(total.shape, dtype=self.dtype, device=total.device)
        multiply_short_side(coefficients, total, value)
        _add_product(value, left_r, q_r.mT)
        return value


@dataclass(frozen=True)
class SmallProblem:
    """Hold polar(Z), and the bases in which Z is all of [V_ts, V_k] that is not an identity (see ``recombine``)."""

    q_a: Tensor  # A = Q_a A'
    q_r: Tensor  # V_ts − V_k A = Q_r B'
    weights: Tensor  # W = polar(Z)ᵀ − [[0, 0], [I, 0]]: U° V°ᵀ is U_k V_kᵀ + [polar(U_ts), U_a] W [V_a, Q_r]ᵀ
    stats: PolarStats  # of polar(Z)
    same_directions: Tensor  # by how many its rank is below the side of Z, [...]

    def growth(self, columns: int, k: int) -> Tensor:
        """Return ``Recombined.growth`` of [V_ts, V_k], which is [columns, ts + k]."""
        width = self.weights.shape[-2] - self.q_a.shape[-1]
        ones = k - self.q_a.shape[-1]
        return over_columns(self.stats.growth(width + k, columns, ones=ones), columns, width)


def over_columns(growth: Tensor, long: int, width: int) -> Tensor:
    """Divide ``polar_growth`` by the ‖·‖_F of a random error in ``width`` columns of length ``long``."""
    return growth / math.sqrt(max(1, width * long))


def small_problem(a: Tensor, rest: Tensor, solver: PolarSolver, *, in_stack: bool = False) -> SmallProblem:
    """Return polar(Z) and its bases from A = V_kᵀ V_ts and ``rest`` = V_ts − V_k A, both float64."""
    (q_a, a_small), (q_r, b_small), missed = _bases(a, rest, in_stack)
    width, tasks_width = q_a.shape[-1], a.shape[-1]
    z = torch.zeros(*a.shape[:-2], width + q_r.shape[-1], tasks_width + width, dtype=a.dtype, device=a.device)
    z[..., :width, :tasks_width] = a_small
    z[..., width:, :tasks_width] = b_small
    z[..., :width, tasks_width:].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    z_polar, stats = solver.polar(z, tolerance=_same(z))
    if missed is not None:
        stats = replace(stats, orthogonality=stats.orthogonality.masked_fill(missed, torch.inf))
    weights = z_polar.mT
    weights[..., tasks_width:, :width].diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return SmallProblem(q_a, q_r, weights, stats, min(z.shape[-2:]) - stats.rank)


def _bases(
    a: Tensor, rest: Tensor, in_stack: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor | None]:
    """Return the thin QRs of both, and of a stack which have none that is to be trusted, [...]."""
    if not in_stack:
        of_a, of_rest = thin_qrs(a, rest)
        return of_a, of_rest, None
    (q_a, a_small, missed), (q_r, b_small, also) = flagged_qr(a), flagged_qr(rest)
    return (q_a, a_small), (q_r, b_small), missed | also


def recombine_literally(common: Subspace, parts: list[Subspace], dtype: torch.dtype, solver: PolarSolver) -> Recombined:
    """Return U° V°ᵀ by two polar factors restricted to their ranges, for deficient sums and zero tasks.

    The columns are unit vectors or zero: singular values below ``SAME_DIRECTION`` mean that directions repeat.
    """
    sides = _side_by_side(parts)
    factors, errors, growths = [], [], []
    same = torch.zeros((), dtype=torch.int64, device=common.sigma.device)
    found = torch.zeros((), dtype=torch.float64, device=common.sigma.device)
    for tasks, shared in zip(sides, (common.u, common.v), strict=True):
        there = (shared != 0).any(-2).sum(-1) + (tasks != 0).any(-2).sum(-1)
        polar, stats, error = _polar_in_range(tasks, shared, dtype, solver)
        factors.append(polar)
        errors.append(error)
        growth = stats.growth(polar.shape[-1], polar.shape[-2])
        growths.append(over_columns(growth, polar.shape[-2], tasks.shape[-1]))
        same, found = torch.maximum(same, there - stats.rank), torch.maximum(found, stats.orthogonality)
    value = factors[0] @ factors[1].mT
    return Recombined(value, found, _in_quadrature(*growths), _in_quadrature(*errors), same)


def _polar_in_range(
    tasks: Tensor, shared: Tensor, dtype: torch.dtype, solver: PolarSolver
) -> tuple[Tensor, PolarStats, Tensor]:
    """Return (polar([U_1 … U_T, U_k]) by ``SAME_DIRECTION``, its evidence, ‖·‖_F of its estimated error).

    The columns are rounded to ``dtype`` first, unless they are so nearly dependent that this would show. Reads one
    flag.
    """
    for rounded in (dtype, torch.float64):
        x = torch.cat([tasks.to(rounded), shared.to(rounded)], dim=-1)
        polar, stats = solver.polar(x, tolerance=_same(x), dtype=dtype)
        size = stats.rank.sqrt()
        entry = torch.finfo(rounded).eps / math.sqrt(max(1, x.shape[-2]))
        rounding = entry * stats.growth(min(x.shape[-2:]), max(x.shape[-2:]))
        if rounded == torch.float64 or bool((rounding <= ROUNDING * size).all()):
            return polar, stats, _in_quadrature(rounding, stats.error * size)
    raise AssertionError("float64 is the last")


def _in_quadrature(a: Tensor, b: Tensor) -> Tensor:
    return (a.square() + b.square()).sqrt()


def _same(x: Tensor) -> Tensor:
    """Return ``SAME_DIRECTION`` for every matrix of a batch."""
    return torch.full(x.shape[:-2], SAME_DIRECTION, dtype=torch.float64, device=x.device)


def _side_by_side(parts: list[Subspace]) -> tuple[Tensor, Tensor]:
    """Return [U_1 … U_T] and [V_1 … V_T]; ``parts`` is emptied."""
    u, v = [part.u for part in parts], [part.v for part in parts]
    parts.clear()
    u_tasks = torch.cat(u, dim=-1)
    u.clear()
    return u_tasks, torch.cat(v, dim=-1)


def _polar_of_tasks(u_tasks: Tensor, common: Subspace, solver: PolarSolver) -> tuple[Tensor, PolarStats, Tensor]:
    """Return (polar([U_1 … U_T]) in float64, its evidence, its growth ``over_columns``).

    Wide: [U_1 … U_T] = Q_c E with a square E, so it is Q_c polar(E).
    """
    inside = u_tasks if common.complement is None else thin_mm(common.complement.mT, u_tasks)
    polar, stats = solver.polar(inside, tolerance=_same(inside))
    long, width = inside.shape[-2:]
    growth = over_columns(stats.growth(width, long), long, width)
    if common.complement is not None:
        polar = thin_mm(common.complement, polar)
    return polar, stats, growth


def _add_product(value: Tensor, a: Tensor, b: Tensor) -> None:
    """Add A B to ``value`` without a temporary of its size."""
    if value.ndim == 2:
        value.addmm_(a, b)
    else:
        value.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
