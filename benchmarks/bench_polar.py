"""Polar factors: the solver that a merge takes, every other one, and full SVDs by torch and numpy.

X is the sum of eight deltas in float64, Q is asked for in float32. Errors are relative to numpy's float64 SVD.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import reference_numpy, shapes
from benchmarks.harness.rows import OURS, Problem, Row, contests
from benchmarks.harness.scratch import kept
from isomerge_fast.bench import published
from isomerge_fast.bench.problems import Kind, deltas_like_fine_tuning, relative_error
from isomerge_fast.linalg.auto import TOLERANCES, polar_candidates
from isomerge_fast.linalg.gram_eigh import GramEigh
from isomerge_fast.linalg.polar_express import PolarExpress
from isomerge_fast.linalg.polar_gram import GramNewtonSchulz
from isomerge_fast.linalg.protocol import PolarSolver
from isomerge_fast.linalg.svd import FullSvd

TORCH, NUMPY = "torch", "numpy-fp64"
# With what each may be off by on these sums, whose condition numbers reach 1e4: float32 iterations lose the small
# directions, which is why none of them is taken first on a CPU.
SOLVERS: dict[str, tuple[PolarSolver, float]] = {
    "gram-eigh": (GramEigh(), 1e-5),
    "polar-express-fp64": (PolarExpress(), 1e-6),
    "polar-express-fp32": (PolarExpress(torch.float32), 1e-2),
    "gram-newton-schulz-fp64": (GramNewtonSchulz(), 1e-6),
    "svd-fp64": (FullSvd(), 1e-6),
}


def make(shape: tuple[int, int], kind: Kind, device: torch.device) -> Problem:
    total = torch.stack(deltas_like_fine_tuning(*shape, 8, kind, device=device)).double().sum(0)
    name = f"polar {shape[0]}x{shape[1]} {kind} {device.type}"
    exact = torch.from_numpy(kept(name, lambda: reference_numpy.polar(total.cpu().numpy())))

    def taken_first() -> torch.Tensor:
        choice = polar_candidates("default", shape, torch.float32, device)[0]
        return choice.solver.polar(total.to(choice.sum_dtype), dtype=torch.float32)[0]

    single, array = total.float(), total.cpu().numpy()
    calls: dict[str, Callable[[], Any]] = {OURS: taken_first}
    for label, (solver, _) in SOLVERS.items():
        calls[label] = partial(lambda solver: solver.polar(total, dtype=torch.float32)[0], solver)
    calls |= {TORCH: lambda: published.polar(single), NUMPY: lambda: reference_numpy.polar(array)}
    bars = {OURS: TOLERANCES["default"]} | {label: bar for label, (_, bar) in SOLVERS.items()}

    def error(result: torch.Tensor | np.ndarray) -> float:
        return relative_error(torch.as_tensor(result).cpu(), exact)

    return Problem(calls, error, bars, 4.0 * 3 * shape[0] * shape[1])


CONTENDERS = (OURS, TORCH, NUMPY, *SOLVERS)
CASES: tuple[tuple[str, tuple[int, int], Kind, str], ...] = (
    ("tiny", (40, 64), "noise", "tiny"),
    ("ViT-B/32 q_proj", shapes.VIT_B_32.shape("q_proj"), "decay", "short"),
    ("ViT-B/32 fc2", shapes.VIT_B_32.shape("fc2"), "noise", "short"),
    ("Llama-3.2-1B k_proj", shapes.LLAMA_1B.shape("k_proj"), "noise", "full"),
    ("ViT-L/14 fc1", shapes.VIT_L_14.shape("fc1"), "decay", "full"),
    ("Llama-3.2-1B q_proj", shapes.LLAMA_1B.shape("q_proj"), "noise", "full"),
)
ROWS = [
    Row(f"polar {of} {shape[0]}x{shape[1]} {kind}", CONTENDERS, partial(make, shape, kind), level)
    for of, shape, kind, level in CASES
]


@contests(ROWS)
def test_polar(row: Row, contender: str, measure: Callable[[Row, str], None]) -> None:
    measure(row, contender)
