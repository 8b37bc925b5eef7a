"""Share what the polar iterations have in common: bounds of σ, products on the short side, evidence, bytes.

An iteration maps the singular values of X/σ₁, which lie in [ℓ, 1], to 1 by a fixed number of products; ℓ decides how
many. It cannot truncate. A matrix with a singular value at or below the tolerance is left to ``GramEigh`` or
``FullSvd``: its result here is 0 with an ``orthogonality`` of ``inf``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from isomerge_fast import ops

from .blockwise import block_elements, long_side_blocks, short_side_gram
from .certificate import probes
from .protocol import PolarSolver, PolarStats, default_tolerance
from .spectrum import singular_range

ITERATION_DTYPES = (torch.float64, torch.float32)
SMALLEST_TARGET = 1e-13
# The largest relative error of float32 products, where it is not float32's own.
PRODUCT_EPS = {"bf16x3": 2.0**-16}


@dataclass(frozen=True)
class Bounds:
    """Bound the singular values of one (batched) X."""

    smallest: Tensor  # [...] float64, a lower bound of σ_r; 0 where a matrix is not solved
    scale: Tensor  # [...] float64, 1/σ₁; 0 where a matrix is not solved, so that it cannot spoil its neighbours
    solved: Tensor  # [...] bool, whether every singular value is above the tolerance
    empty: Tensor  # [...] bool, whether none is: the polar factor is 0
    lower: float  # ℓ, the smallest σ_r/σ₁ of the solved matrices
    all_solved: bool  # whether ``solved`` holds for every matrix, or is left to each by itself


def bounds_and_gram(x: Tensor, tolerance: Tensor | None, lower: float | None = None) -> tuple[Bounds, Tensor]:
    """Return the bounds of X [..., M, N] and the float64 Gram matrix of X · scale on its short side, [..., r, r].

    The one read of the device in a solve: ℓ of the whole batch, with a sign for ``all_solved``. There is none where ℓ
    is given as ``lower``: then no matrix decides how many steps are made of its neighbours.
    """
    tolerance = default_tolerance(x) if tolerance is None else tolerance
    gram = short_side_gram(x)
    largest, smallest = singular_range(gram, tolerance=tolerance)
    solved, empty = smallest > 0.0, largest <= tolerance
    scale = torch.where(solved, 1.0 / largest, 0.0)
    gram *= scale.square()[..., None, None]
    if lower is not None:
        return Bounds(smallest, scale, solved, empty, lower, all_solved=True), gram
    least = torch.where(solved, smallest * scale, 1.0).amin()
    signed = float(torch.where(solved.all(), least, -least))
    return Bounds(smallest, scale, solved, empty, abs(signed), signed > 0.0), gram


@dataclass(frozen=True)
class PolarIteration(PolarSolver):
    """Find polar(X) by products alone. A subclass states ``name``, ``iterate`` and ``iterating_bytes``.

    Attributes:
        dtype: to iterate in, float64 or float32. Its rounding loses small directions: the error grows with κ.
        lower: ℓ, where all matrices of a batch are to get the same steps. Of those with smaller σ_r/σ₁ the result is no
            isometry, as its evidence says.
    """

    dtype: torch.dtype = torch.float64
    lower: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ITERATION_DTYPES:
            raise ValueError(f"dtype: polar iterations are made in float64 or float32, not {self.dtype}")

    @abstractmethod
    def iterate(self, x: Tensor, bounds: Bounds, grams: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, PolarStats]:
        """Return polar(X) in ``dtype`` and its evidence; ``grams`` has the Gram matrix, and is emptied to free it."""

    @abstractmethod
    def iterating_bytes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return the peak bytes of ``iterate`` beyond X, up to its evidence."""

    def polar(
        self, x: Tensor, *, tolerance: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, PolarStats]:
        dtype = dtype or x.dtype
        if 0 in x.shape:  # no direction is there, and none is missing
            zero = torch.zeros(x.shape[:-2], dtype=torch.float64, device=x.device)
            return torch.zeros(x.shape, dtype=dtype, device=x.device), PolarStats(self.name, zero, zero.long(), zero)
        bounds, *grams = bounds_and_gram(x, tolerance, self.lower)
        return self.iterate(x, bounds, grams, dtype)

    def workspace_bytes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return the peak bytes beyond X: those of the bounds, the iteration or the evidence.

        The bounds take G, its Cholesky factor and cholesky_solve's copy of that (on a GPU the identity and L⁻¹), all
        float64, and a few blocks of start vectors. The evidence takes Q with its Gram matrix and a square of that, or
        with blocks in float64.
        """
        short = min(rows, columns)
        blocks = 8 * largest_block(rows, columns, device) * (1 if dtype == torch.float64 else 2)
        evidence_bytes = dtype.itemsize * rows * columns + max(blocks, 2 * dtype.itemsize * short**2)
        bounds = (32 if ops.traits_of(device).is_gpu else 24) * short**2 + 8 * 64 * short
        return max(bounds, self.iterating_bytes(rows, columns, dtype, device), evidence_bytes) + 4096

    def target_for(self, dtype: torch.dtype, products: str | None = None) -> float:
        """Return how far from 1 the σ of Q may be left: the coarsest rounding of iterate, products and result."""
        roundings = (torch.finfo(self.dtype).eps, torch.finfo(dtype).eps)
        return max(SMALLEST_TARGET, PRODUCT_EPS.get(products or "", 0.0), *roundings)

    def evidence(self, q: Tensor, x: Tensor, bounds: Bounds) -> PolarStats:
        """Return ‖X‖_* = ⟨Q, X⟩, the rank, and ‖QQᵀ − I‖_F/√r of the final Q.

        A matrix that ``bounds`` has as unsolved has rank 0 and an infinite defect, or none where it is empty.
        """
        short = min(x.shape[-2:])
        nuclear_norm = torch.zeros(x.shape[:-2], dtype=torch.float64, device=x.device)
        for (_, left), (_, right) in zip(
            long_side_blocks(q, torch.float64), long_side_blocks(x, torch.float64), strict=True
        ):
            nuclear_norm += (left * right).sum((-2, -1))
        defect = short_side_gram(q, dtype=q.dtype)
        defect.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        orthogonality = torch.linalg.matrix_norm(defect).double() / math.sqrt(short)
        unsolved = torch.where(bounds.empty, 0.0, torch.inf).to(orthogonality.dtype)
        return PolarStats(
            solver=self.name,
            nuclear_norm=nuclear_norm,
            rank=short * bounds.solved.long(),
            orthogonality=torch.where(bounds.solved, orthogonality, unsolved),
        )


def dtype_suffix(dtype: torch.dtype) -> str:
    """Return ``"fp64"`` or ``"fp32"``."""
    return f"fp{8 * dtype.itemsize}"


def inverse_size(gram: Tensor) -> Tensor:
    """Estimate σ₁ rms(1/σ), [...], from the Gram matrix of X/σ₁: with G = L Lᵀ, tr G⁻¹ = E ‖L⁻¹ω‖²."""
    rows = gram.shape[-1]
    lower, _ = torch.linalg.cholesky_ex(gram)
    solved = torch.linalg.solve_triangular(lower, probes(rows, gram.dtype, gram.device), upper=False)
    return (solved.square().sum((-2, -1)) / rows).sqrt()


def largest_block(rows: int, columns: int, device: torch.device) -> int:
    """Return the most elements that a block of ``blockwise`` has: at least one line of the short side."""
    return min(rows * columns, max(block_elements(device), min(rows, columns)))
