"""Iso-C and Iso-CTS beside the published algorithms: in numpy, in plain torch, and FusionBench's own functions.

All on the same float32 deltas, in one process, with the same threads. Errors are relative to the published algorithm in
numpy float64 by full SVD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import isomerge_fast as imf
from benchmarks import reference_numpy, shapes
from benchmarks.harness import peers
from benchmarks.harness.rows import OURS, Problem, Row, contests
from benchmarks.harness.scratch import kept
from isomerge_fast.bench import published
from isomerge_fast.bench.problems import Kind, deltas_like_fine_tuning, relative_error
from isomerge_fast.linalg.auto import PROMISES

METHODS = ("iso-c", "iso-cts")
OUR_FUNCTIONS = {"iso-c": imf.iso_c, "iso-cts": imf.iso_cts}
PUBLISHED = {"iso-c": published.iso_c, "iso-cts": published.iso_cts}
NUMPY = {"iso-c": reference_numpy.iso_c, "iso-cts": reference_numpy.iso_cts}
TORCH, FUSION_BENCH, NUMPY_32, NUMPY_64 = "torch", "fusion-bench", "numpy-fp32", "numpy-fp64"
ALL = (OURS, TORCH, FUSION_BENCH, NUMPY_32, NUMPY_64)


def make(method: str, shape: tuple[int, int], tasks: int, kind: Kind) -> Callable[[torch.device], Problem]:
    """The problem of a row: T deltas, who merges them, and what float64 gives."""

    def problem(device: torch.device) -> Problem:
        deltas = deltas_like_fine_tuning(*shape, tasks, kind, device=device)
        singles = [delta.cpu().numpy() for delta in deltas]
        doubles = [single.astype(np.float64) for single in singles]
        name = f"{method} {shape[0]}x{shape[1]} T={tasks} {kind} {device.type}"
        exact = torch.from_numpy(kept(name, lambda: NUMPY[method](doubles)))

        def error(result: Tensor | np.ndarray) -> float:
            return relative_error(torch.as_tensor(result).cpu(), exact)

        calls: dict[str, Callable[[], Any]] = {
            OURS: lambda: OUR_FUNCTIONS[method](deltas),
            TORCH: lambda: PUBLISHED[method](deltas),
            FUSION_BENCH: lambda: peers.fusion_bench(method, [{"w": delta} for delta in deltas], str(device))["w"],
            NUMPY_32: lambda: NUMPY[method](singles),
            NUMPY_64: lambda: NUMPY[method](doubles),
        }
        moved = 4.0 * shape[0] * shape[1] * (tasks + 1)
        return Problem(calls, error, {OURS: PROMISES["default"]}, moved)

    return problem


def row(
    method: str,
    of: str,
    shape: tuple[int, int],
    tasks: int = 8,
    kind: Kind = "noise",
    contenders: tuple[str, ...] = ALL,
    **more: Any,
) -> Row:
    name = f"{method} {of} {shape[0]}x{shape[1]} T={tasks} {kind}"
    # Above this a baseline takes a second or so, a single call tells enough, and a warm-up would cost as much again.
    svds = 1 if method == "iso-c" else tasks + 3
    is_slow = svds * shape[0] * shape[1] * min(shape) > 3e9
    slow = frozenset(contenders) - {OURS} if is_slow else frozenset()
    return Row(name, contenders, make(method, shape, tasks, kind), slow=slow, **more)


def of_models() -> list[Row]:
    vit = [("ViT-B/32 " + name, shapes.VIT_B_32.shape(name)) for name in ("q_proj", "fc2", "fc1")]
    rows = [row("iso-c", *matrix, kind=kind) for matrix in vit for kind in ("noise", "decay")]
    rows += [row("iso-cts", *matrix) for matrix in vit]
    rows += [row("iso-cts", *matrix, kind="decay", contenders=(OURS, TORCH, FUSION_BENCH)) for matrix in vit]
    torch_only = (OURS, TORCH)
    rows += [row(method, "ViT-L/14 q_proj", shapes.VIT_L_14.shape("q_proj")) for method in METHODS]
    rows += [row(method, "Llama-3.2-1B k_proj", shapes.LLAMA_1B.shape("k_proj"), 4) for method in METHODS]
    expert = shapes.QWEN_MOE.shape("experts.gate_proj")
    rows.append(row("iso-cts", "Qwen3-30B-A3B experts.gate_proj", expert, 2, contenders=torch_only))
    for name in ("fc1", "fc2"):
        rows += [row(method, f"ViT-L/14 {name}", shapes.VIT_L_14.shape(name), level="full") for method in METHODS]
    for name, tasks in (("q_proj", 8), ("gate_proj", 4), ("down_proj", 4)):
        shape = shapes.LLAMA_1B.shape(name)
        rows += [
            row(method, f"Llama-3.2-1B {name}", shape, tasks, contenders=torch_only, level="full", once=True)
            for method in METHODS
        ]
    for model in (shapes.LLAMA_8B, shapes.LLAMA_70B):
        rows += [
            row(
                method, f"{model.name} {name}", model.shape(name), 8, contenders=torch_only, level="full", gpu_only=True
            )
            for name in ("q_proj", "k_proj", "gate_proj", "down_proj")
            for method in METHODS
        ]
    return rows


def square(method: str, side: int) -> Row:
    """A point of the growth curve over r; the baselines only where they take seconds."""
    return row(
        method,
        "square",
        (side, side),
        2,
        contenders=(OURS, TORCH, NUMPY_32) if side < 2048 else (OURS, TORCH) if side == 2048 else (OURS,),
        level="full" if side == 4096 and method == "iso-cts" else "short",
        once=side >= 2048,
        curve=(f"{method}, T = 2, noise", "r", float(side)),
    )


def of_growth() -> list[Row]:
    """Squares of growing sides, and one shape with growing T."""
    rows = [square(method, side) for method in METHODS for side in (256, 512, 1024, 2048, 4096)]
    for tasks in (2, 4, 8, 20):
        curve = ("iso-cts, 512 x 512, noise", "T", float(tasks))
        rows.append(row("iso-cts", "growing T", (512, 512), tasks, contenders=(OURS, TORCH, NUMPY_32), curve=curve))
    return rows


def tiny() -> list[Row]:
    rows = [row(method, "tiny", (48, 80), 3, level="tiny") for method in METHODS]
    for side in (16, 32, 64):
        curve = ("tiny iso-c", "r", float(side))
        rows.append(row("iso-c", "tiny square", (side, side), 2, level="tiny", curve=curve))
    return rows


ROWS = [*of_models(), *of_growth(), *tiny()]


@contests(ROWS)
def test_methods(row: Row, contender: str, measure: Callable[[Row, str], None]) -> None:
    measure(row, contender)
