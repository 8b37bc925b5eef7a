"""What the polar iterations share: the bounds they start from, products on the short side, and the evidence they give.

An iteration maps the singular values of X/σ₁, which lie in [ℓ, 1], to 1 by a fixed number of products; ℓ decides how
many. So it needs every direction to be there: a matrix with singular values at or below the tolerance is left to the
solvers that truncate (``GramEigh``, ``FullSvd``), and its result here is 0 with an ``orthogonality`` of ``inf``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isomerge_fast import ops

from .certificate import probes
from .protocol import PolarStats, default_tolerance
from .sides import block_elements, long_blocks, short_gram
from .spectrum import singular_range

ITERATION_DTYPES = (torch.float64, torch.float32)
SMALLEST_TARGET = 1e-13
# The largest relative error of float32 products, where it is not float32's own.
PRODUCT_EPS = {"bf16x3": 2.0**-16}


@dataclass(frozen=True)
class Start:
    """Bounds of one (batched) solve.

    Attributes:
        smallest: [...] float64, σ_r from below, and 0 where a matrix is not solved.
        scale: [...] float64, 1/σ₁, and 0 where a matrix is not solved, so that no iteration can spoil its neighbours.
        solved: [...] bool, whether every singular value is above the tolerance.
        empty: [...] bool, whether none is: its polar factor is 0.
        lower: ℓ, the smallest σ_r/σ₁ of all that are solved.
        complete: whether all are.
    """

    smallest: Tensor
    scale: Tensor
    solved: Tensor
    empty: Tensor
    lower: float
    complete: bool


def start(x: Tensor, tolerance: Tensor | None) -> tuple[Start, Tensor]:
    """Bounds of X [..., M, N], and the Gram matrix of X · scale on its short side, [..., r, r] float64.

    Reads one number from the device, ℓ of the whole batch with a sign for ``complete``: the only one of a solve.
    """
    tolerance = default_tolerance(x) if tolerance is None else tolerance
    gram = short_gram(x)
    largest, smallest = singular_range(gram, tolerance=tolerance)
    solved, empty = smallest > 0.0, largest <= tolerance
    scale = torch.where(solved, 1.0 / largest, 0.0)
    gram *= scale.square()[..., None, None]
    lower = torch.where(solved, smallest * scale, 1.0).amin()
    signed = float(torch.where(solved.all(), lower, -lower))
    return Start(smallest, scale, solved, empty, abs(signed), signed > 0.0), gram


def inverse_size(gram: Tensor) -> Tensor:
    """σ₁ rms(1/σ) from the Gram matrix of X/σ₁, estimated from the probes: [...].

    Of G = L Lᵀ, tr G⁻¹ = E ‖L⁻¹ω‖².
    """
    rows = gram.shape[-1]
    lower, _ = torch.linalg.cholesky_ex(gram)
    solved = torch.linalg.solve_triangular(lower, probes(rows, gram.dtype, gram.device), upper=False)
    return (solved.square().sum((-2, -1)) / rows).sqrt()


def scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """X · scale, contiguous, in ``dtype``."""
    # Not by mul(out=…), which makes a copy of X in its own dtype where ``dtype`` is another.
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).mul_(scale.to(dtype)[..., None, None])


def short_polynomial(p: Tensor, x: Tensor, out: Tensor, *, beta: float = 0.0, precision: str | None = None) -> Tensor:
    """out ← β X + P X when wide, β X + X P when tall, for symmetric P, in whose dtype it is computed (``ops.mm``).

    By blocks of the long side, so that ``out`` may be X itself and no second tensor of its size is needed.
    """
    wide = x.shape[-2] <= x.shape[-1]
    for block, part in long_blocks(x, p.dtype):
        if wide:
            out[..., :, block] = _combine(part, p, part, beta, precision)
        else:
            out[..., block, :] = _combine(part.mT, part.mT, p, beta, precision)
    return out


def _combine(c: Tensor, a: Tensor, b: Tensor, beta: float, precision: str | None) -> Tensor:
    return ops.mm_add(c, a, b, beta=beta, precision=precision) if beta else ops.mm(a, b, precision=precision)


def evidence(name: str, q: Tensor, x: Tensor, begun: Start) -> PolarStats:
    """‖X‖_* = ⟨Q, X⟩ and ‖QQᵀ − I‖_F/√r as they are for the final Q; see ``Start`` for what is not solved."""
    short = min(x.shape[-2:])
    nuclear_norm = torch.zeros(x.shape[:-2], dtype=torch.float64, device=x.device)
    for (_, left), (_, right) in zip(long_blocks(q, torch.float64), long_blocks(x, torch.float64), strict=True):
        nuclear_norm += (left * right).sum((-2, -1))
    defect = short_gram(q, dtype=q.dtype)
    defect.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    orthogonality = torch.linalg.matrix_norm(defect).double() / math.sqrt(short)
    unsolved = torch.where(begun.empty, 0.0, torch.inf).to(orthogonality.dtype)
    return PolarStats(
        solver=name,
        nuclear_norm=nuclear_norm,
        rank=short * begun.solved.long(),
        orthogonality=torch.where(begun.solved, orthogonality, unsolved),
    )


def empty_result(name: str, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, PolarStats]:
    """The answer for X with a 0 in its shape: no direction is there, and none is missing."""
    zero = torch.zeros(x.shape[:-2], dtype=torch.float64, device=x.device)
    return torch.zeros(x.shape, dtype=dtype, device=x.device), PolarStats(name, zero, zero.long(), zero)


def check_fields(dtype: torch.dtype, target: float | None, products: str | None = None) -> None:
    """What every iteration's fields have to be.

    Raises:
        ValueError: a dtype in which no iteration is made, a target that is not one or that rounding keeps away, or a
            precision of products that float32 does not have.
    """
    if dtype not in ITERATION_DTYPES:
        raise ValueError(f"dtype: polar iterations are made in float64 or float32, not {dtype}")
    if target is not None and not SMALLEST_TARGET <= target < 1.0:
        raise ValueError(f"target: expected {SMALLEST_TARGET} or more, and less than 1, got {target}")
    if products is not None and (products not in PRODUCT_EPS or dtype != torch.float32):
        raise ValueError(f"products: float32 ones have {', '.join(PRODUCT_EPS)}, got {products!r} for {dtype}")


def dtype_suffix(dtype: torch.dtype) -> str:
    """``"fp64"`` or ``"fp32"``."""
    return f"fp{8 * dtype.itemsize}"


def default_target(*dtypes: torch.dtype, products: str | None = None) -> float:
    """How far from 1 the singular values of Q may end: the coarsest rounding in play."""
    return max(SMALLEST_TARGET, PRODUCT_EPS.get(products or "", 0.0), *(torch.finfo(dtype).eps for dtype in dtypes))


def largest_block(rows: int, columns: int, device: torch.device) -> int:
    """Return the elements of one block of the long side."""
    return min(rows * columns, max(block_elements(device), min(rows, columns)))


def workspace_bytes(rows: int, columns: int, iterating: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the peak of a solve whose iteration takes ``iterating`` bytes, the result in ``dtype`` included.

    Before it, the bounds: G, its Cholesky factor and cholesky_solve's copy of that (on a GPU the identity and L⁻¹), all
    float64, and a few blocks of start vectors. After it, the evidence: Q with either its Gram matrix and a square of
    that, or blocks in float64.
    """
    short = min(rows, columns)
    blocks = 8 * largest_block(rows, columns, device) * (1 if dtype == torch.float64 else 2)
    evidence_bytes = dtype.itemsize * rows * columns + max(blocks, 2 * dtype.itemsize * short**2)
    bounds = (32 if ops.traits_of(device).is_gpu else 24) * short**2 + 8 * 64 * short
    return max(bounds, iterating, evidence_bytes) + 4096
