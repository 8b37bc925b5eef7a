"""The default tier: eigenvectors of the short side's Gram matrix, in float64.

For X [M, N] with M ≤ N (the tall case is the transpose):

    G = X Xᵀ = U Σ² Uᵀ,    polar(X) = G^(-1/2) X = U Σ⁻¹ Uᵀ X,    V = Xᵀ U Σ⁻¹.

Forming G squares the condition number, which is why it is formed in float64 from entries that are float32 or sums of a
few of them: singular values down to about 1e-7 σ₁ are resolved. One Newton-Schulz step Q ← (3/2 I − 1/2 Q Qᵀ) Q then
squares what error is left. Nothing larger than the short side is ever factored, and the long side is walked in blocks,
so a 128256 x 4096 embedding needs X, Q and a few 4096 x 4096 matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .protocol import PolarStats, Subspace, complement_basis, default_tolerance, reciprocal, relative_gap

# A block of the long side holds about this many elements (8 MiB of float64). A Gram matrix of 32000 x 768 takes the
# same time to 6 % from 2^19 to 2^22 (2-core CPU), 26 % more at 2^17.
BLOCK_ELEMENTS = 1 << 20


def long_blocks(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of X along its long side, each as a short-side-first matrix [..., r, step] in ``dtype``."""
    rows, columns = x.shape[-2:]
    short, length = min(rows, columns), max(rows, columns)
    step = max(1, BLOCK_ELEMENTS // max(1, short * math.prod(x.shape[:-2])))
    for start in range(0, length, step):
        block = slice(start, min(start + step, length))
        yield block, (x[..., :, block] if rows <= columns else x[..., block, :].mT).to(dtype)


def short_gram(x: Tensor, y: Tensor | None = None, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """X Yᵀ when wide, Xᵀ Y when tall, accumulated in ``dtype`` over blocks of the long side; Y = X when left out."""
    short = min(x.shape[-2:])
    gram = torch.zeros(*x.shape[:-2], short, short, dtype=dtype, device=x.device)
    if y is None:
        for _, part in long_blocks(x, dtype):
            gram += part @ part.mT
        return gram
    for (_, left), (_, right) in zip(long_blocks(x, dtype), long_blocks(y, dtype), strict=True):
        gram += left @ right.mT
    return gram


def short_multiply(a: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """A X when wide, X A for symmetric A when tall, computed in the dtype of ``a``; ``out`` may be ``x`` itself."""
    wide = x.shape[-2] <= x.shape[-1]
    for block, part in long_blocks(x, a.dtype):
        if wide:
            out[..., :, block] = (a @ part).to(out.dtype)
        else:
            out[..., block, :] = (part.mT @ a).to(out.dtype)
    return out


def short_project(a: Tensor, x: Tensor) -> Tensor:
    """Aᵀ X of a wide X: [..., r, c], [..., r, N] -> [..., c, N], in the dtype of ``a``."""
    out = torch.empty(*x.shape[:-2], a.shape[-1], x.shape[-1], dtype=a.dtype, device=x.device)
    for block, part in long_blocks(x, a.dtype):
        out[..., :, block] = a.mT @ part
    return out


def long_product(x: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """Xᵀ A when wide, X A when tall: [..., r, c] -> [..., max(M, N), c], computed in the dtype of ``a``."""
    out = torch.empty(*x.shape[:-2], max(x.shape[-2:]), a.shape[-1], dtype=dtype, device=x.device)
    for block, part in long_blocks(x, a.dtype):
        out[..., block, :] = (part.mT @ a).to(dtype)
    return out


@dataclass(frozen=True)
class GramEigh:
    """Polar factor and top triplets by ``eigh`` of the float64 Gram matrix; blind below ``resolution`` · σ₁."""

    resolution: float = 6e-8  # sqrt(16 ε₆₄): eigenvalue noise of eigh is a few ε₆₄ λ₁
    name: str = "gram-eigh-fp64"

    def storage_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """The compute dtype: only sums and short sides are float64."""
        return compute_dtype

    def polar(
        self, x: Tensor, *, tolerance: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, PolarStats]:
        """See ``PolarSolver``. ``orthogonality`` is measured before the Newton-Schulz step: a bound on the result's."""
        dtype = dtype or x.dtype
        vectors, sigma, kept_sigma = self._eigh(short_gram(x), default_tolerance(x) if tolerance is None else tolerance)
        keep = kept_sigma > 0
        root = (vectors * reciprocal(kept_sigma)[..., None, :]) @ vectors.mT
        q = short_multiply(root, x, torch.empty(x.shape, dtype=dtype, device=x.device))
        projector = ((vectors * keep[..., None, :]) @ vectors.mT).to(dtype)
        del root, vectors
        step = short_gram(q, dtype=dtype)
        orthogonality = torch.linalg.matrix_norm(step - projector) / math.sqrt(max(1, sigma.shape[-1]))
        step.mul_(-0.5).diagonal(dim1=-2, dim2=-1).add_(1.5)
        short_multiply(step, q, q)
        return q, PolarStats(self.name, kept_sigma.sum(-1), keep.sum(-1), orthogonality)

    def top_subspace(
        self,
        x: Tensor,
        k: int,
        *,
        tolerance: Tensor | None = None,
        complement: bool = False,
        dtype: torch.dtype | None = None,
        short_only: bool = False,
    ) -> Subspace:
        """See ``SubspaceSolver``."""
        limit = default_tolerance(x) if tolerance is None else tolerance
        vectors, sigma, kept_sigma = self._eigh(short_gram(x), limit)
        kept_sigma = kept_sigma[..., :k]
        top = vectors[..., :, :k] * (kept_sigma > 0)[..., None, :]
        subspace = Subspace(
            short=top,
            long=None,
            sigma=kept_sigma,
            complement=complement_basis(vectors[..., :, k:], top, kept_sigma) if complement else None,
            gap=relative_gap(sigma, k),
            wide=x.shape[-2] <= x.shape[-1],
        )
        return subspace if short_only else self.complete(x, subspace, dtype or x.dtype)

    def complete(self, x: Tensor, subspace: Subspace, dtype: torch.dtype) -> Subspace:
        """See ``SubspaceSolver``: X maps the short side's vectors to the long side's, times σ."""
        scaled = subspace.short * reciprocal(subspace.sigma)[..., None, :]
        return replace(subspace, long=long_product(x, scaled, dtype))

    def residual_subspace(
        self, delta: Tensor, total: Tensor, common: Subspace, s: int, *, norm: Tensor, tolerance: Tensor
    ) -> Subspace:
        """See ``SubspaceSolver``. R itself is never formed; all that is N x N or smaller is float64.

        Wide: with Q_c = ``common.complement``, C = Q_cᵀ Δ has few rows and R = Q_c C.
        Tall: U_kᵀ Δ = Y = Σ_k⁻¹ V_kᵀ (SᵀΔ), RᵀR = ΔᵀΔ − YᵀY, and R E = Δ E − S V_k Σ_k⁻¹ Y E for the s directions E
        kept.
        """
        tolerance = torch.maximum(tolerance, self.resolution * norm)
        if common.wide:
            assert common.complement is not None
            basis = common.complement
            part = self.top_subspace(short_project(basis, delta), s, tolerance=tolerance)
            return Subspace(basis @ part.short, part.long, part.sigma, None, part.gap, wide=True)
        weights = common.short * reciprocal(common.sigma)[..., None, :]
        y = weights.mT @ short_gram(total, delta)
        vectors, sigma, kept_sigma = self._eigh(short_gram(delta) - y.mT @ y, tolerance)
        kept_sigma = kept_sigma[..., :s]
        top = vectors[..., :, :s] * (kept_sigma > 0)[..., None, :]
        scaled = top * reciprocal(kept_sigma)[..., None, :]
        u_t = long_product(delta, scaled, torch.float64)
        u_t -= long_product(total, weights @ (y @ scaled), torch.float64)
        return Subspace(top, u_t, kept_sigma, None, relative_gap(sigma, s), wide=False)

    def workspace_bytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """Peak bytes beyond the input: the result, a few r x r (eigh's copy, vectors and 2 r² of work), blocks."""
        short = min(rows, columns)
        return dtype.itemsize * rows * columns + 8 * (
            7 * short**2 + 3 * min(rows * columns, max(BLOCK_ELEMENTS, short))
        )

    def _eigh(self, gram: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvectors, singular values, and these with the truncated ones set to zero; all descending."""
        eigenvalues, vectors = torch.linalg.eigh(gram)
        sigma = eigenvalues.flip(-1).clamp_min(0.0).sqrt()
        limit = torch.maximum(tolerance.double(), self.resolution * sigma[..., 0])
        return vectors.flip(-1), sigma, torch.where(sigma > limit[..., None], sigma, 0.0)
