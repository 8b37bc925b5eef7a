"""Iso-C and Iso-CTS beside the published algorithms: in numpy, in plain torch, and FusionBench's own functions.

All on the same float32 deltas, in one process, with the same threads. Errors are relative to the published algorithm in
numpy float64 by full SVD.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
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
from isomerge_fast.linalg.auto import TOLERANCES

METHODS = ("iso-c", "iso-cts")
OUR_FUNCTIONS = {"iso-c": imf.iso_c, "iso-cts": imf.iso_cts}
PUBLISHED = {"iso-c": published.iso_c, "iso-cts": published.iso_cts}
NUMPY = {"iso-c": reference_numpy.iso_c, "iso-cts": reference_numpy.iso_cts}
TORCH, FUSION_BENCH, NUMPY_32, NUMPY_64 = "torch", "fusion-bench", "numpy-fp32", "numpy-fp64"
# Of SVDs: one that takes half a second or so; a single call tells enough, and a warm-up would cost as much again.
SLOW_WORK = 1.5e9
# Where ours takes seconds too.
VERY_SLOW_WORK = 5e9
WITHOUT_NUMPY = (OURS, TORCH, FUSION_BENCH)
SOME = (*WITHOUT_NUMPY, NUMPY_32)


@lru_cache(maxsize=1)
def made(shape: tuple[int, int], tasks: int, kind: Kind, device: torch.device) -> list[Tensor]:
    """Deltas; both methods of a shape follow each other."""
    return deltas_like_fine_tuning(*shape, tasks, kind, device=device)


def make(method: str, shape: tuple[int, int], tasks: int, kind: Kind) -> Callable[[torch.device], Problem]:
    """The problem of a row: T deltas, who merges them, and what float64 gives."""

    def problem(device: torch.device) -> Problem:
        deltas = made(shape, tasks, kind, device)
        singles = [delta.cpu().numpy() for delta in deltas]

        def in_double() -> np.ndarray:
            return NUMPY[method]([single.astype(np.float64) for single in singles])

        exact = torch.from_numpy(kept(f"{method} {shape[0]}x{shape[1]} T={tasks} {kind} {device.type}", in_double))

        def error(result: Tensor | np.ndarray) -> float:
            return relative_error(torch.as_tensor(result).cpu(), exact)

        calls: dict[str, Callable[[], Any]] = {
            OURS: lambda: OUR_FUNCTIONS[method](deltas),
            TORCH: lambda: PUBLISHED[method](deltas),
            FUSION_BENCH: lambda: peers.fusion_bench(method, [{"w": delta} for delta in deltas], str(device))["w"],
            NUMPY_32: lambda: NUMPY[method](singles),
            NUMPY_64: in_double,
        }
        moved = 4.0 * shape[0] * shape[1] * (tasks + 1)
        return Problem(calls, error, {OURS: TOLERANCES["default"]}, moved)

    return problem


def row(
    method: str,
    of: str,
    shape: tuple[int, int],
    tasks: int = 8,
    kind: Kind = "noise",
    contenders: tuple[str, ...] = SOME,
    **more: Any,
) -> Row:
    name = f"{method} {of} {shape[0]}x{shape[1]} T={tasks} {kind}"
    svds = 1 if method == "iso-c" else tasks + 3
    slow = frozenset(contenders) - {OURS} if svds * shape[0] * shape[1] * min(shape) > SLOW_WORK else frozenset()
    if shape[0] * shape[1] * min(shape) > VERY_SLOW_WORK:
        slow = frozenset(contenders)
    return Row(name, contenders, make(method, shape, tasks, kind), slow=slow, **more)


def of_models() -> list[Row]:
    vit = [("ViT-B/32 " + name, shapes.VIT_B_32.shape(name)) for name in ("q_proj", "fc2", "fc1")]
    torch_only = (OURS, TORCH)
    rows = []
    for name, shape in vit:
        is_smallest = name == "ViT-B/32 q_proj"
        rows.append(row("iso-c", name, shape, contenders=(*SOME, NUMPY_64) if is_smallest else SOME))
        rows.append(row("iso-cts", name, shape, contenders=(*SOME, NUMPY_64) if is_smallest else WITHOUT_NUMPY))
        level = "full" if name == "ViT-B/32 fc2" else "short"
        rows.append(row("iso-c", name, shape, kind="decay", contenders=torch_only, level=level))
        level = "short" if name == "ViT-B/32 fc1" else "full"
        rows.append(row("iso-cts", name, shape, kind="decay", contenders=torch_only, level=level))
    for method, contenders in (("iso-c", SOME), ("iso-cts", WITHOUT_NUMPY)):
        rows.append(row(method, "ViT-L/14 q_proj", shapes.VIT_L_14.shape("q_proj"), contenders=contenders))
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
    rows = [square(method, side) for side in (256, 512, 1024, 2048, 4096) for method in METHODS]
    for tasks in (2, 4, 8, 20):
        curve = ("iso-cts, 512 x 512, noise", "T", float(tasks))
        rows.append(row("iso-cts", "growing T", (512, 512), tasks, contenders=(OURS, TORCH), curve=curve))
    return rows


def tiny() -> list[Row]:
    every = (*SOME, NUMPY_64)
    rows = [row(method, "tiny", (48, 80), 3, contenders=every, level="tiny") for method in METHODS]
    for side in (16, 32, 64):
        curve = ("tiny iso-c", "r", float(side))
        rows.append(row("iso-c", "tiny square", (side, side), 2, contenders=every, level="tiny", curve=curve))
    return rows


ROWS = [*of_models(), *of_growth(), *tiny()]


@contests(ROWS)
def test_methods(row: Row, contender: str, measure: Callable[[Row, str], None]) -> None:
    measure(row, contender)
