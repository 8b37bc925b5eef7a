"""Time float32 polar factors of a float64 sum: by the solver that a merge takes, every other one, and full SVDs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.harness.rows import OURS, Problem, Row, error_against, kept
from benchmarks.shapes import shape_of
from isomerge_fast.bench import published
from isomerge_fast.bench.problems import Kind, deltas_like_fine_tuning
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
    single, array = total.float(), total.cpu().numpy()
    exact = kept(f"polar {shape[0]}x{shape[1]} {kind} {device.type}", partial(published.polar, array))

    def taken_first() -> torch.Tensor:
        choice = polar_candidates("default", shape, torch.float32, device)[0]
        return choice.solver.polar(total.to(choice.sum_dtype), dtype=torch.float32)[0]

    calls: dict[str, Callable[[], Any]] = {OURS: taken_first}
    for label, (solver, _) in SOLVERS.items():
        calls[label] = partial(lambda solver: solver.polar(total, dtype=torch.float32)[0], solver)
    calls |= {TORCH: partial(published.polar, single), NUMPY: partial(published.polar, array)}
    bars = {OURS: TOLERANCES["default"]} | {label: bar for label, (_, bar) in SOLVERS.items()}
    return Problem(calls, partial(error_against, exact), bars, 4.0 * 3 * shape[0] * shape[1])


CASES: tuple[tuple[str, Kind, str], ...] = (
    ("tiny", "noise", "tiny"),
    ("ViT-B/32 q_proj", "decay", "short"),
    ("ViT-B/32 fc2", "noise", "short"),
    ("Llama-3.2-1B k_proj", "noise", "full"),
    ("ViT-L/14 fc1", "decay", "full"),
    ("Llama-3.2-1B q_proj", "noise", "full"),
)
ROWS = [
    Row(f"polar {label} {m}x{n} {kind}", (OURS, TORCH, NUMPY, *SOLVERS), partial(make, (m, n), kind), level)
    for label, kind, level in CASES
    for m, n in [(40, 64) if label == "tiny" else shape_of(label)]
]
