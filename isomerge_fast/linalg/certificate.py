"""Check a result by products with a few random vectors, never by a factorisation.

For a fixed draw Ω [r, c] with E ΩΩᵀ = I, ‖A Ω‖_F² estimates ‖A‖_F² without bias: a defect of the whole matrix costs two
thin products instead of one square one. Nothing here reads the device.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .blockwise import to_long_side, to_short_side

PROBES = 8


def probes(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return Ω [rows, PROBES], the same every time; not to be written to."""
    return fixed_draw(rows, PROBES, dtype, device, divisor=math.sqrt(PROBES))


# A merge draws a few kinds, of 2 MiB or less (4096 x 111 in float32), and each was drawn on the CPU and copied anew.
@lru_cache(maxsize=16)
def fixed_draw(rows: int, columns: int, dtype: torch.dtype, device: torch.device, *, divisor: float = 1.0) -> Tensor:
    """Return normal numbers [rows, columns] over ``divisor``, the same every time; not to be written to."""
    with torch.inference_mode(False):  # what is kept may be used outside of it
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu")
        # Rounded first: the copy then is done when it returns, whichever stream uses it next.
        return draw.div_(divisor).to(dtype).to(device)


def symmetry(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate how far H is from symmetric positive semidefinite, which makes an orthonormal Q the polar factor of X.

    Returns (‖H − Hᵀ‖_F / ‖X‖_F, max(0, −min_i ω_iᵀHω_i / ω_iᵀω_i) √r / ‖X‖_F), [...] each, of H = X Qᵀ (wide) or Qᵀ X
    (tall). The asymmetry is the backward error: some X' with ‖X' − X‖ ≤ ‖H − Hᵀ‖ has Q for its polar factor. The error
    of Q itself is (H − Hᵀ)_ij / (σ_i + σ_j) in the basis of singular vectors.
    """
    short = min(x.shape[-2:])
    omega = probes(short, q.dtype, q.device)
    image = to_short_side(x, to_long_side(q, omega, q.dtype).to(x.dtype))
    mirrored = to_short_side(q, to_long_side(x, omega.to(x.dtype), x.dtype).to(q.dtype)).to(x.dtype)
    return asymmetry_of(omega.to(x.dtype), image, mirrored, torch.linalg.vector_norm(x, dim=(-2, -1)).double())


def asymmetry_of(omega: Tensor, image: Tensor, mirrored: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Return the estimates of ``symmetry`` from H Ω, Hᵀ Ω and ‖X‖_F."""
    scale = torch.where(norm > 0, norm, 1.0)
    asymmetry = torch.linalg.matrix_norm(image - mirrored) / scale
    quotients = (omega * image).sum(-2) / omega.square().sum(-2)
    return asymmetry, (-quotients.amin(-1)).clamp_min(0.0) * math.sqrt(max(1, omega.shape[-2])) / scale


def orthogonality(q: Tensor) -> Tensor:
    """Estimate ‖QQᵀ − I‖_F / √r (wide) or ‖QᵀQ − I‖_F / √r (tall), shape [...]."""
    short = min(q.shape[-2:])
    omega = probes(short, q.dtype, q.device)
    defect = to_short_side(q, to_long_side(q, omega, q.dtype)) - omega
    return torch.linalg.matrix_norm(defect) / math.sqrt(max(1, short))
