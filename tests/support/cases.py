"""One table of inputs for every claim about errors: tests assert it, ``error_table.py`` prints it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """T deltas [rows, columns] whose sum has singular values log-spaced from 1 to 1/``condition``."""

    seed: int
    rows: int
    columns: int
    condition: float
    tasks: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.rows}x{self.columns}-k{self.condition:.0e}-T{self.tasks}-{dtype}-s{self.seed}"

    def deltas(self) -> list[Tensor]:
        """Δ_t = (S + U Σ G_t)/T with Σ_t G_t = 0 and G_t random, then rounded: the rounded ones are the input.

        What the tasks have of their own fades with S itself. Were it the same in all directions, two tasks would be
        each other's negatives where S is small, and Iso-CTS not defined to more than ε times κ: the data's doing.
        κ of the rounded sum is ``condition`` as long as that is below what rounding adds.
        """
        generator = torch.Generator().manual_seed(self.seed)
        short = min(self.rows, self.columns)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        u, v = (torch.linalg.qr(random(size, short))[0] for size in (self.rows, self.columns))
        sigma = torch.logspace(0.0, -torch.tensor(self.condition).log10().item(), short, dtype=torch.float64)
        own = random(self.tasks, short, self.columns) / self.columns**0.5
        own -= own.mean(0)
        return [((u * sigma) @ (v.mT + part) / self.tasks).to(self.dtype) for part in own]


# Aspects from 1/8 to 8, T in 2, 8, 20, r not divisible by T, κ up to 1e6. From 256 columns on, tall task parts are
# searched for instead of computed whole.
SHAPES = ((64, 512), (90, 370), (130, 130), (370, 90), (512, 64))
CASES = (
    *(
        Case(seed, rows, columns, condition, tasks)
        for seed, (rows, columns) in enumerate(SHAPES)
        for condition in (1e1, 1e3, 1e6)
        for tasks in (2, 8, 20)
    ),
    *(Case(7, rows, columns, 1e3, 8, torch.bfloat16) for rows, columns in SHAPES),
    *(Case(8, rows, columns, 1e6, 8, torch.float64) for rows, columns in SHAPES),
    *(Case(9, 1100, 260, condition, 8) for condition in (1e1, 1e3, 1e6)),
    Case(9, 2100, 256, 1e2, 20),
    Case(9, 390, 390, 1e4, 8),
    Case(10, 390, 390, 1e6, 20),
)
