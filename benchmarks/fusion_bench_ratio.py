"""Iso-C and Iso-CTS against FusionBench's own functions: same process, same threads, same deltas, turn by turn.

    python -m benchmarks.fusion_bench_ratio [--shapes 768x768,…] [--rounds 5] [--device cpu] [--out results.json]

Every row is the median over rounds of (their seconds / our seconds), each round timing both, one after the other, so
that a slow moment of the machine falls on both. Beside it the errors of both against the published algorithm in
float64 by full SVD. The peer's functions print; what they print is swallowed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import isomerge_fast as imf
from benchmarks.measure import device_name

DEFAULT_SHAPES = "768x768,1024x1024,2048x2048,768x3072,3072x768"
# Sizes up to which float64 SVDs of all tasks are made for the error column.
JUDGED_ELEMENTS = 768 * 3072


def deltas_like_fine_tuning(rows: int, columns: int, tasks: int, kind: str, seed: int = 0) -> list[Tensor]:
    """Full-rank float32 deltas [rows, columns].

    ``noise``: what all tasks share, 16 directions of their own, and white noise that hides everything below: at the
    cut of a task's part the gap is a few tenths of a percent, the worst case for any subspace method.
    ``decay``: what all tasks share and parts whose singular values fall like 1/√i, over a floor of white noise.
    """
    generator = torch.Generator().manual_seed(seed)
    short = min(rows, columns)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shared = 0.002 * random(rows, 16) @ random(16, columns)
    if kind == "noise":
        own = [0.002 * random(rows, 16) @ random(16, columns) for _ in range(tasks)]
        return [0.01 * random(rows, columns) + shared + part for part in own]
    falling = torch.arange(1, short + 1).rsqrt()
    result = []
    for _ in range(tasks):
        u, v = (torch.linalg.qr(random(size, short))[0] for size in (rows, columns))
        result.append(shared + (u * falling) @ v.mT + 0.1 * random(rows, columns) / max(rows, columns) ** 0.5)
    return result


def peers() -> dict[str, Callable[[list[Tensor], str], Tensor]]:
    """FusionBench's functions, called as its algorithms call them."""
    from fusion_bench.method.isotropic_merging import iso_utils  # type: ignore[import-not-found]  # extra `bench`

    def call(function: Callable[..., Any], deltas: list[Tensor], *arguments: Any, device: str) -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()):
            return function([{"w": delta} for delta in deltas], *arguments, accelerator=device)["w"]

    return {
        "iso-c": lambda deltas, device: call(iso_utils.iso_c, deltas, device=device),
        "iso-cts": lambda deltas, device: call(iso_utils.iso_cts, deltas, 0.8, device=device),
    }


def judge(deltas: list[Tensor], method: str) -> Tensor:
    """The published algorithm in float64, by full SVD."""
    function = {"iso-c": imf.iso_c, "iso-cts": imf.iso_cts}[method]
    return function([delta.double() for delta in deltas], precision="reference")


def seconds(function: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """Wall time of one call, the device idle before and after."""
    synchronise = torch.cuda.synchronize if device != "cpu" else lambda: None
    synchronise()
    start = time.perf_counter()
    result = function()
    synchronise()
    return time.perf_counter() - start, result


def compare(shape: tuple[int, int], method: str, kind: str, *, tasks: int, rounds: int, device: str) -> dict[str, Any]:
    """One row: medians of both, of their ratio, and both errors."""
    deltas = [delta.to(device) for delta in deltas_like_fine_tuning(*shape, tasks, kind)]
    ours = {"iso-c": imf.iso_c, "iso-cts": imf.iso_cts}[method]
    theirs = peers()[method]
    seconds(lambda: ours(deltas), device)  # thread pools and handles
    times, value, peer_value = [], None, None
    for _ in range(rounds):
        ours_seconds, value = seconds(lambda: ours(deltas), device)
        peer_seconds, peer_value = seconds(lambda: theirs(deltas, device), device)
        times.append((ours_seconds, peer_seconds, peer_seconds / ours_seconds))
    row: dict[str, Any] = {
        "shape": list(shape),
        "method": method,
        "deltas": kind,
        "tasks": tasks,
        "seconds": statistics.median(row[0] for row in times),
        "peer_seconds": statistics.median(row[1] for row in times),
        "ratio": statistics.median(row[2] for row in times),
        "ratio_range": [min(row[2] for row in times), max(row[2] for row in times)],
    }
    if shape[0] * shape[1] <= JUDGED_ELEMENTS:
        assert value is not None
        assert peer_value is not None
        expected = judge(deltas, method).double()
        scale = expected.norm()
        row["error"] = ((value.double() - expected).norm() / scale).item()
        row["peer_error"] = ((peer_value.double() - expected).norm() / scale).item()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Ratios to FusionBench's iso_c and iso_cts.")
    parser.add_argument("--shapes", default=DEFAULT_SHAPES)
    parser.add_argument("--deltas", default="noise,decay")
    parser.add_argument("--methods", default="iso-c,iso-cts")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = {
        "device": device_name(torch.device(options.device)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, T = {options.tasks}")
    print(f"{'shape':>10}  {'method':8} {'deltas':6} {'ours s':>8} {'peer s':>8} {'ratio':>6}  range        errors")
    rows = []
    for shape in options.shapes.split(","):
        rows_columns = tuple(int(size) for size in shape.split("x"))
        for method in options.methods.split(","):
            for kind in options.deltas.split(","):
                row = compare(
                    (rows_columns[0], rows_columns[1]),
                    method,
                    kind,
                    tasks=options.tasks,
                    rounds=options.rounds,
                    device=options.device,
                )
                rows.append(row)
                low, high = row["ratio_range"]
                errors = f"{row['error']:.1e}  {row['peer_error']:.1e}" if "error" in row else "not judged"
                print(
                    f"{shape:>10}  {method:8} {kind:6} {row['seconds']:8.3f} {row['peer_seconds']:8.3f} "
                    f"{row['ratio']:6.2f}  {low:.2f}-{high:<5.2f}  {errors}",
                    flush=True,
                )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
