"""Time Iso-C and Iso-CTS of float32 deltas beside the published algorithms and FusionBench's own functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

import isomerge_fast as imf
from benchmarks.harness import peers
from benchmarks.harness.rows import OURS, Problem, Row, error_against, kept
from benchmarks.shapes import shape_of
from isomerge_fast.bench import published
from isomerge_fast.bench.problems import Kind, deltas_like_fine_tuning
from isomerge_fast.linalg.auto import TOLERANCES

METHODS = ("iso-c", "iso-cts")
TORCH, FUSION_BENCH, NUMPY_32, NUMPY_64 = "torch", "fusion-bench", "numpy-fp32", "numpy-fp64"
# Of SVDs: one that takes half a second or so; a single call tells enough, and a warm-up would cost as much again.
SLOW_WORK = 1.5e9
# Where ours takes seconds too.
VERY_SLOW_WORK = 5e9
TORCH_ONLY = (OURS, TORCH)
WITHOUT_NUMPY = (*TORCH_ONLY, FUSION_BENCH)
SOME = (*WITHOUT_NUMPY, NUMPY_32)
EVERY = (*SOME, NUMPY_64)


# Both methods of a shape follow each other.
made = lru_cache(maxsize=1)(deltas_like_fine_tuning)


def problem(method: str, shape: tuple[int, int], tasks: int, kind: Kind, device: torch.device) -> Problem:
    """Return the benchmark of a method on T deltas by ours, torch, FusionBench and numpy, judged by float64 numpy."""
    deltas = made(*shape, tasks, kind, device=device)
    singles = [delta.cpu().numpy() for delta in deltas]
    function = method.replace("-", "_")
    as_published = getattr(published, function)

    def in_double() -> np.ndarray:
        return as_published([single.astype(np.float64) for single in singles])

    exact = kept(f"{method} {shape[0]}x{shape[1]} T={tasks} {kind} {device.type}", in_double)
    calls: dict[str, Callable[[], Any]] = {
        OURS: partial(getattr(imf, function), deltas),
        TORCH: partial(as_published, deltas),
        FUSION_BENCH: lambda: peers.fusion_bench(method, [{"w": delta} for delta in deltas], str(device))["w"],
        NUMPY_32: partial(as_published, singles),
        NUMPY_64: in_double,
    }
    moved_bytes = 4.0 * shape[0] * shape[1] * (tasks + 1)
    return Problem(calls, partial(error_against, exact), {OURS: TOLERANCES["default"]}, moved_bytes)


def row(
    method: str,
    label: str,
    tasks: int = 8,
    kind: Kind = "noise",
    contenders: tuple[str, ...] = SOME,
    *,
    shape: tuple[int, int] | None = None,
    **more: Any,
) -> Row:
    """Return the row of a method on the matrix that ``label`` names, or on one of another ``shape``."""
    m, n = shape or shape_of(label)
    svds = 1 if method == "iso-c" else tasks + 3
    slow = frozenset(contenders) - {OURS} if svds * m * n * min(m, n) > SLOW_WORK else frozenset()
    if m * n * min(m, n) > VERY_SLOW_WORK:
        slow = frozenset(contenders)
    make = partial(problem, method, (m, n), tasks, kind)
    return Row(f"{method} {label} {m}x{n} T={tasks} {kind}", contenders, make, slow=slow, **more)


def of_models() -> Iterator[Row]:
    """Yield rows on the matrices of models."""
    for name in ("q_proj", "fc2", "fc1"):
        label, is_smallest = f"ViT-B/32 {name}", name == "q_proj"
        yield row("iso-c", label, contenders=EVERY if is_smallest else SOME)
        yield row("iso-cts", label, contenders=EVERY if is_smallest else WITHOUT_NUMPY)
        level = "full" if name == "fc2" else "short"
        yield row("iso-c", label, kind="decay", contenders=TORCH_ONLY, level=level)
        level = "short" if name == "fc1" else "full"
        yield row("iso-cts", label, kind="decay", contenders=TORCH_ONLY, level=level)
    yield row("iso-c", "ViT-L/14 q_proj")
    yield row("iso-cts", "ViT-L/14 q_proj", contenders=WITHOUT_NUMPY)
    for method in METHODS:
        yield row(method, "Llama-3.2-1B k_proj", 4)
    yield row("iso-cts", "Qwen3-30B-A3B experts.gate_proj", 2, contenders=TORCH_ONLY)
    for label in ("ViT-L/14 fc1", "ViT-L/14 fc2"):
        for method in METHODS:
            yield row(method, label, level="full")
    larger: dict[str, Any] = {"contenders": TORCH_ONLY, "level": "full"}
    for name, tasks in (("q_proj", 8), ("gate_proj", 4), ("down_proj", 4)):
        for method in METHODS:
            yield row(method, f"Llama-3.2-1B {name}", tasks, once=True, **larger)
    for model in ("Llama-3-8B", "Llama-3-70B"):
        for name in ("q_proj", "k_proj", "gate_proj", "down_proj"):
            for method in METHODS:
                yield row(method, f"{model} {name}", gpu_only=True, **larger)


def of_growth() -> Iterator[Row]:
    """Yield squares of growing sides, with the baselines only where they take seconds, and one shape with growing T."""
    for side in (256, 512, 1024, 2048, 4096):
        contenders = (OURS, TORCH, NUMPY_32) if side < 2048 else TORCH_ONLY if side == 2048 else (OURS,)
        for method in METHODS:
            more: dict[str, Any] = {"level": "full" if side == 4096 and method == "iso-cts" else "short"}
            more |= {"once": side >= 2048, "curve": (f"{method}, T = 2, noise", "r", float(side))}
            yield row(method, "square", 2, contenders=contenders, shape=(side, side), **more)
    for tasks in (2, 4, 8, 20):
        curve = ("iso-cts, 512 x 512, noise", "T", float(tasks))
        yield row("iso-cts", "growing T", tasks, contenders=TORCH_ONLY, shape=(512, 512), curve=curve)


def tiny() -> Iterator[Row]:
    """Yield rows on small matrices, for the tests of the benchmarks."""
    for method in METHODS:
        yield row(method, "tiny", 3, contenders=EVERY, shape=(48, 80), level="tiny")
    for side in (16, 32, 64):
        curve = ("tiny iso-c", "r", float(side))
        yield row("iso-c", "tiny square", 2, contenders=EVERY, shape=(side, side), level="tiny", curve=curve)


ROWS = [*of_models(), *of_growth(), *tiny()]
