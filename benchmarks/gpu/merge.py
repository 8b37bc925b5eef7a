"""Merge whole files in memory, under a ceiling for the memory of the GPU."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.gpu.shapes import NAMES, TASKS
from benchmarks.harness.readings import Rows
from benchmarks.shapes import Shapes, clip_vision_tower, llama
from isomerge_fast.bench import published
from isomerge_fast.bench.problems import relative_error
from isomerge_fast.config import MergeConfig
from isomerge_fast.execution.engine import run
from isomerge_fast.planning.planner import make_plan

MAX_VRAM = 8 << 30
LAYERS, SCALING = 2, 0.5
# Of a merged bf16 tensor: half its last place, and no more.
BAR = 2.0**-8


def streamed_merge(rows: Rows) -> None:
    """Merge two layers of Llama-3-8B, 8 experts: by the method without arithmetic, then by Iso-C and Iso-CTS.

    Then a model of many small matrices by both. Each twice: the second time nothing has to be loaded, compiled or
    page-locked any more, as in most of a large merge.
    """
    model = llama(64, 160, 1, kv=16) if rows.small else llama(4096, 14_336, LAYERS, kv=1024)
    shapes = {name: shape for name, shape in model.items() if "layers" in name}
    with _checkpoints(rows, "checkpoints", shapes, torch.bfloat16) as folder:
        for method in ("task-arithmetic", *NAMES):
            _twice(rows, folder, method, "")
            if method == "iso-c" and folder:
                rows.attempt(f"{method}, error", partial(_judged, folder))
    shapes = vision_layers(64, 2) if rows.small else vision_layers(768, 12)
    with _checkpoints(rows, "checkpoints, ViT-B/32", shapes, torch.float32) as folder:
        for method in NAMES:
            _twice(rows, folder, method, ", ViT-B/32")


def _twice(rows: Rows, folder: Path | None, method: str, model: str) -> None:
    """Add rows of a merge and of the same once more, where there is something to merge."""
    if folder is None:
        return
    for name in (f"{method}{model}", f"{method}{model}, again"):
        rows.attempt(name, partial(_merged, folder, method, torch.device(rows.device)))


def vision_layers(width: int, layers: int) -> Shapes:
    """Return the layers of CLIP's vision tower: its matrices, a bias beside each, and two norms a layer."""
    shapes = clip_vision_tower(width, layers)
    shapes |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items()}
    places = [f"vision_model.encoder.layers.{layer}.layer_norm{norm}" for layer in range(layers) for norm in (1, 2)]
    return shapes | {f"{place}.{part}": (width,) for place in places for part in ("weight", "bias")}


@contextmanager
def _checkpoints(rows: Rows, name: str, shapes: Shapes, dtype: torch.dtype) -> Iterator[Path | None]:
    """Add the row of a base and its experts, written in memory where that has room; yield their folder, or None where
    that failed.
    """
    parameters, memory = sum(map(prod, shapes.values())), Path("/dev/shm")
    needed = dtype.itemsize * parameters * (TASKS + 2)
    place = memory if memory.is_dir() and shutil.disk_usage(memory).free > 1.2 * needed else None
    with tempfile.TemporaryDirectory(dir=place, prefix="isomerge-gpu-") as folder:

        def made() -> dict[str, Any]:
            _write_checkpoints(Path(folder), shapes, dtype, torch.device(rows.device))
            return {"parameters": parameters, "experts": TASKS, "bytes": needed, "place": str(Path(folder).parent)}

        yield Path(folder) if rows.attempt(name, made) else None


def _write_checkpoints(folder: Path, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> None:
    base: dict[str, Tensor] = {}
    for index in range(TASKS + 1):
        generator = torch.Generator(device=device).manual_seed(index)
        tensors = {}
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator, device=device)
            value = 0.02 * noise if index == 0 else base[name].to(device) + 2e-3 * noise
            tensors[name] = value.to(dtype).cpu()
        base = base or tensors
        save_file(tensors, str(folder / f"{index}.safetensors"))
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _merged(folder: Path, method: str, device: torch.device) -> dict[str, Any]:
    base, *experts = (str(folder / f"{index}.safetensors") for index in range(TASKS + 1))
    config = MergeConfig(base=base, experts=experts, method=method, scaling=SCALING, out=str(folder / "merged"))
    ceiling = MAX_VRAM if device.type == "cuda" else None
    if ceiling:
        torch.cuda.reset_peak_memory_stats(device)
    report = run(make_plan(config, device, max_vram=ceiling), device=str(device), max_vram=ceiling, overwrite=True)
    seconds = report.seconds["total"]
    found: dict[str, Any] = {
        "seconds": seconds,
        "uncertified": sum(row.get("certified") is False for row in report.tensors),
        "read_gb_per_s": sum(row["read_bytes"] for row in report.tensors) / seconds / 1e9,
        "phases": {key: round(value, 3) for key, value in report.seconds.items()},
        "threads": {key: round(report.io[key], 3) for key in ("reading_seconds", "writing_seconds")},
        "slowest": {row["name"]: row["seconds"] for row in sorted(report.tensors, key=itemgetter("seconds"))[-3:]},
    }
    if ceiling:
        found["peak_vram_bytes"] = torch.cuda.max_memory_reserved(device)
        assert found["peak_vram_bytes"] <= MAX_VRAM, found
    return found


def _judged(folder: Path) -> dict[str, Any]:
    """Return the error of one tensor, against the published algorithm in float64 by LAPACK."""

    def stored(file: Path) -> Tensor:
        return load_file(str(file))["model.layers.0.self_attn.k_proj.weight"].double()

    base, *experts = (stored(folder / f"{index}.safetensors") for index in range(TASKS + 1))
    (merged,) = (folder / "merged").glob("*.safetensors")
    exact = base + SCALING * published.iso_c([expert - base for expert in experts])
    error = relative_error(stored(merged), exact)
    assert error <= BAR, error
    return {"error": error}
