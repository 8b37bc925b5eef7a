"""Time merges too large for ``make bench``, against what the disk and the arithmetic alone take.

    python -m benchmarks.streaming [--folder DIR] [--rows floor,…] [--small] [--out JSON]

``floor``     the mean of 2 experts of 2 B parameters in bf16 under 1 GiB (12 GB in, 4 GB out), in turn with reading
              those bytes and writing those bytes, and with the arithmetic alone. The inputs are put out of the page
              cache before each reading. Every figure is the median over three rounds.
``embedding`` Iso-C and Iso-CTS of one 128256 x 8192 matrix, 2 experts in bf16 under 4 GiB (5 minutes on 2 cores for
              Iso-C, several times that for Iso-CTS).

Needs 20 GB in --folder for ``floor``.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import scripts
from benchmarks.harness.checkpoints import family, weights
from benchmarks.harness.processes import merged
from benchmarks.shapes import llama
from isomerge_fast import ops
from isomerge_fast.bench.ceilings import forget, read_all, write_all
from isomerge_fast.execution.threads import ComputeThreads
from isomerge_fast.methods import RowBlock

ROUNDS = 3


def arithmetic(elements: int, tasks: int) -> float:
    """Return the seconds of a mean's passes over so many elements in memory, shared out as the engine does."""
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


def against_the_floor(root: Path, small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compare a mean to the larger of the disk's time and the arithmetic's."""
    shapes = llama(64, 160, 2, 512) if small else llama(2560, 10_240, 18, 32_000)  # 2.05 B
    models = family(root, "llama", shapes, 2)
    files = [file for model in models for file in weights(model)]
    sizes = [file.stat().st_size for file in weights(models[0])]
    seen: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        reading = min(read_all(files, direct=direct) for direct in (True, False))
        writing = min(write_all(root, sizes, direct=direct) for direct in (True, False))
        computing = arithmetic(sum(map(prod, shapes.values())), 2)
        forget(files)
        found = merged(models, root / "out", "--method", "mean", "--max-ram", "1GiB")
        spent = found["report"]["seconds"]
        seen.append({"seconds": found["seconds"], "peak_bytes": found["peak_bytes"]})
        seen[-1] |= {"reading_seconds": reading, "writing_seconds": writing, "computing_seconds": computing}
        seen[-1] |= {"ratio": found["seconds"] / max(reading + writing, computing)}
        seen[-1] |= {f"share_{key}": spent[key] / spent["total"] for key in ("read", "compute", "write")}
    medians = {key: statistics.median(entry[key] for entry in seen) for key in seen[0]}
    moved = {"read_bytes": sum(file.stat().st_size for file in files), "write_bytes": sum(sizes)}
    yield "mean", {**moved, "ceiling_bytes": 1 << 30, **medians}
    shutil.rmtree(root / "out", ignore_errors=True)


def of_one_embedding(root: Path, small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Merge a matrix whose sum does not fit into the memory."""
    models = family(root, "embedding", {"model.embed_tokens.weight": (512, 64) if small else (128_256, 8192)}, 2)
    for method in ("iso-c", "iso-cts"):
        found = merged(models, root / "out", "--method", method, "--max-ram", "4GiB")
        (entry,) = found["report"]["tensors"]
        values = {key: found[key] for key in ("seconds", "peak_bytes")}
        yield method, values | {key: entry[key] for key in ("route", "algorithm", "certified")}


STAGES: dict[str, scripts.Stage] = {"floor": against_the_floor, "embedding": of_one_embedding}

if __name__ == "__main__":
    scripts.run(STAGES, scripts.parser(__doc__, STAGES, "floor").parse_args())
