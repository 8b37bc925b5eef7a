"""Orthonormal bases of a few long columns."""

from __future__ import annotations

import torch
from torch import Tensor

# CholeskyQR2 in float64 is orthonormal to rounding up to κ of about 1e7 (Yamamoto et al. 2015); far below that is left
# to it, the rest to Householder. Diagonal ratios of the factor under-estimate κ, hence the distance.
SMALLEST_DIAGONAL_RATIO = 1e-5


def thin_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """X = Q R of a tall float64 X [..., L, c], by CholeskyQR2 where it is safe, else Householder.

    A few GEMM-like passes over X instead of Householder's column by column: 3072 x 152 in 11 ms instead of 57 on 2 CPU
    cores. R is upper triangular up to rounding; its diagonal may differ in sign from
    LAPACK's. Reads one flag from the device.
    """
    if x.shape[-2] < x.shape[-1]:
        return torch.linalg.qr(x)
    factors = []
    q = x
    for _ in range(2):
        lower, failed = torch.linalg.cholesky_ex(q.mT @ q)
        diagonal = lower.diagonal(dim1=-2, dim2=-1)
        ratio = diagonal.amin(-1) / diagonal.amax(-1) if diagonal.shape[-1] else diagonal.new_ones(())
        # Not `<`: NaN, which a failed factorisation may leave, has to end up here too.
        if bool(failed.any()) or not bool((ratio > SMALLEST_DIAGONAL_RATIO).all()):
            return torch.linalg.qr(x)
        q = torch.linalg.solve_triangular(lower.mT, q, upper=True, left=False)
        factors.append(lower.mT)
    return q, factors[1] @ factors[0]
