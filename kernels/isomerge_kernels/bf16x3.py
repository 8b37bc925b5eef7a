"""Multiply float32 by bf16 parts: x = high + low to 2⁻¹⁶, and of the four products all but low · low.

One product three times as deep, [high, high, low] · [high; low; high], added up in float32: on a GPU with bf16 tensor
cores a plain product of the vendor's library. ``symmetric_matmul`` does the same in its registers.
"""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


def deep(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 A, B into bf16 [..., m, 3k] and [..., 3k, n] whose product is A B to 2⁻¹⁶ of rows times columns."""
    (a_high, a_low), (b_high, b_low) = _parts(a), _parts(b)
    return torch.cat([a_high, a_high, a_low], dim=-1), torch.cat([b_high, b_low, b_high], dim=-2)


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.to(torch.bfloat16)
    return high, (x - high.to(torch.float32)).to(torch.bfloat16)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """Return A B of float32 [..., m, k] and [..., k, n]."""
    left, right = deep(a, b)
    if not left.is_cuda:  # a CPU multiplies no bf16 into float32
        return left.float() @ right.float()
    if left.ndim == right.ndim == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    batch = numpy.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = (part.expand(*batch, *part.shape[-2:]) for part in (left, right))
    product = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=torch.float32)
    return product.unflatten(0, batch)
