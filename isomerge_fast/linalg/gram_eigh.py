"""Solve by the eigenvectors of the short side's Gram matrix, in float64: the default tier.

For X [M, N] with M ≤ N (the tall case is the transpose):

    G = X Xᵀ = U Σ² Uᵀ,    polar(X) = G^(-1/2) X = U Σ⁻¹ Uᵀ X,    V = Xᵀ U Σ⁻¹.

G squares the condition number, so it is formed in float64 from float32 entries or sums of a few of them: singular
values down to about 1e-7 σ₁ are resolved. One Newton-Schulz step Q ← (3/2 I − 1/2 Q Qᵀ) Q then squares the remaining
error. Nothing larger than the short side is ever factored, and the long side is walked in blocks: a 128256 x 4096
embedding needs X, Q and a few 4096 x 4096 matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from ..ops import sym_mm, sym_mm_add, thin_mm, traits_of
from .blockwise import (
    block_elements,
    multiply_short_side,
    project_short_side,
    short_side_gram,
    to_long_side,
    to_short_side,
)
from .certificate import probes
from .cusolver import eigh
from .polar_traced import TracedPolar
from .protocol import (
    Factorization,
    PolarSolver,
    PolarStats,
    Solver,
    Subspace,
    complement_basis,
    default_tolerance,
    reciprocal,
    relative_gap,
    rounding_angle,
)
from .spectrum import Product, largest_beyond

EPS = torch.finfo(torch.float32).eps
# Rounding of a float32 product G^(-1/2) X, relative to ‖Q‖, over rms(σ) rms(1/σ): measured 3.6 ε (768 x 3072).
PRODUCT = 4.0 * EPS


@dataclass(frozen=True)
class GramEigh(Solver):
    """Find polar factors and top triplets by ``eigh`` of the Gram matrix.

    Args:
        dtype: of the Gram matrix and its eigenvectors. float32 is for the ``fast`` tier: it resolves singular values
            down to 1.4e-3 σ₁, float64 down to 6e-8 σ₁.
        rounding: relative error of a float32 polar factor that its last products may add (see ``polar``); a hundredth
            of it for a float64 one.
        parts_dtype: of the Gram matrices of wide task parts, whose singular values lie close together.
    """

    dtype: torch.dtype = torch.float64
    rounding: float = 3e-6
    parts_dtype: torch.dtype = torch.float64

    @property
    def name(self) -> str:
        suffix = "" if self.parts_dtype == torch.float64 else "+fp32-parts"
        return ("gram-eigh-fp64" if self.dtype == torch.float64 else "gram-eigh-fp32") + suffix

    @property
    def noise(self) -> float:
        """Return the rounding error of eigenvalues relative to λ₁, a few ε.

        Singular values below √(2 noise) σ₁ cannot be told from it, and are truncated.
        """
        return 8.0 * torch.finfo(self.dtype).eps

    def factorize(self, x: Tensor, *, tolerance: Tensor | None = None) -> GramFactorization:
        return GramFactorization(x, default_tolerance(x) if tolerance is None else tolerance, self)

    def long_dtypes(
        self, wide: bool, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.dtype | None, torch.dtype]:
        """Return None, as ``residual`` needs no long side of S to be held beside Δ_t, and the dtype of the result's.

        V enters the recombination's small factors, whose conditioning float32 would not survive; U only products.
        """
        return None, torch.float64 if wide else dtype

    def small_polar(self, device: torch.device) -> PolarSolver:
        """Return ``TracedPolar``, all products, where tensor cores multiply float64, else this solver.

        Of side n the products are some 50 n³ operations, with the traces; an eigensolver has 9 n³ and n columns one by
        one. Without such tensor cores float64 products take longer than that.
        """
        return TracedPolar(self) if traits_of(device).has_float64_tensor_cores else self

    def workspace_bytes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return the peak bytes beyond X: the result, and a few r x r or blocks.

        ``eigh`` has the Gram matrix, a copy, vectors and 2 r² of work; then products have vectors, G^(-1/2) and blocks.
        """
        short = min(rows, columns)
        blocks = 3 * min(rows * columns, max(block_elements(device), short))
        largest = max(6 * short**2, 4 * short**2 + blocks)
        return dtype.itemsize * rows * columns + self.dtype.itemsize * largest + 8 * short**2

    def part_bytes(
        self, rows: int, columns: int, k: int, s: int, at_once: int, dtype: torch.dtype, device: torch.device
    ) -> int:
        """Return the peak bytes of ``residual``: no copies of Δ or S, only blocks of them."""
        short = min(rows, columns)
        if not traits_of(device).is_gpu or rows > columns:
            return at_once * 8 * 10 * short**2
        # C_t = Q_cᵀ Δ_t, and the eigensolver of C_t C_tᵀ; V_k's side of S, and blocks of Δ_t in float64.
        c = short - k
        blocks = min(at_once * rows * columns, 2 * max(block_elements(device), short))
        return at_once * 8 * (c * columns + 7 * c**2 + 3 * columns * s) + 8 * (short**2 + blocks)

    def eigh(self, gram: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (eigenvectors in ``dtype``, σ, σ with the truncated ones set to zero), all descending."""
        eigenvalues, vectors = eigh(gram)
        sigma = eigenvalues.flip(-1).double().clamp_min(0.0).sqrt()
        limit = torch.maximum(tolerance.double(), (2.0 * self.blur(sigma)).sqrt())
        # NaN, which is what ``eigh`` gives of a member it could not solve, is no rank 0: it stays.
        return vectors.flip(-1), sigma, torch.where(sigma <= limit[..., None], 0.0, sigma)

    def narrow_gram(self, x: Tensor) -> Tensor | None:
        """Return the Gram matrix made in float32, as float64, or None where its rounding would show in Q.

        It leaves at most 2.5 ε₃₂ (rms(σ) rms(1/σ))² in Q (160 x 64 … 4096 x 256, noise, spikes, decay). Both means come
        without an eigensolver: tr G, and tr G⁻¹ = E ‖L⁻¹ω‖² with the Cholesky factor L. Long matrices pass, square ones
        do not. Reads one flag, and none where float64 is as fast and nothing is to be gained.
        """
        rows, columns = x.shape[-2:]
        short = min(rows, columns)
        if short == 0 or max(rows, columns) < 2 * short or traits_of(x.device).has_float64_tensor_cores:
            return None
        gram = short_side_gram(x, dtype=torch.float32)
        lower, failed = torch.linalg.cholesky_ex(gram)
        solved = torch.linalg.solve_triangular(lower, probes(short, torch.float32, x.device), upper=False)
        spread = gram.diagonal(dim1=-2, dim2=-1).sum(-1) * solved.square().sum((-2, -1)) / short**2  # squared
        passed = (failed == 0) & (2.5 * EPS * spread.double() <= self.rounding)
        return gram.double() if bool(passed.all()) else None

    def blur(self, sigma: Tensor) -> Tensor:
        """Return the error of all σ² [...]: of LAPACK, and of products that underflow, from σ [..., r]."""
        info = torch.finfo(self.dtype)
        return self.noise * sigma[..., :1].square().sum(-1) + info.tiny / info.eps

    def unresolved(self, sigma: Tensor, tolerance: Tensor) -> Tensor:
        """Count the σ of each matrix, [..., r] -> [...], that the noise may hide: σ² is within twice the noise."""
        return _hidden(sigma, self.blur(sigma), tolerance)

    def seen(self, unresolved: Tensor, products: tuple[Product, Product], kept: Tensor, tolerance: Tensor) -> Tensor:
        """Return ``unresolved``, set to 0 where nothing beyond the kept directions is above the tolerance.

        Products with X itself show that: their rounding is not squared. Sums of low rank come to this.
        """
        if self.dtype != torch.float64:
            return unresolved
        return torch.where(largest_beyond(*products, kept) <= tolerance, 0, unresolved)


@dataclass(frozen=True, eq=False)
class GramFactorization(Factorization):
    """Describe X by the eigenvectors of its short side's Gram matrix."""

    solver: GramEigh

    def polar(self, dtype: torch.dtype) -> tuple[Tensor, PolarStats]:
        """Return polar(X) in ``dtype`` and its evidence; read one flag from the device.

        G^(-1/2) X is multiplied in the result's dtype where its rounding leaves an error below ``rounding``, else in
        float64. The Newton-Schulz step is left out where the eigenvalues' noise leaves less than that.
        """
        solver, x, limit = self.solver, self.x, self.tolerance
        gram = solver.narrow_gram(x) if x.dtype == torch.float32 and solver.dtype == torch.float64 else None
        narrow_gram = gram is not None
        vectors, sigma, kept_sigma = solver.eigh(gram if narrow_gram else short_side_gram(x, dtype=solver.dtype), limit)
        del gram
        keep = kept_sigma > 0
        rank = keep.sum(-1)
        inverse = reciprocal(kept_sigma)
        # Of eigh's noise in every eigenvalue, relative to that eigenvalue.
        noise = solver.noise * sigma[..., :1].square().sum(-1) * (inverse.pow(4).sum(-1) / rank.clamp_min(1)).sqrt()
        rounding = solver.rounding if dtype != torch.float64 else 1e-2 * solver.rounding
        spread = _spread(kept_sigma, inverse)
        if narrow_gram:
            noise = torch.zeros_like(noise)  # what is left is skew, which no Newton-Schulz step mends
        unresolved = solver.unresolved(sigma, limit)
        small = torch.stack([PRODUCT * spread <= rounding, noise <= rounding, unresolved == 0])
        narrow, clean, resolved = small.reshape(3, -1).all(1).tolist()
        if not resolved:
            unresolved = solver.seen(unresolved, _products(x), vectors * keep[..., None, :], limit)
        stats = PolarStats(
            solver.name,
            kept_sigma.sum(-1),
            rank,
            orthogonality=torch.empty(0),
            unresolved=unresolved,
            error=skew_error(solver.blur(sigma)[..., None] * inverse.square()),
            sigma=kept_sigma,
            spread=spread,
        )
        # G^(-1/2), as a product that is symmetric and half the work.
        root = sym_mm((vectors * inverse.sqrt()[..., None, :]).to(dtype if narrow else vectors.dtype))
        q = multiply_short_side(root, x, torch.empty(x.shape, dtype=dtype, device=x.device))
        del root
        scale = math.sqrt(max(1, sigma.shape[-1]))
        if clean:
            probe = probes(sigma.shape[-1], dtype, x.device)
            defect = to_short_side(q, to_long_side(q, probe, dtype))
            defect -= thin_mm(vectors, keep[..., :, None] * thin_mm(vectors.mT, probe.to(vectors))).to(dtype)
            return q, replace(stats, orthogonality=torch.linalg.matrix_norm(defect) / scale)
        step = short_side_gram(q, dtype=dtype)
        defect = step - sym_mm((vectors * keep[..., None, :]).to(dtype))
        orthogonality = torch.linalg.matrix_norm(defect) / scale
        del vectors, defect
        step.mul_(-0.5).diagonal(dim1=-2, dim2=-1).add_(1.5)
        multiply_short_side(step, q, q)
        return q, replace(stats, orthogonality=orthogonality)

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``GramEigh.eigh``, the vectors in float64."""
        vectors, sigma, kept_sigma = self.solver.eigh(short_side_gram(self.x, dtype=self.solver.dtype), self.tolerance)
        return vectors.double(), sigma, kept_sigma

    def top(self, k: int) -> Subspace:
        """Return the top ``k`` triplets without their long side; read two flags from the device at once."""
        solver, limit = self.solver, self.tolerance
        vectors, sigma, kept_sigma = self.vectors
        kept_sigma = kept_sigma[..., :k]
        top = vectors[..., :, :k] * (kept_sigma > 0)[..., None, :]
        unresolved = solver.unresolved(sigma[..., :k], limit)
        is_hiding, is_whole = torch.stack([(unresolved > 0).any(), (kept_sigma > 0).all()]).tolist()
        if is_hiding:
            unresolved = solver.seen(unresolved, _products(self.x), top, limit)
        return Subspace(
            short=top,
            long=None,
            sigma=kept_sigma,
            complement=None,
            gap=relative_gap(sigma, k),
            angle=rounding_angle(sigma, k, limit, solver.blur(sigma)),
            unresolved=unresolved,
            wide=self.x.shape[-2] <= self.x.shape[-1],
            is_whole=is_whole,
        )

    def complement(self, top: Subspace) -> Tensor:
        return complement_basis(self.vectors[0][..., :, top.sigma.shape[-1] :], top)

    def complete(self, top: Subspace, dtype: torch.dtype) -> Subspace:
        """Return ``top`` with its long side: X times the short side's vectors, over σ.

        As in ``polar``, a float32 result is computed in float32 where that leaves an error below ``rounding`` (one
        flag is read) and float64 is slower.
        """
        inverse = reciprocal(top.sigma)
        scaled = top.short * inverse[..., None, :]
        is_slow = dtype == torch.float32 and not traits_of(self.x.device).has_float64_tensor_cores
        if is_slow and bool((float32_rounding(top.sigma) <= self.solver.rounding).all()):
            scaled = scaled.to(dtype)
        return replace(top, long=to_long_side(self.x, scaled, dtype))

    def residual(self, delta: Tensor, common: Subspace, s: int, *, norm: Tensor, tolerance: Tensor) -> Subspace:
        """Return the top ``s`` triplets of R = Δ − U_k U_kᵀ Δ, U_k of ``common``; R itself is never formed.

        Wide, in ``parts_dtype``: with Q_c = ``common.complement``, C = Q_cᵀ Δ has few rows and R = Q_c C.
        Tall, in float64: U_kᵀ Δ = Y = Σ_k⁻¹ V_kᵀ (SᵀΔ), RᵀR = ΔᵀΔ − YᵀY, and R E = Δ E − S V_k Σ_k⁻¹ Y E for the s
        directions E kept.
        """
        solver, total = self.solver, self.x
        if common.wide:
            assert common.complement is not None
            projected = project_short_side(common.complement.to(solver.parts_dtype), delta)
            # The projection's own rounding: what it hides, and what it turns at the cut.
            rounding = torch.finfo(solver.parts_dtype).eps * norm
            noise = torch.maximum(tolerance, 4.0 * rounding)
            part = self._top_of_projected(projected, s, tolerance)
            visible = part.sigma > noise[..., None]
            return replace(
                part,
                short=thin_mm(common.complement, part.short * visible[..., None, :]),
                long=None if part.long is None else part.long * visible[..., None, :],
                sigma=part.sigma * visible,
                angle=part.angle + rounding * reciprocal(part.sigma[..., -1] * part.gap) / math.sqrt(max(1, s)),
                unresolved=part.unresolved + (~visible & (noise > tolerance)[..., None]).sum(-1),
            )
        y = common.whitened.mT @ short_side_gram(total, delta)

        def residual(v: Tensor) -> Tensor:
            product = to_long_side(delta, v, torch.float64)
            return product.sub_(to_long_side(total, thin_mm(common.whitened, thin_mm(y, v)), torch.float64))

        return self.tall_part(delta, y, residual, s, norm=norm, tolerance=tolerance)

    def tall_part(
        self, delta: Tensor, y: Tensor, residual: Product, s: int, *, norm: Tensor, tolerance: Tensor
    ) -> Subspace:
        """Return the top ``s`` triplets of a tall R with RᵀR = ΔᵀΔ − YᵀY and products R V."""
        solver = self.solver
        gram = sym_mm_add(short_side_gram(delta), y.mT, alpha=-1.0)
        # What cancels in ΔᵀΔ − YᵀY leaves rounding of the size of ‖Δ‖².
        noise = solver.noise * norm.square()
        vectors, sigma, kept_sigma, angle, missed = self.part_vectors(gram, s, noise, tolerance)
        del gram
        hidden = sigma[..., :s].square() <= 2.0 * noise[..., None]
        unresolved = _hidden(sigma[..., :s], noise, tolerance)
        kept_sigma = torch.where(hidden, 0.0, kept_sigma[..., :s])
        top = vectors[..., :, :s] * (kept_sigma > 0)[..., None, :]
        if solver.in_stack:
            unresolved = unresolved + missed
        elif bool((unresolved > 0).any()):
            unresolved = solver.seen(unresolved, (residual, partial(to_short_side, delta)), top, tolerance)
        return Subspace(
            short=top,
            long=residual(top * reciprocal(kept_sigma)[..., None, :]),
            sigma=kept_sigma,
            complement=None,
            gap=relative_gap(sigma, s),
            angle=angle + rounding_angle(sigma, s, tolerance, noise),
            unresolved=unresolved,
            wide=False,
        )

    def part_vectors(
        self, gram: Tensor, s: int, noise: Tensor, tolerance: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | float, Tensor | int]:
        """Return (vectors, σ, kept σ, ‖sin θ‖_F/√s, missed) of the top ``s`` of a task part's Gram matrix, or of more.

        Here of all, with nothing to be missed.
        """
        return *self.solver.eigh(gram, tolerance), 0.0, 0

    def _top_of_projected(self, projected: Tensor, s: int, tolerance: Tensor) -> Subspace:
        """Return the top s triplets of C = Q_cᵀ Δ, float64 vectors."""
        factors = GramEigh(self.solver.parts_dtype).factorize(projected, tolerance=tolerance)
        return factors.complete(factors.top(s), torch.float64)


def skew_error(relative: Tensor) -> Tensor:
    """Estimate the skew error that errors of G = X Xᵀ leave in G^(-1/2) X, over √rank: no Newton-Schulz step mends it.

    An error e of the entries of G turns a pair of directions by e |σ_i − σ_j| / (2 σ_i σ_j (σ_i + σ_j)). ``relative``
    [..., r] is the error of every σ², relative to it and 0 where it is not kept.
    """
    pairs = (relative.sum(-1).square() - relative.square().sum(-1)).clamp_min(0.0)
    return (pairs / (relative > 0).sum(-1).clamp_min(1)).sqrt() / (4.0 * math.sqrt(max(1, relative.shape[-1])))


def float32_rounding(sigma: Tensor) -> Tensor:
    """Return the error that a float32 product U Σ⁻¹ (Uᵀ X) leaves, relative to its norm."""
    return PRODUCT * _spread(sigma, reciprocal(sigma))


def _products(x: Tensor) -> tuple[Product, Product]:
    """Return two functions: products with X from its short side to the long one, and back."""
    return partial(to_long_side, x, dtype=torch.float64), partial(to_short_side, x)


def _hidden(sigma: Tensor, noise: Tensor, tolerance: Tensor) -> Tensor:
    """Count the directions whose σ² is within twice the noise and may be above the tolerance, [..., c] -> [...].

    A σ² that came out as zero, or below, is no less hidden than its neighbours: it is anything up to the noise.
    """
    squares, noise = sigma.square(), noise[..., None]
    # Not `<=` and `>`: NaN, which an overflow may leave, hides everything.
    return (~(squares > 2.0 * noise) & ~(squares + noise <= tolerance.square()[..., None])).sum(-1)


def _spread(sigma: Tensor, inverse: Tensor) -> Tensor:
    """Return rms(σ) rms(1/σ) over the kept directions: rounding X to ε moves random directions of Q by ε times this."""
    return (sigma.square().sum(-1) * inverse.square().sum(-1)).sqrt() / (sigma > 0).sum(-1).clamp_min(1)
