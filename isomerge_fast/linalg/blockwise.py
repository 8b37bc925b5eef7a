"""Multiply with a matrix that is much longer than wide, in blocks of its long side.

Only blocks are ever converted to another dtype: a float32 matrix of 128256 x 4096 takes part in float64 products
without a float64 copy of itself. The short side has length r = min(M, N): rows when M ≤ N ("wide"), else columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy
import torch
from torch import Tensor

from ..ops import mm, mm_add, sym_mm_add, thin_mm, traits_of

# On a CPU a block of the long side holds about this many elements (4 MiB of float64). The Gram matrix of 32000 x 768
# takes the same time to 6 % from 2^19 to 2^22 (2-core CPU), 26 % more at 2^17; Iso-C and Iso-CTS of 768 x 3072 and
# 3072 x 768 the same to 2 % from 2^19 to 2^21.
BLOCK_ELEMENTS = 1 << 19


def block_elements(device: torch.device) -> int:
    """Return how many elements a block of the long side holds."""
    return traits_of(device).block_elements(BLOCK_ELEMENTS)


def long_side_blocks(x: Tensor, dtype: torch.dtype, *, whole: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of X along its long side, each as a short-side-first matrix [..., r, step] in ``dtype``.

    ``whole`` yields one block where nothing has to be converted, for results that do not grow with the block.
    """
    rows, columns = x.shape[-2:]
    short, length = min(rows, columns), max(rows, columns)
    step = max(1, block_elements(x.device) // max(1, short * math.prod(x.shape[:-2])))
    if whole and x.dtype == dtype:
        step = max(1, length)
    for start in range(0, length, step):
        block = slice(start, min(start + step, length))
        yield block, (x[..., :, block] if rows <= columns else x[..., block, :].mT).to(dtype)


def short_side_gram(x: Tensor, y: Tensor | None = None, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return X Yᵀ when wide, Xᵀ Y when tall, added up in ``dtype``: [..., r, r]. Y = X takes half the work."""
    short = min(x.shape[-2:])
    if y is not None:
        x, y = torch.broadcast_tensors(x, y)  # so that both come in the same blocks
    gram = torch.zeros(*x.shape[:-2], short, short, dtype=dtype, device=x.device)
    if y is None:
        for _, part in long_side_blocks(x, dtype, whole=True):
            sym_mm_add(gram, part, out=gram)
        return gram
    for (_, left), (_, right) in zip(long_side_blocks(x, dtype), long_side_blocks(y, dtype), strict=True):
        gram = mm_add(gram, left, right.mT)
    return gram


def multiply_short_side(
    a: Tensor, x: Tensor, out: Tensor, *, beta: float = 0.0, precision: str | None = None, in_blocks: bool = False
) -> Tensor:
    """Write β X + A X when wide, β X + X A for symmetric A when tall, computed in the dtype of ``a``.

    ``out`` may be X itself, as the product is made by blocks of the long side: always where ``in_blocks``, else unless
    A X alone can be written to ``out`` as it is.
    """
    wide = x.shape[-2] <= x.shape[-1]
    direct = not (in_blocks or beta or precision or out is x) and out.ndim == 2 and out.dtype == a.dtype
    for block, part in long_side_blocks(x, a.dtype, whole=direct):
        target = out[..., :, block] if wide else out[..., block, :]
        c, left, right = (part, a, part) if wide else (part.mT, part.mT, a)
        if direct:
            torch.mm(left, right, out=target)
        elif beta:
            target.copy_(mm_add(c, left, right, beta=beta, precision=precision))
        else:
            target.copy_(mm(left, right, precision=precision))
    return out


def project_short_side(a: Tensor, x: Tensor) -> Tensor:
    """Return Aᵀ X of a wide X: [..., r, c], [..., r, N] -> [..., c, N], in the dtype of ``a``."""
    shape = numpy.broadcast_shapes(a.shape[:-2], x.shape[:-2])
    out = torch.empty(*shape, a.shape[-1], x.shape[-1], dtype=a.dtype, device=x.device)
    for block, part in long_side_blocks(x, a.dtype):
        out[..., :, block] = a.mT @ part
    return out


def to_long_side(x: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Xᵀ A when wide, X A when tall: [..., r, c] -> [..., max(M, N), c], computed in the dtype of ``a``."""
    shape = numpy.broadcast_shapes(a.shape[:-2], x.shape[:-2])
    long, columns = max(x.shape[-2:]), a.shape[-1]
    if traits_of(x.device).is_gpu:
        out = torch.empty(*shape, long, columns, dtype=dtype, device=x.device)
    else:  # as ``thin_mm`` leaves it
        out = torch.empty(*shape, columns, long, dtype=dtype, device=x.device).mT
    for block, part in long_side_blocks(x, a.dtype, whole=a.dtype == dtype):
        out[..., block, :] = thin_mm(part.mT, a)
    return out


def to_short_side(x: Tensor, z: Tensor) -> Tensor:
    """Return X Z when wide, Xᵀ Z when tall: [..., max(M, N), c] -> [..., r, c], in the dtype of ``z``."""
    shape = numpy.broadcast_shapes(z.shape[:-2], x.shape[:-2])
    out = torch.zeros(*shape, z.shape[-1], min(x.shape[-2:]), dtype=z.dtype, device=x.device)
    for block, part in long_side_blocks(x, z.dtype, whole=True):
        out += z[..., block, :].mT @ part.mT  # in this order 1.2 ms where the other takes 1.7 (3072 x 768, 24 columns)
    return out.mT
