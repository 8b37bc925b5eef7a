"""Time whole merges, files to files: ours, plain torch with safetensors, FusionBench's functions, mergekit.

Checkpoints are Llama-like, of random bf16 weights. mergekit has no Iso methods; it is compared in task arithmetic, by
whole processes with their start-up on both sides. All else is in this process. Errors are those of merged weights of
the first layer, one of every shape, relative to float64; of Δ where the output is float32, which does not hide it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import isomerge_fast as imf
from benchmarks.harness.checkpoints import SMALL, family, weights
from benchmarks.harness.peers import fusion_bench, mergekit, task_arithmetic_recipe
from benchmarks.harness.processes import merged
from benchmarks.harness.rows import OURS, Problem, Row, kept, scratch
from benchmarks.shapes import Shapes, llama
from isomerge_fast.bench import published
from isomerge_fast.checkpoint.state_dict import open_state_dict
from isomerge_fast.linalg.auto import TOLERANCES

TORCH, FUSION_BENCH, MERGEKIT, MERGEKIT_32 = "torch", "fusion-bench", "mergekit", "mergekit-fp32"
ONE_CORE = "ours-1-core"  # ours with ``threads=1``: what several matrices at once gain
SCALING = 0.3
CEILING = "600MiB"
State = dict[str, Tensor]
EXACT: dict[str, Callable[..., np.ndarray]] = {
    "iso-c": published.iso_c,
    "iso-cts": published.iso_cts,
    "mean": partial(np.mean, axis=0),
    "task-arithmetic": partial(np.sum, axis=0),
}


def load(folder: Path) -> State:
    return {name: tensor.float() for file in weights(folder) for name, tensor in load_file(file).items()}


def plain_merge(models: Sequence[Path], out: Path, combine: Callable[[list[State]], State]) -> Path:
    """Write θ₀ + α Δ of a base and its experts into one float32 file, as one writes it with torch and safetensors."""
    base, *experts = (load(model) for model in models)
    delta = combine([{name: expert[name] - base[name] for name in base} for expert in experts])
    out.mkdir(parents=True, exist_ok=True)
    merged = {name: weight + SCALING * delta[name] for name, weight in base.items()}
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
    return out


def mean(deltas: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(deltas)).mean(0)


def combine(method: str, deltas: list[State]) -> State:
    """Return Δ: of matrices by the published method, of everything else by the mean."""
    stacks = {name: [delta[name] for delta in deltas] for name in deltas[0]}
    of_matrices = {"iso-c": published.iso_c, "iso-cts": published.iso_cts, "mean": mean}[method]
    return {name: (of_matrices if stack[0].ndim == 2 else mean)(stack) for name, stack in stacks.items()}


def error_of(method: str, models: Sequence[Path], shapes: Shapes, *, of_delta: bool) -> Callable[[Path], float]:
    """Return a function that computes ‖found − exact‖_F / ‖exact‖_F of an output, of θ or of Δ = (θ − θ₀) / α.

    The tensors judged are one matrix of every shape in the first layer; without layers, the first few tensors.
    """
    label = models[0].parent.name
    by_shape = {s: name for name, s in shapes.items() if name.startswith("model.layers.0.") and len(s) == 2}

    def exact_delta(name: str) -> np.ndarray:
        base, *experts = (open_state_dict(model)[name].double().numpy() for model in models)
        return EXACT[method]([expert - base for expert in experts])

    exact = {
        name: torch.from_numpy(kept(f"{label} {method} {name}", partial(exact_delta, name)))
        for name in list(by_shape.values()) or list(shapes)[:4]
    }

    def error(out: Path) -> float:
        squares, scale = 0.0, 0.0
        for name, delta in exact.items():
            base, merged = (open_state_dict(folder)[name].double() for folder in (models[0], out))
            expected = SCALING * delta if of_delta else base + SCALING * delta
            squares += (merged - base * of_delta - expected).square().sum().item()
            scale += expected.square().sum().item()
        return (squares / scale) ** 0.5

    return error


def moved_bytes(shapes: Shapes, experts: int, out_itemsize: int) -> float:
    """Return the bytes of the bf16 weights that are read and of the output."""
    return sum(map(prod, shapes.values())) * (2.0 * (experts + 1) + out_itemsize)


def in_process(method: str, label: str, shapes: Shapes, experts: int, device: torch.device) -> Problem:
    """Return the benchmark of a merge to float32 files, each contender called in this process."""
    models = family(scratch(), label, shapes, experts)
    out = scratch() / f"{label}-{method}"
    config = {"base": str(models[0]), "experts": [str(model) for model in models[1:]], "method": method}
    config |= {"scaling": SCALING, "dtype": "float32"}

    def ours(name: str, threads: int | None) -> Path:
        imf.merge({**config, "out": str(out / name)}, device=str(device), threads=threads, overwrite=True)
        return out / name

    calls = {
        OURS: partial(ours, OURS, None),
        ONE_CORE: partial(ours, ONE_CORE, 1),
        TORCH: partial(plain_merge, models, out / TORCH, partial(combine, method)),
        FUSION_BENCH: partial(plain_merge, models, out / FUSION_BENCH, partial(fusion_bench, method)),
    }
    return Problem(
        calls,
        error_of(method, models, shapes, of_delta=True),
        # Beside the method's own error the float32 roundings of θ, 2^-24 of it, some thirty times as large as Δ.
        dict.fromkeys((OURS, ONE_CORE), TOLERANCES["default"]),
        moved_bytes(shapes, experts, 4),
        is_counted=method.startswith("iso"),
        close=partial(shutil.rmtree, out, True),
    )


def processes(label: str, shapes: Shapes, experts: int, device: torch.device) -> Problem:
    """Return the benchmark of task arithmetic to bf16 files by ``isomerge run`` and ``mergekit-yaml``, as processes."""
    models = family(scratch(), label, shapes, experts)
    out = scratch() / f"{label}-processes"
    out.mkdir(exist_ok=True)
    options = ("--method", "task-arithmetic", "--scaling", str(SCALING), "--max-ram", CEILING, "--device", str(device))

    def ours() -> tuple[Path, dict[str, Any]]:
        return out / OURS, merged(models, out / OURS, *options)

    def theirs(dtype: str) -> tuple[Path, dict[str, Any]]:
        shutil.rmtree(out / dtype, ignore_errors=True)
        return out / dtype, mergekit(task_arithmetic_recipe(models, SCALING, dtype), out / dtype)

    calls = {OURS: ours, MERGEKIT: partial(theirs, "bfloat16"), MERGEKIT_32: partial(theirs, "float32")}
    of_weights = error_of("task-arithmetic", models, shapes, of_delta=False)
    return Problem(
        calls,
        lambda result: of_weights(result[0]),
        {OURS: 2.0**-9},  # one rounding to bf16
        moved_bytes(shapes, experts, 2),
        is_counted=False,
        peak=lambda result: result[1]["peak_bytes"],
        close=partial(shutil.rmtree, out, True),
    )


def of_equal_bytes(count: int) -> Shapes:
    """Return 8 M parameters in ``count`` tensors, beside a table that a Llama has to have."""
    side = 1 << 23
    return {"model.embed_tokens.weight": (64, 64)} | {
        f"model.blocks.{index}.weight": (64, side // count // 64) for index in range(count)
    }


def rows() -> Iterator[Row]:
    """Yield the rows of merges by our methods, of merges beside mergekit, and of merges of more and more tensors."""
    for level, label, shapes, experts in (
        ("tiny", "llama-tiny", llama(64, 160, 1, 96), 2),
        ("short", "llama-9m", llama(768, 3072, 1, 512), 4),
    ):
        for method in ("iso-c", "iso-cts"):
            make = partial(in_process, method, label, shapes, experts)
            # FusionBench's functions take what plain torch takes, which `methods` shows; once is enough.
            peers = (TORCH,) if (level, method) == ("short", "iso-cts") else (TORCH, FUSION_BENCH)
            slow = frozenset(peers if level != "tiny" else ())
            yield Row(f"merge {method} {label} T={experts}", (OURS, ONE_CORE, *peers), make, level, slow)
    make = partial(processes, "llama-162m", SMALL, 4)
    for level, theirs, precision in (("short", MERGEKIT, "bfloat16"), ("full", MERGEKIT_32, "float32")):
        name = f"merge task-arithmetic llama-162m T=4 --max-ram {CEILING}, mergekit in {precision}"
        yield Row(name, (OURS, theirs), make, level, frozenset((OURS, theirs)))
    for count in (16, 128, 1024, 4096):
        make = partial(in_process, "mean", f"tensors-{count}", of_equal_bytes(count), 2)
        curve = ("merge, mean of 8 M parameters, T = 2", "tensors", float(count))
        is_slow = count > 1000
        slow = frozenset((OURS, TORCH)) if is_slow else frozenset()
        name = f"merge mean 8 M parameters in {count} tensors"
        yield Row(name, (OURS, TORCH), make, slow=slow, once=is_slow, curve=curve)


ROWS = [*rows()]
