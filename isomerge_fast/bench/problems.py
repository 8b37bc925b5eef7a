"""Make deltas to measure with, of two kinds, like those that fine-tuning leaves in a matrix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["noise", "decay"]


def deltas_like_fine_tuning(
    rows: int, columns: int, tasks: int, kind: Kind = "noise", *, device: torch.device | str = "cpu", seed: int = 0
) -> list[Tensor]:
    """Return T full-rank float32 deltas [rows, columns], the same for the same seed on the same kind of device.

    ``noise``: a part that all tasks share, 16 directions of each task's own, and white noise that hides all smaller
    ones: at the cut of a task's part the gap is a few tenths of a percent, the worst case for any subspace method.
    ``decay``: a shared part and parts whose singular values fall like 1/√i, over a floor of white noise: the sum is
    ill-conditioned, the worst case for any Gram matrix.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    short = min(rows, columns)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    shared = 0.002 * random(rows, 16) @ random(16, columns)
    if kind == "noise":
        own = [0.002 * random(rows, 16) @ random(16, columns) for _ in range(tasks)]
        return [0.01 * random(rows, columns) + shared + part for part in own]
    falling = torch.arange(1, short + 1, device=device).rsqrt()
    result = []
    for _ in range(tasks):
        u, v = (torch.linalg.qr(random(size, short))[0] for size in (rows, columns))
        result.append(shared + (u * falling) @ v.mT + 0.1 * random(rows, columns) / max(rows, columns) ** 0.5)
    return result


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Return ‖value − exact‖_F / ‖exact‖_F in the precision of ``exact``."""
    return ((value.to(exact) - exact).norm() / exact.norm()).item()
