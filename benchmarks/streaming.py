"""Merges too large for ``make bench``, against what the disk and the arithmetic alone take.

    python -m benchmarks.streaming [--folder DIR] [--rows floor,…] [--rounds 3] [--out JSON]

``floor``     the mean of 2 experts of 2 B parameters in bf16 under 1 GiB (12 GB in, 4 GB out), in turn with reading
              those bytes and writing those bytes, and with the arithmetic alone. The inputs are put out of the page
              cache before each reading.
``embedding`` Iso-C and Iso-CTS of one 128256 x 8192 matrix, 2 experts in bf16 under 4 GiB (5 minutes on 2 cores for
              Iso-C, several times that for Iso-CTS).
``gpu``       Iso-C of 4 experts of 8B-parameter shapes (four layers and both token tables) under 8 GiB of GPU memory;
              put --folder on a tmpfs.

Every figure is the median over rounds. Needs 20 GB in --folder for ``floor``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.checkpoints import family, llama_shapes, weights
from benchmarks.harness.processes import merged, shares
from isomerge_fast import ops
from isomerge_fast.bench.ceilings import device_name, forget, read_all, write_all
from isomerge_fast.execution.threads import ComputeThreads
from isomerge_fast.methods import RowBlock

MIB = 1 << 20
LARGE = llama_shapes(2560, 10_240, 18, 32_000)  # 2.05 B
EMBEDDING = {"model.embed_tokens.weight": (128_256, 8192)}
EIGHT_BILLION = llama_shapes(4096, 14_336, 4, 128_256)


def arithmetic(elements: int, tasks: int) -> float:
    """Seconds of a mean's passes over so many elements in memory, as the engine shares them out."""
    block = 1 << 22
    base, *experts = [torch.full((block,), 0.5 + index, dtype=torch.bfloat16) for index in range(tasks + 1)]
    out = torch.empty_like(base)

    def merge(part: RowBlock) -> None:
        assert part.base is not None
        total = part.sum(torch.float32).total
        out[part.rows] = ops.apply_delta(part.base, total.div_(tasks), scalings=[1.0], dtype=torch.bfloat16)[0]

    with ComputeThreads() as workers:
        parts = workers.parts(RowBlock(slice(0, block), experts, base))
        workers.map(merge, parts)
        started = time.perf_counter()
        for _ in range(-(-elements // block)):
            workers.map(merge, parts)
        return time.perf_counter() - started


def against_the_floor(root: Path, rounds: int) -> Iterator[dict[str, Any]]:
    models = family(root, "llama-2b", LARGE, 2)
    files = [file for model in models for file in weights(model)]
    sizes = [file.stat().st_size for file in weights(models[0])]
    seen: list[dict[str, float]] = []
    for _ in range(rounds):
        reading = min(read_all(files, direct=direct) for direct in (True, False))
        writing = min(write_all(root, sizes, direct=direct) for direct in (True, False))
        computing = arithmetic(sum(map(prod, LARGE.values())), 2)
        forget(files)
        found = merged(models, root / "out", "--method", "mean", "--max-ram", "1GiB")
        floor = max(reading + writing, computing)
        seen.append(
            {
                "seconds": found["seconds"],
                "reading_seconds": reading,
                "writing_seconds": writing,
                "computing_seconds": computing,
                "ratio": found["seconds"] / floor,
                "peak_bytes": found["peak_bytes"],
                **{f"share_{key}": value for key, value in shares(found["report"]).items()},
            }
        )
    yield {
        "row": "floor",
        "read_bytes": sum(file.stat().st_size for file in files),
        "write_bytes": sum(sizes),
        "ceiling_bytes": 1024 * MIB,
        **{key: statistics.median(entry[key] for entry in seen) for key in seen[0]},
    }
    shutil.rmtree(root / "out", ignore_errors=True)


def of_one_embedding(root: Path, rounds: int) -> Iterator[dict[str, Any]]:
    models = family(root, "embedding", EMBEDDING, 2)
    for method in ("iso-c", "iso-cts"):
        found = merged(models, root / "out", "--method", method, "--max-ram", "4GiB")
        entry = found["report"]["tensors"][0]
        yield {
            "row": f"embedding/{method}",
            "seconds": found["seconds"],
            "peak_bytes": found["peak_bytes"],
            "ceiling_bytes": 4096 * MIB,
            "route": entry["route"],
            "algorithm": entry["algorithm"],
            "certified": entry["certified"],
        }


def on_a_gpu(root: Path, rounds: int) -> Iterator[dict[str, Any]]:
    models = family(root, "llama-8b-shapes", EIGHT_BILLION, 4)
    options = ("--method", "iso-c", "--device", "cuda", "--max-vram", "8GiB")
    runs = [merged(models, root / "out", *options) for _ in range(rounds)]
    best = min(runs, key=lambda run: run["seconds"])
    yield {
        "row": "gpu",
        "seconds": statistics.median(run["seconds"] for run in runs),
        "device": best["report"]["device"],
        "peak_vram_bytes": max(run["report"]["io"]["peak_vram_bytes"] for run in runs),
        "ceiling_bytes": 8192 * MIB,
        **{f"share_{key}": value for key, value in shares(best["report"]).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for checkpoints and outputs; a temporary one when left out")
    parser.add_argument("--rows", default="floor")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = given.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        for name in given.rows.split(","):
            makers = {"floor": against_the_floor, "embedding": of_one_embedding, "gpu": on_a_gpu}
            for row in makers[name](root, given.rounds):
                rows.append(row)
                for key, value in row.items():
                    print(f"{key:30} {value:.4g}" if isinstance(value, float) else f"{key:30} {value}", flush=True)
    if given.out:
        device = torch.device("cuda" if "gpu" in given.rows else "cpu")
        result = {"device": device_name(device), "cores": os.cpu_count(), "torch": torch.__version__, "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
