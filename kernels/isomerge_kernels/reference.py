"""Every kernel's operation in plain torch: what a CPU runs, and what GPU kernels are tested against.

Large tensors are walked in row blocks, so that the temporaries of a pass stay near ``BLOCK_ELEMENTS`` elements whatever
the tensor's size: a 128256 x 4096 embedding needs its fp32 sum once, not three times.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# 1 MiB of fp32. Both passes take the same time from 2^16 to 2^19 (32000 x 768 bf16, 2-core CPU); larger blocks only
# cost memory, smaller ones time.
BLOCK_ELEMENTS = 1 << 18


def row_blocks(shape: torch.Size | tuple[int, ...], block_elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Slices over the first dimension that cover about ``block_elements`` elements each."""
    if len(shape) == 0 or 0 in shape:
        return
    row_elements = 1
    for size in shape[1:]:
        row_elements *= size
    step = max(1, block_elements // max(1, row_elements))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def subtract(expert: Tensor, base: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Δ = θ_t − θ₀, both operands widened to ``dtype`` before the subtraction (never rounded to the inputs' dtype).

    Args:
        expert, base: same shape, any float dtypes.
        dtype: of the result, at least as wide as both inputs.
    """
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    if base.ndim == 0:
        return out.copy_(expert.to(dtype) - base.to(dtype))
    for rows in row_blocks(base.shape):
        # copy_ widens block by block: no second full-size tensor in `dtype`.
        out[rows].copy_(expert[rows]).sub_(base[rows].to(dtype))
    return out


def task_sum(total: Tensor, expert: Tensor, base: Tensor, *, weight: float = 1.0) -> Tensor:
    """S ← S + w·(θ_t − θ₀) in place; returns ‖θ_t − θ₀‖_F², a 0-d float64 tensor on the same device.

    Args:
        total: S, fp32 or fp64, the shape of ``base``; the sum over tasks is made by one call a task.
        expert, base: any float dtypes not wider than ``total``.
    """
    squares = torch.zeros((), dtype=torch.float64, device=total.device)
    if total.ndim == 0:
        total, expert, base = total[None], expert[None], base[None]
    for rows in row_blocks(total.shape):
        delta = expert[rows].to(total.dtype, copy=True).sub_(base[rows].to(total.dtype))
        flat = delta.reshape(-1)
        # Over a block of 2^18, dot is right to 4e-8 and vector_norm to 2e-6; float64 would take four times as long.
        squares += torch.dot(flat, flat)
        total[rows].add_(delta, alpha=weight)
    return squares


def apply_delta(base: Tensor, delta: Tensor, *, scaling: float, dtype: torch.dtype) -> Tensor:
    """θ = θ₀ + α·Δ, computed in the dtype of ``delta`` (fp32 or fp64) and rounded once to ``dtype``."""
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    if base.ndim == 0:
        return out.copy_(base.to(delta.dtype).add(delta, alpha=scaling))
    for rows in row_blocks(base.shape):
        out[rows].copy_(base[rows].to(delta.dtype, copy=True).add_(delta[rows], alpha=scaling))
    return out


def count_nonfinite(x: Tensor) -> int:
    """How many entries are NaN or infinite."""
    if x.ndim == 0:
        x = x[None]
    return sum(int((~torch.isfinite(x[rows])).sum()) for rows in row_blocks(x.shape))
