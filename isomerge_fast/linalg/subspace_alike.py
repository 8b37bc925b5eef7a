"""Search for the top eigenvectors of every matrix of a stack in the same steps, so that none depends on its neighbours.

As ``filtered_block`` does, but for a number of cycles that is fixed, with each matrix's own interval and degree: what
has not converged by then misses its certificate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import thin_mm
from .certificate import fixed_draw
from .subspace_chebyshev import GROWTH, Ritz, ritz_in

# Of 8 task parts of 3072 x 768 (s = 19, 38 columns), white noise takes four cycles to an angle of 5e-8, five to 2e-10.
CYCLES, LARGEST_DEGREE = 5, 32


def alike_block(gram: Tensor, s: int, width: int, *, noise: Tensor) -> tuple[Ritz, Tensor]:
    """Return ``width`` Ritz vectors of G [..., n, n] ≥ −noise for its top ``s``, and which are missed, [...].

    Reads nothing from the device. Where the noise reaches the values of a block it is missed.
    """
    n, tiny = gram.shape[-1], torch.finfo(gram.dtype).tiny
    block = fixed_draw(n, width, gram.dtype, gram.device).expand(*gram.shape[:-2], n, width)
    for _ in range(2):
        block = thin_mm(gram, block)
    ritz, missed = ritz_in(gram, block)
    for _ in range(CYCLES):
        largest, cut = ritz.values[..., 0], ritz.values[..., -1]
        middle, half = (cut - noise) / 2.0, ((cut + noise) / 2.0).clamp_min(tiny)
        ratio = ((1.05 * largest - middle) / half).clamp_min(1.05)
        degree = (math.log(GROWTH[gram.dtype]) / torch.acosh(ratio)).floor().clamp(1, LARGEST_DEGREE)
        shifted = gram / half[..., None, None]
        shifted.diagonal(dim1=-2, dim2=-1).sub_((middle / half)[..., None])
        ritz, again = ritz_in(gram, _chebyshev(shifted, ritz.vectors, degree))
        missed = missed | again
    return ritz, missed | ~(noise <= ritz.values[..., -1])


def _chebyshev(shifted: Tensor, x: Tensor, degree: Tensor) -> Tensor:
    """Return T_d(A) X with each matrix's own d ≤ ``LARGEST_DEGREE``."""
    before, now = x, thin_mm(shifted, x)
    for step in range(2, LARGEST_DEGREE + 1):
        following = thin_mm(shifted, now, c=before, alpha=2.0, beta=-1.0)
        goes_on = (degree >= step)[..., None, None]
        before, now = torch.where(goes_on, now, before), torch.where(goes_on, following, now)
    return now
