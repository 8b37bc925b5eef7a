"""Whole merges, files to files: ours, plain torch with safetensors, FusionBench's functions, mergekit.

Llama-like checkpoints of random bf16 weights. mergekit has no Iso methods; it is compared in task arithmetic, whole
processes with their start-up on both sides. All else is in this process. Errors are those of merged weights of the
first layer, one of every shape, relative to float64; of Δ where the output is float32, where its rounding does not hide
them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

import isomerge_fast as imf
from benchmarks import plain_merge, reference_numpy
from benchmarks.harness.checkpoints import SMALL, family, llama_shapes, weights
from benchmarks.harness.peers import fusion_bench, mergekit, task_arithmetic_recipe
from benchmarks.harness.processes import merged
from benchmarks.harness.rows import OURS, Problem, Row, contests
from benchmarks.harness.scratch import kept, scratch
from isomerge_fast.linalg.auto import TOLERANCES

TORCH, FUSION_BENCH, MERGEKIT, MERGEKIT_32 = "torch", "fusion-bench", "mergekit", "mergekit-fp32"
SCALING = 0.3
CEILING = "600MiB"
JUDGED = "model.layers.0."
Shapes = Mapping[str, tuple[int, ...]]


def tensor(folder: Path, name: str) -> Tensor:
    """A tensor of a checkpoint folder."""
    for file in weights(folder):
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118  # the handle is no dict
                return opened.get_tensor(name)
    raise KeyError(name)


def judged_names(shapes: Shapes) -> list[str]:
    """One matrix of every shape in the first layer; where there are no layers, the first few tensors."""
    by_shape = {shape: name for name, shape in shapes.items() if name.startswith(JUDGED) and len(shape) == 2}
    return list(by_shape.values()) or list(shapes)[:4]


def exact_delta(method: str, models: Sequence[Path], name: str) -> Tensor:
    base, *experts = (tensor(model, name).double().numpy() for model in models)
    deltas = [expert - base for expert in experts]
    by_method = {"iso-c": reference_numpy.iso_c, "iso-cts": reference_numpy.iso_cts, "mean": lambda d: np.mean(d, 0)}
    total = by_method.get(method, lambda deltas: np.sum(deltas, 0))
    return torch.from_numpy(total(deltas))


def error_of(models: Sequence[Path], exact: Mapping[str, Tensor], *, of_delta: bool) -> Callable[[Path], float]:
    """‖found − exact‖_F / ‖exact‖_F over the judged tensors: of θ, or of Δ = (θ − θ₀) / α."""

    def error(out: Path) -> float:
        squares, scale = 0.0, 0.0
        for name, delta in exact.items():
            base = tensor(models[0], name).double()
            expected = SCALING * delta if of_delta else base + SCALING * delta
            found = tensor(out, name).double() - (base if of_delta else 0.0)
            squares += (found - expected).square().sum().item()
            scale += expected.square().sum().item()
        return (squares / scale) ** 0.5

    return error


def exact_of(method: str, models: Sequence[Path], shapes: Shapes, label: str) -> dict[str, Tensor]:
    """Of the judged tensors, by name."""

    def exact(name: str) -> Tensor:
        return torch.from_numpy(kept(f"{label} {method} {name}", lambda: exact_delta(method, models, name).numpy()))

    return {name: exact(name) for name in judged_names(shapes)}


def bytes_of(shapes: Shapes, experts: int, out_itemsize: int) -> float:
    """bf16 read, the output written."""
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    return parameters * (2.0 * (experts + 1) + out_itemsize)


def in_process(method: str, label: str, shapes: Shapes, experts: int, device: torch.device) -> Problem:
    """A merge to float32 files, called as a function."""
    root = scratch()
    models = family(root, label, shapes, experts)
    outs = {name: root / f"{label}-{method}-{name}" for name in (OURS, TORCH, FUSION_BENCH)}
    config = {"base": str(models[0]), "experts": [str(model) for model in models[1:]], "method": method}
    config |= {"scaling": SCALING, "dtype": "float32", "out": str(outs[OURS])}

    def ours() -> Path:
        imf.merge(config, device=str(device), overwrite=True)
        return outs[OURS]

    def plain(name: str, combine: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]) -> Path:
        plain_merge.merge(models, outs[name], combine, scaling=SCALING, dtype=torch.float32)
        return outs[name]

    calls = {
        OURS: ours,
        TORCH: lambda: plain(TORCH, plain_merge.combine(method)),
        FUSION_BENCH: lambda: plain(FUSION_BENCH, lambda deltas: fusion_bench(method, deltas)),
    }
    error = error_of(models, exact_of(method, models, shapes, label), of_delta=True)
    # Beside the method's own error the float32 roundings of θ, 2^-24 of it, some thirty times as large as Δ.
    bars = {OURS: TOLERANCES["default"]}
    moved, close = bytes_of(shapes, experts, 4), partial(remove, list(outs.values()))
    return Problem(calls, error, bars, moved, is_counted=method.startswith("iso"), close=close)


def processes(label: str, shapes: Shapes, experts: int, device: torch.device) -> Problem:
    """Task arithmetic to bf16 files, as the programs that users start."""
    root = scratch()
    models = family(root, label, shapes, experts)
    names = (OURS, MERGEKIT, MERGEKIT_32)
    outs = {name: root / f"{label}-{name}" for name in names}
    options = ("--method", "task-arithmetic", "--scaling", str(SCALING), "--max-ram", CEILING, "--device", str(device))

    def ours() -> tuple[Path, dict[str, Any]]:
        return outs[OURS], merged(models, outs[OURS], *options)

    def theirs(name: str, dtype: str) -> tuple[Path, dict[str, Any]]:
        shutil.rmtree(outs[name], ignore_errors=True)
        return outs[name], mergekit(task_arithmetic_recipe(models, SCALING, dtype), outs[name])

    calls = {
        OURS: ours,
        MERGEKIT: lambda: theirs(MERGEKIT, "bfloat16"),
        MERGEKIT_32: lambda: theirs(MERGEKIT_32, "float32"),
    }
    of_weights = error_of(models, exact_of("task-arithmetic", models, shapes, label), of_delta=False)
    return Problem(
        calls,
        lambda result: of_weights(result[0]),
        {OURS: 2.0**-9},  # one rounding to bf16
        bytes_of(shapes, experts, 2),
        is_counted=False,
        peak=lambda result: result[1]["peak_bytes"],
        close=partial(remove, list(outs.values())),
    )


def remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def of_equal_bytes(count: int) -> dict[str, tuple[int, ...]]:
    """8 M parameters in ``count`` tensors, beside a table that a Llama has to have."""
    side = 1 << 23
    return {"model.embed_tokens.weight": (64, 64)} | {
        f"model.blocks.{index}.weight": (64, side // count // 64) for index in range(count)
    }


def rows() -> list[Row]:
    one_layer = llama_shapes(768, 3072, 1, 512)
    tiny = llama_shapes(64, 160, 1, 96)
    found = []
    for level, label, shapes, experts in (("tiny", "llama-tiny", tiny, 2), ("short", "llama-9m", one_layer, 4)):
        for method in ("iso-c", "iso-cts"):
            make = partial(in_process, method, label, shapes, experts)
            # FusionBench's functions take what plain torch takes, which `methods` shows; once is enough.
            peers = (TORCH,) if (level, method) == ("short", "iso-cts") else (TORCH, FUSION_BENCH)
            slow = frozenset(peers if level != "tiny" else ())
            found.append(Row(f"merge {method} {label} T={experts}", (OURS, *peers), make, level, slow))
    make = partial(processes, "llama-162m", SMALL, 4)
    for level, contenders in (("short", (OURS, MERGEKIT)), ("full", (OURS, MERGEKIT_32))):
        precision = "float32" if MERGEKIT_32 in contenders else "bfloat16"
        name = f"merge task-arithmetic llama-162m T=4 --max-ram {CEILING}, mergekit in {precision}"
        found.append(Row(name, contenders, make, level, frozenset(contenders)))
    for count in (16, 128, 1024, 4096):
        make = partial(in_process, "mean", f"tensors-{count}", of_equal_bytes(count), 2)
        curve = ("merge, mean of 8 M parameters, T = 2", "tensors", float(count))
        name = f"merge mean 8 M parameters in {count} tensors"
        is_slow = count > 1000
        slow = frozenset((OURS, TORCH)) if is_slow else frozenset()
        found.append(Row(name, (OURS, TORCH), make, slow=slow, once=is_slow, curve=curve))
    return found


ROWS = rows()


@contests(ROWS)
def test_merge(row: Row, contender: str, measure: Callable[[Row, str], None]) -> None:
    measure(row, contender)
