"""Search for the top directions of task parts in a Chebyshev-filtered block Krylov space, and certify them.

Of a tall matrix [M, N], M > N: docs/numerics.md, "Searching for the tall task parts". A float32 search leaves an angle
of 1e-5 to 1e-3, a float64 one 1e-9; float64 products of the few columns with the data itself then refine and judge it.

Of a wide matrix a task's part is that of (r − k) x N numbers, whose Gram matrix has no cancellations and a fifth of the
tall one's side: there an eigensolver has little to do, unless a GPU goes through its columns one by one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import sym_mm_add, thin_mm, traits_of
from .blockwise import block_elements, short_side_gram, to_long_side, to_short_side
from .certificate import fixed_draw
from .cusolver import eigh
from .gram_eigh import GramEigh, GramFactorization
from .protocol import Subspace, default_tolerance, reciprocal, relative_gap, rounding_angle
from .thin import flagged_qr

# Below these the whole spectrum is as cheap.
SMALLEST_SIDE, LARGEST_FRACTION = 256, 1 / 16
# How far the columns of a block may grow apart between two Rayleigh-Ritz steps, and the angle at which a float32 search
# ends. Both are flat: 1e2 to 1e4 and 3e-4 to 3e-3 take the same time to 10 % (3072 x 768, noise and decaying spectra).
# Float64 has room for more: with 1e12, 5 and 9 steps are taken where 1e6 takes 7 and 17 (3584 x 1024, decay and noise).
GROWTH, SEARCH_ANGLE = {torch.float32: 1e3, torch.float64: 1e12}, 1e-3
# A float64 search ends at this share of the angle that its result is judged by.
EXACT_SHARE = 0.3
# Degrees of all polynomials of a search together, and steps of ``correction`` after a float32 one: each takes an angle
# of 1e-3 to about 1e-6.
MAX_DEGREE, CORRECTIONS = 400, 3
# Products that a Rayleigh-Ritz step takes as long as on a CPU (768 x 28 in float64: 3 ms, a product 0.75).
RITZ_PRODUCTS = 4
# Widths up to which products and eigensolvers of a block take a GPU as long as for a few columns less: tiles are 64
# columns wide, and cuSOLVER solves up to 128 in one block of threads each (H200: 8 of side 111 in 1 ms, of side 152 in
# 8). The wider a block is beyond s, the fewer products are needed.
FREE_WIDTHS = (64, 128)
# Sides of wide task parts from which a search of a batch takes a GPU less time than its eigensolver (H200: 8 of side
# 816 in 50 to 70 ms, of side 512 in 23; a Ritz step takes 4 to 5, and 3 to 5 are needed).
SMALLEST_WIDE_PART = 512
# Up to this size Δ is converted to float64 once on a GPU (32 MiB), and not by every product that needs it. On a CPU the
# products, of blocks that stay in the cache, take no longer with the conversion than without (3072 x 768, 28 columns).
CONVERTED_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Ritz:
    """Hold orthonormal Ritz vectors X [..., n, b] of G, values descending, and the column norms of G X − X Λ."""

    vectors: Tensor
    values: Tensor
    residuals: Tensor


def filtered_block(
    gram: Tensor, s: int, *, noise: Tensor, angle: float, oversampling: int = 9, max_work: float = math.inf
) -> Ritz | None:
    """Return the top ``s`` eigenvectors of G [..., n, n] ≥ −noise and ``oversampling`` more, in G's dtype.

    X ← T_d((G − m I)/w) X, where m ± w are the smallest Ritz value of the block and −noise, between Rayleigh-Ritz
    steps: what lies in between does not grow. The degree d is such that the block's own columns do not grow apart by
    more than ``GROWTH``, which is what keeps float32 good enough. The start is a fixed draw, so that results repeat.
    One read of the device at every step. It stops where ``angle_bound`` is below ``angle``, or the residual at the
    rounding of G's dtype; None where ``noise`` [...], the error of G's eigenvalues, reaches those of the block, or
    where more than ``max_work`` products would be needed, a Rayleigh-Ritz step counted as ``RITZ_PRODUCTS``.

    Reference: Zhou, Saad, Tiago, Chelikowsky, "Self-consistent-field calculations using Chebyshev-filtered subspace
    iteration", J. Comput. Phys. 219 (2006).
    """
    n, width = gram.shape[-1], s + oversampling
    block = fixed_draw(n, width, gram.dtype, gram.device).expand(*gram.shape[:-2], n, width)
    for _ in range(2):
        block = thin_mm(gram, block)
    ritz, missed = ritz_in(gram, block)
    kept = torch.full(gram.shape[:-2], s, device=gram.device)
    degree, work = 0, 0
    while degree < MAX_DEGREE:
        largest, cut = ritz.values[..., 0], ritz.values[..., -1]
        floor = 4.0 * torch.finfo(gram.dtype).eps * largest
        done = (ritz.residuals[..., :s].amax(-1) <= floor) | (angle_bound(ritz, kept) <= angle)
        # The growth of the largest eigenvalue's column over that of the smallest: cosh(d·acosh((λ₁ − m)/w)).
        middle, half = (cut - noise) / 2.0, ((cut + noise) / 2.0).clamp_min(torch.finfo(gram.dtype).tiny)
        ratio = torch.where(done, 1.0, (1.05 * largest - middle) / half).amax()
        flags = (missed.any(), done.all(), ((noise > cut) & ~done).any())
        ratio, *read = torch.stack([ratio, *flags]).tolist()
        is_missed, is_done, is_hidden = map(bool, read)
        if is_missed:
            ritz, missed = _rayleigh_ritz(gram, torch.linalg.qr(block)[0]), torch.zeros_like(missed)
            continue
        if is_done:
            break
        if is_hidden:
            return None
        step = max(4, int(math.log(GROWTH[gram.dtype]) / math.acosh(max(1.05, ratio))))
        work += step + RITZ_PRODUCTS
        if work > max_work:
            return None
        block = _chebyshev(gram, ritz.vectors, middle, half, step)
        ritz, missed = ritz_in(gram, block)
        degree += step
    return ritz


def angle_bound(ritz: Ritz, kept: Tensor) -> Tensor:
    """Bound ‖sin θ‖_F/√s between the first ``kept`` Ritz vectors E of X = [E, F] and eigenvectors, to second order.

    The residuals W = G X − X Λ are orthogonal to X. So E is off by at most ‖W_E‖/(λ_s − λ_b) outside of X, with λ_b for
    the spectrum beyond X, and inside of X only through what couples both to the outside:
    ‖W_E‖ ‖W_F‖ / ((λ_s − λ_b)(λ_s − λ_{s+1})).

    Reference: Stewart, "Matrix Algorithms II: Eigensystems", ch. 4, §2.
    """
    first = torch.arange(ritz.values.shape[-1], device=ritz.values.device) < kept[..., None]
    w_e = torch.linalg.vector_norm(ritz.residuals * first, dim=-1)
    w_f = torch.linalg.vector_norm(ritz.residuals * ~first, dim=-1)
    tiny = torch.finfo(ritz.values.dtype).tiny
    last = torch.where(first, ritz.values, math.inf).amin(-1)
    far = (last - ritz.values[..., -1]).clamp_min(tiny)
    near = (last - torch.where(first, -math.inf, ritz.values).amax(-1)).clamp_min(tiny)
    return w_e / far * (1.0 + w_f / near) / kept.clamp_min(1).sqrt()


def _chebyshev(gram: Tensor, x: Tensor, middle: Tensor, half: Tensor, degree: int) -> Tensor:
    """Return T_d((G − m I)/w) X by the three-term recurrence, one product with an addition a degree."""
    shifted = gram / half[..., None, None]
    shifted.diagonal(dim1=-2, dim2=-1).sub_((middle / half)[..., None])
    before, now = x, thin_mm(shifted, x)
    for _ in range(degree - 1):
        before, now = now, thin_mm(shifted, now, c=before, alpha=2.0, beta=-1.0)
    return now


def ritz_in(gram: Tensor, block: Tensor) -> tuple[Ritz, Tensor]:
    """Return the Ritz vectors in the span of ``block``, and which of a batch ``flagged_qr`` missed."""
    x, _, missed = flagged_qr(block)
    return _rayleigh_ritz(gram, x), missed


def _rayleigh_ritz(gram: Tensor, x: Tensor) -> Ritz:
    image = thin_mm(gram, x)
    projected = x.mT @ image
    values, vectors = eigh((projected + projected.mT).mul_(0.5))
    values, vectors = values.flip(-1).clamp_min(0.0), vectors.flip(-1)
    x = thin_mm(x, vectors)
    return Ritz(x, values, torch.linalg.vector_norm(thin_mm(image, vectors) - x * values[..., None, :], dim=-2))


def correction(gram: Tensor, x: Tensor, shifts: Tensor, w: Tensor, *, steps: int = 12) -> Tensor:
    """Return C_j ≈ (λ_j − P G P)⁻¹ W_j by conjugate gradients, P = I − XXᵀ, all columns at once.

    To first order C is what is missing from Ritz vectors with residual W [..., n, s], XᵀW = 0. X [..., n, b] is the
    whole block. The λ_j, ``shifts`` [..., s], lie above the spectrum of P G P: the systems are positive definite.
    """
    tiny = torch.finfo(w.dtype).tiny
    c, r = torch.zeros_like(w), w
    p, rho = r, r.square().sum(-2)
    for _ in range(steps):
        image = thin_mm(gram, p)
        image = p * shifts[..., None, :] - (image - thin_mm(x, x.mT @ image))
        length = rho / (p * image).sum(-2).clamp_min(tiny)
        c = c + p * length[..., None, :]
        r = r - image * length[..., None, :]
        rho, before = r.square().sum(-2), rho
        p = r + p * (rho / before.clamp_min(tiny))[..., None, :]
    return c


def search_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the search in a Δ in ``dtype``, and of the U_k that it needs."""
    return torch.float64 if traits_of(device).has_float64_tensor_cores else dtype


def is_converted_once(elements: int, device: torch.device) -> bool:
    """Return whether Δ is converted to float64 once, and not in blocks by every product."""
    return traits_of(device).is_gpu and elements <= CONVERTED_ELEMENTS


def _residual_gram(delta: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
    """Return G = ΔᵀΔ − YᵀY and Y = U_kᵀΔ of a tall Δ and ``long`` = U_k, in their dtype."""
    y = long.mT @ delta
    gram = short_side_gram(delta, dtype=delta.dtype)
    return sym_mm_add(gram, y.mT, alpha=-1.0, out=gram), y


@dataclass(frozen=True)
class ChebyshevSubspace(GramEigh):
    """Solve as ``GramEigh`` does, but search for the task parts of tall matrices and certify them in float64.

    Args:
        angle: largest ‖sin θ‖_F/√s between the s directions found and the true ones, from the float64 residual and the
            gap (Davis-Kahan); beyond it that task is solved exactly. Iso-CTS magnifies it where tasks are alike, by up
            to 20 on deltas with strong shared directions (3072 x 768, T = 8): with 1e-5, results were off by 2e-5.
        oversampling: columns of a block beyond s.
    """

    angle: float = 1e-6
    oversampling: int = 9

    @property
    def name(self) -> str:
        return f"{super().name}+chebyshev"

    def block_width(self, short: int, s: int, device: torch.device) -> int:
        """Return the columns of a block: s + p, and on a GPU as many more as cost nothing there (``FREE_WIDTHS``)."""
        width = s + self.oversampling
        if not traits_of(device).is_gpu:
            return width
        return next((free for free in FREE_WIDTHS if width <= free <= short // 4), width)

    def search_bytes(self, rows: int, columns: int, s: int, device: torch.device) -> int:
        """Return the peak bytes of the search in a tall float32 Δ: Δ or blocks in float64, thin blocks, G twice."""
        width = self.block_width(min(rows, columns), s, device)
        whole = rows * columns
        blocks = min(whole, max(block_elements(device), columns))
        converted = 8 * (whole if is_converted_once(whole, device) else blocks)
        item = search_dtype(torch.float32, device).itemsize
        return converted + 8 * 4 * rows * width + item * (2 * columns**2 + 8 * columns * width)

    def factorize(self, x: Tensor, *, tolerance: Tensor | None = None) -> SearchedFactorization:
        return SearchedFactorization(x, default_tolerance(x) if tolerance is None else tolerance, self)

    def long_dtypes(
        self, wide: bool, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.dtype | None, torch.dtype]:
        """Return the dtypes of ``GramEigh``, and for tall matrices that of the U_k that the search needs."""
        return None if wide else search_dtype(dtype, device), super().long_dtypes(wide, dtype, device)[1]

    def part_bytes(
        self, rows: int, columns: int, k: int, s: int, at_once: int, dtype: torch.dtype, device: torch.device
    ) -> int:
        every = super().part_bytes(rows, columns, k, s, at_once, dtype, device)
        if rows <= columns:
            return every
        searched = search_dtype(dtype, device)
        # Δ_t in float64, and its Y.
        converted = 8 * (rows * columns + k * columns) if searched != dtype else 0
        u_k = searched.itemsize * rows * k
        return u_k + converted + every + at_once * self.search_bytes(rows, columns, s, device)


@dataclass(frozen=True, eq=False)
class SearchedFactorization(GramFactorization):
    """Search for task parts in place of computing all their directions."""

    solver: ChebyshevSubspace

    def residual(self, delta: Tensor, common: Subspace, s: int, *, norm: Tensor, tolerance: Tensor) -> Subspace:
        """Return the top ``s`` triplets of R, searched for in G = ΔᵀΔ − YᵀY with Y = U_kᵀΔ, in ``search_dtype``."""
        solver, short = self.solver, common.short.shape[-2]
        is_narrow = short >= SMALLEST_SIDE and s + solver.oversampling <= short * LARGEST_FRACTION
        if common.long is None or common.wide or not is_narrow:
            return super().residual(delta, common, s, norm=norm, tolerance=tolerance)
        dtype = search_dtype(delta.dtype, delta.device)
        if dtype == delta.dtype:
            gram, y = _residual_gram(delta, common.long.to(dtype))
            angle = SEARCH_ANGLE
        else:  # one by one: a whole batch in float64 would be most of the memory
            longs = common.long.to(dtype).expand(*delta.shape[:-2], *common.long.shape[-2:])
            gram = torch.empty(*delta.shape[:-2], delta.shape[-1], delta.shape[-1], dtype=dtype, device=delta.device)
            for member in itertools.product(*map(range, delta.shape[:-2])):
                gram[member] = _residual_gram(delta[member].to(dtype), longs[member])[0]
            y = None
            angle = EXACT_SHARE * solver.angle
        noise = 8.0 * torch.finfo(dtype).eps * norm.square().to(dtype)
        oversampling = solver.block_width(gram.shape[-1], s, gram.device) - s
        block = filtered_block(gram, s, noise=noise, angle=angle, oversampling=oversampling)
        found = None if block is None else self._refined(block.vectors, gram, y, delta, common, s, tolerance)
        if found is None:
            return super().residual(delta, common, s, norm=norm, tolerance=tolerance)
        return found

    def _top_of_projected(self, projected: Tensor, s: int, tolerance: Tensor) -> Subspace:
        """Return the top s triplets of C = Q_cᵀ Δ, searched for in float64 where that is faster than an eigensolver."""
        solver, side, device = self.solver, projected.shape[-2], projected.device
        width = solver.block_width(side, s, device)
        is_exact = search_dtype(torch.float32, device) == torch.float64
        if not is_exact or side < SMALLEST_WIDE_PART or width > side // 4:
            return super()._top_of_projected(projected, s, tolerance)
        gram = short_side_gram(projected)
        noise = solver.noise * gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        ritz = filtered_block(gram, s, noise=noise, angle=EXACT_SHARE * solver.angle, oversampling=width - s)
        del gram
        if ritz is None:
            return super()._top_of_projected(projected, s, tolerance)
        sigma, blur = ritz.values.sqrt(), solver.blur(ritz.values.sqrt())
        kept = sigma[..., :s]
        bound = angle_bound(ritz, torch.full(kept.shape[:-1], s, device=device))
        # What is near zero, or hidden, is for a solver that computes all directions.
        limit = torch.maximum(tolerance.double(), (2.0 * blur).sqrt())
        if not bool(((bound <= solver.angle) & (kept[..., -1] > limit)).all()):
            return super()._top_of_projected(projected, s, tolerance)
        top = ritz.vectors[..., :, :s]
        return Subspace(
            short=top,
            long=to_long_side(projected, top / kept[..., None, :], torch.float64),
            sigma=kept,
            complement=None,
            gap=relative_gap(sigma, s),
            angle=bound + rounding_angle(sigma, s, tolerance, blur),
            unresolved=torch.zeros(kept.shape[:-1], dtype=torch.int64, device=device),
            wide=True,
        )

    def _refined(
        self,
        block: Tensor,
        gram: Tensor,
        y: Tensor | None,
        delta: Tensor,
        common: Subspace,
        s: int,
        tolerance: Tensor,
    ) -> Subspace | None:
        """Return the top ``s`` triplets of R near ``block``, certified in float64; None where ``angle`` is not reached.

        On a few columns X all of R's products are made from the data: R X = P − S V_k Σ_k⁻² V_kᵀ Sᵀ P with P = Δ X, and
        RᵀR X = Δᵀ(R X). Without ``y`` nothing is corrected.
        """
        assert common.long is not None
        solver, total = self.solver, self.x
        exact_delta = delta.double() if is_converted_once(delta.numel(), delta.device) else delta
        x, _, missed = flagged_qr(block.double())
        image = to_long_side(exact_delta, x, torch.float64)
        inside = thin_mm(common.whitened, thin_mm(common.whitened.mT, to_short_side(total, image)))
        image -= to_long_side(total, inside, torch.float64)
        corrections = 0 if y is None else CORRECTIONS
        for step in range(corrections + 1):
            values, vectors = eigh(image.mT @ image)
            values, vectors = values.flip(-1).clamp_min(0.0), vectors.flip(-1)
            x, image = thin_mm(x, vectors), thin_mm(image, vectors)
            w = to_short_side(exact_delta, image) - x * values[..., None, :]
            sigma = values.sqrt()
            limit = torch.maximum(tolerance, math.sqrt(2.0 * solver.noise) * sigma[..., 0])[..., None]
            kept = sigma[..., :s] > limit
            bound = angle_bound(Ritz(x, values, torch.linalg.vector_norm(w, dim=-2)), kept.sum(-1))
            unresolved = solver.unresolved(sigma[..., :s], tolerance)
            if bool(((bound <= solver.angle) & (unresolved == 0) & ~missed).all()):
                kept_sigma = torch.where(kept, sigma[..., :s], 0.0)
                return Subspace(
                    short=x[..., :, :s] * kept[..., None, :],
                    long=image[..., :, :s] * reciprocal(kept_sigma)[..., None, :],
                    sigma=kept_sigma,
                    complement=None,
                    gap=relative_gap(sigma, s),
                    angle=bound,
                    unresolved=unresolved,
                    wide=False,
                )
            if y is not None and step < corrections:
                # In float32: what it corrects is small.
                narrow = (part.to(delta.dtype) for part in (x, values[..., :s], w[..., :, :s]))
                c = correction(gram, *narrow)
                x[..., :, :s] += c
                image[..., :, :s] += thin_mm(delta, c) - thin_mm(common.long.to(delta.dtype), thin_mm(y, c))
                x, r, again = flagged_qr(x)
                missed = missed | again
                image = torch.linalg.solve_triangular(r, image, upper=True, left=False)
        return None
