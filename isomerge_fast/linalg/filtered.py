"""Split the directions of a sum by products alone: its polar factor, and a spectral filter of what is left of it.

With W = polar(S) and H = S Wᵀ (wide; WᵀS tall), whose eigenvalues are the σ of S and whose vectors are those of the
short side, the bottom c = r − k directions Q_c of H give

    U_k V_kᵀ = W − Q_c Q_cᵀ W  (wide; W − W Q_c Q_cᵀ tall),    Σ_{i ≤ k} σ_i = tr H − tr Q_cᵀ H Q_c,

which is all that Iso-CTS needs of the common part: no direction of U_k has to be told from another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..ops import sym_mm, thin_mm, traits_of
from .blockwise import short_side_gram, to_long_side
from .certificate import symmetry
from .gram_eigh import GramEigh, GramFactorization
from .polar_express import PolarExpress
from .polar_gram import GramNewtonSchulz
from .polar_iteration import PolarIteration
from .polar_traced import TracedPolar
from .protocol import PolarSolver, PolarStats, Subspace, default_tolerance
from .spectral_filter import COUNTING_BLOCK, COUNTING_VECTORS, BottomBlock, bottom_block
from .spectrum import largest_eigenvalue
from .subspace_alike import alike_block
from .subspace_chebyshev import angle_bound

# ℓ for a stack, whose members all get the same steps: of its sums, of the small polar factors of Iso-CTS. Square sums
# of deltas have κ up to 3e5, long ones 25, the small factors 1e3 (docs/numerics.md).
STACK_LOWER = {"square": 1e-7, "long": 1e-3, "small": 1e-5}
# Up to this side cuSOLVER has the eigenvalues of a whole stack sooner than a search of it (H200: 64 of side 128 in
# 1.3 ms, of side 192 in 9, of side 768 in 81). Wide parts, of sides 152 and 208, took no less by a search (ms of the
# device for a stack, with an eigensolver / searched for: 42.6 / 44.9, 8 of 768 x 3072; 70.9 / 74.5, 8 of 1024 x 4096).
SMALLEST_SEARCHED = 128
# Columns of a search beyond the s wanted, at least; up to 64 they cost a GPU nothing. No more than 2 s, as what is left
# of a tall Δ_t may have no more directions than all tasks are given.
SEARCHED_BEYOND, LARGEST_SEARCHED = 9, 64
# ‖QᵀQ − I‖_F/√r from which a polar factor is no basis to go on from.
NOT_POLAR = 1e-9


def polar_iteration(rows: int, columns: int, *, in_stack: bool) -> PolarIteration:
    """Return the polar iteration in float64 for matrices of this shape; a stack's has a fixed ℓ."""
    is_long = max(rows, columns) >= 2 * min(rows, columns)
    lower = STACK_LOWER["long" if is_long else "square"] if in_stack else None
    return GramNewtonSchulz(lower=lower) if is_long else PolarExpress(lower=lower)


@dataclass(frozen=True)
class SpectralFilter(GramEigh):
    """Find the common directions by ``spectral_filter``, all products; parts of tasks as ``GramEigh`` does.

    It is for fewer bottom directions than top ones, r − k ≤ k: others raise LinAlgError.

    Args:
        filter_dtype: of the filter. In float32 what is left of the large σ is 1e-5, and most certificates miss.
        in_stack: whether all matrices get the same steps, so that none depends on its neighbours.
    """

    filter_dtype: torch.dtype = torch.float64
    in_stack: bool = False

    @property
    def name(self) -> str:
        return f"spectral-filter-{'fp64' if self.filter_dtype == torch.float64 else 'fp32'}"

    def searched_width(self, side: int, s: int) -> int | None:
        """Return the columns of a search for a task part in a Gram matrix of that side, None where there is none."""
        width = max(s + SEARCHED_BEYOND, min(2 * s, side // 4, LARGEST_SEARCHED))
        return width if self.in_stack and side > SMALLEST_SEARCHED and width <= side // 4 else None

    def factorize(self, x: Tensor, *, tolerance: Tensor | None = None) -> FilteredFactorization:
        return FilteredFactorization(x, default_tolerance(x) if tolerance is None else tolerance, self)

    def polar(
        self, x: Tensor, *, tolerance: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, PolarStats]:
        solver = polar_iteration(*x.shape[-2:], in_stack=self.in_stack)
        return solver.polar(x, tolerance=tolerance, dtype=dtype)

    def long_dtypes(
        self, wide: bool, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.dtype | None, torch.dtype]:
        return None, torch.float64

    def small_polar(self, device: torch.device) -> PolarSolver:
        lower = STACK_LOWER["small"] if self.in_stack else None
        otherwise = GramEigh()
        return TracedPolar(otherwise, lower) if traits_of(device).has_float64_tensor_cores else otherwise

    def workspace_bytes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return the peak bytes beyond X: of the polar factor, or of that with U_k V_kᵀ, H and the filter."""
        short = min(rows, columns)
        polar = polar_iteration(rows, columns, in_stack=self.in_stack)
        counting = (COUNTING_BLOCK + 2) * COUNTING_VECTORS * short
        filtering = 8 * (2 * rows * columns + 8 * short**2 + 2 * counting)
        return max(polar.workspace_bytes(rows, columns, torch.float64, device), filtering)

    def part_bytes(
        self, rows: int, columns: int, k: int, s: int, at_once: int, dtype: torch.dtype, device: torch.device
    ) -> int:
        isometry = 8 * rows * columns
        every = super().part_bytes(rows, columns, k, s, at_once, dtype, device)
        if rows > columns:  # Δ_t in float64, and W_k for each of them; then Gram matrices and a search
            every = max(every, at_once * 8 * (2 * rows * columns + 6 * columns**2 + 4 * rows * s))
        return isometry + every


@dataclass(frozen=True, eq=False)
class FilteredFactorization(GramFactorization):
    """Describe X by its polar factor and the bottom of its spectrum."""

    solver: SpectralFilter

    def polar(self, dtype: torch.dtype) -> tuple[Tensor, PolarStats]:
        return self.solver.polar(self.x, tolerance=self.tolerance, dtype=dtype)

    @cached_property
    def vectors(self) -> tuple[Tensor, PolarStats, Tensor]:  # type: ignore[override]  # another form of them
        """Return (W, its evidence, H)."""
        q, stats = self.polar(torch.float64)
        is_wide = q.shape[-2] <= q.shape[-1]
        h = sym_mm(self.x, q.mT) if is_wide else sym_mm(q.mT, self.x)
        # To the last digit: an asymmetry of 1e-12 is 1e-5 of the angle's bound (256 x 1024, gap at the cut 0.3 %).
        h = 0.5 * (h + h.mT)
        # A member that is lost may hold NaN, at which an eigensolver of all members would stop.
        is_lost = ~(torch.linalg.matrix_norm(h) < torch.inf)[..., None, None]
        unit = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
        return torch.where(is_lost, 0.0, q), stats, torch.where(is_lost, unit, h)

    def top(self, k: int) -> Subspace:
        """Return U_k V_kᵀ as ``Subspace.isometry``, and the last directions before the cut; reads nothing."""
        q, stats, h = self.vectors
        is_wide, side = q.shape[-2] <= q.shape[-1], h.shape[-1]
        count = side - k
        if count > k:
            raise torch.linalg.LinAlgError(f"the filter is for at most {side // 2} bottom directions, not {count}")
        block = bottom_block(h, largest_eigenvalue(h), count, dtype=self.solver.filter_dtype)
        rest = block.vectors[..., :count]
        vars(self)["block"] = block
        isometry = q - (thin_mm(rest, rest.mT @ q) if is_wide else thin_mm(q, rest) @ rest.mT)
        nuclear = h.diagonal(dim1=-2, dim2=-1).sum(-1) - block.values[..., :count].sum(-1)
        is_wrong = block.missed | ~(stats.orthogonality <= NOT_POLAR) | (stats.rank < side)
        upper, lower = block.values[..., count], block.values[..., max(0, count - 1)]
        return Subspace(
            short=block.vectors[..., count:].flip(-1),
            long=None,
            sigma=(nuclear / max(1, k))[..., None].expand(*h.shape[:-2], k),
            complement=None,
            gap=((upper - lower) / upper.clamp_min(torch.finfo(h.dtype).tiny)).clamp_min(0.0),
            angle=self._angle(block, q, count) * (count / max(1, k)) ** 0.5,
            unresolved=is_wrong * side,
            wide=is_wide,
            is_whole=True,
            isometry=isometry,
        )

    def _angle(self, block: BottomBlock, q: Tensor, count: int) -> Tensor:
        """Return ``BottomBlock.angle`` with what the asymmetry of H adds: H is exact for an X' that far from X.

        An error with entries e of H turns a pair of directions by e over the difference of their values.
        """
        side, values = block.vectors.shape[-2], block.values
        tiny = torch.finfo(values.dtype).tiny
        entry = symmetry(self.x, q)[0] * torch.linalg.vector_norm(self.x, dim=(-2, -1)) / side
        apart = (values[..., None, count:] - values[..., :count, None]).clamp_min(tiny)
        # All that lies beyond the block as near as its end.
        beyond = apart[..., -1].square().reciprocal().sum(-1) * (side - values.shape[-1])
        turned = entry * (apart.square().reciprocal().sum((-2, -1)) + beyond).sqrt()
        return block.angle + torch.where(entry > 0, turned, 0.0) / max(1, count) ** 0.5

    def complement(self, top: Subspace) -> Tensor:
        block: BottomBlock = vars(self)["block"]
        return block.vectors[..., : block.vectors.shape[-2] - top.sigma.shape[-1]].contiguous()

    def complete(self, top: Subspace, dtype: torch.dtype) -> Subspace:
        return top

    def release(self) -> None:
        super().release()
        vars(self).pop("block", None)

    def residual(self, delta: Tensor, common: Subspace, s: int, *, norm: Tensor, tolerance: Tensor) -> Subspace:
        """Return the top ``s`` triplets of R; of a tall one with Y = W_kᵀ Δ, for which YᵀY is as for U_kᵀ Δ."""
        if common.wide:
            return super().residual(delta, common, s, norm=norm, tolerance=tolerance)
        isometry = common.isometry
        assert isometry is not None
        y = short_side_gram(isometry, delta)

        def residual(v: Tensor) -> Tensor:
            return to_long_side(delta, v, torch.float64).sub_(isometry @ thin_mm(y, v))

        return self.tall_part(delta, y, residual, s, norm=norm, tolerance=tolerance)

    def part_vectors(
        self, gram: Tensor, s: int, noise: Tensor, tolerance: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | float, Tensor | int]:
        """Return ``GramFactorization.part_vectors``; searched for in a stack, where that takes less time."""
        width = self.solver.searched_width(gram.shape[-1], s)
        if width is None:
            return super().part_vectors(gram, s, noise, tolerance)
        ritz, missed = alike_block(gram, s, width, noise=noise)
        sigma = ritz.values.sqrt()
        kept = torch.where(sigma <= tolerance[..., None], 0.0, sigma)
        angle = angle_bound(ritz, torch.full(noise.shape, s, device=gram.device))
        return ritz.vectors, sigma, kept, angle, missed
