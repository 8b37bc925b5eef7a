"""Time Iso-C and Iso-CTS on real shapes: on the GPU, and on the CPU beside it."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.profiles import profiled
from benchmarks.gpu.shapes import LLAMA, NAMES, SMALL, TASKS, VIT, Shape
from benchmarks.gpu.stacks import BUDGET_SECONDS, stacks
from benchmarks.harness.counting import peak_memory
from benchmarks.harness.readings import Rows
from benchmarks.shapes import dimensions
from isomerge_fast.bench.ceilings import median_seconds, result_and_seconds
from isomerge_fast.bench.problems import Kind, deltas_like_fine_tuning
from isomerge_fast.linalg.filtered import SpectralFilter
from isomerge_fast.linalg.protocol import Solver
from isomerge_fast.methods import MemoryDeltas, make_method

# Of a vision transformer's matrices of one shape.
BATCH = 48


def methods(rows: Rows) -> None:
    """Time our methods: Llama's shapes first, then a vision transformer's, one by one, in stacks and as a batch."""
    device = torch.device(rows.device)
    llama, vit = (SMALL[:1], SMALL[1:]) if rows.small else (LLAMA, VIT)
    square, tall = (SMALL[0], SMALL[1]) if rows.small else (LLAMA[0], LLAMA[2])
    made: dict[tuple[Shape, Kind], list[Tensor]] = {}

    def deltas(shape: Shape, kind: Kind = "decay") -> list[Tensor]:
        if (shape, kind) not in made:
            made[shape, kind] = deltas_like_fine_tuning(*shape, TASKS, kind, device=device)
        return made[shape, kind]

    alone: dict[tuple[str, Shape], float] = {}
    for shape in (*llama, *vit):
        for name in NAMES:
            found = rows.attempt(f"{name} {dimensions(shape)}", partial(_merged, name, deltas(shape)))
            alone |= {(name, shape): found["seconds"]} if found else {}
    stacks(rows, alone)
    for shape in dict.fromkeys((square, *vit, tall)):
        for name in NAMES:
            merge = partial(make_method(name).merge, MemoryDeltas(deltas(shape)))
            rows.attempt(f"{name} {dimensions(shape)}, profile", partial(profiled, merge, device))
    for shape in (square, tall):
        for name in NAMES:
            rows.attempt(f"{name} {dimensions(shape)}, fast", partial(_merged, name, deltas(shape), "fast"))
            rows.attempt(f"{name} {dimensions(shape)}, noise", partial(_merged, name, deltas(shape, "noise")))
    rows.attempt(
        f"iso-cts {dimensions(square)}, filter", partial(_merged, "iso-cts", deltas(square), solver=SpectralFilter())
    )
    batch_shape = (3 if rows.small else BATCH, *vit[0])
    batch = [torch.randn(batch_shape, device=device) for _ in range(TASKS)]
    rows.attempt(f"iso-c {dimensions(batch_shape)}", partial(_merged, "iso-c", batch))


def _merged(name: str, deltas: list[Tensor], tier: str = "default", solver: Solver | None = None) -> dict[str, Any]:
    method = make_method(name, {"precision": tier, "solver": solver})
    device, call = deltas[0].device, partial(method.merge, MemoryDeltas(deltas))
    with peak_memory(device) as peak:
        stats = call()[1]
    _, seconds = result_and_seconds(call, device, BUDGET_SECONDS)
    found = {"seconds": seconds, "certified": not stats.missed(), "algorithm": stats.algorithm}
    return found | {"escalations": len(stats.escalations), "peak_bytes": peak.bytes}


def _by_threads(threads: int, name: str, deltas: list[Tensor], alone: float | None) -> dict[str, Any]:
    torch.set_num_threads(threads)
    merge = partial(make_method(name).merge, MemoryDeltas(deltas))
    seconds = median_seconds(merge, deltas[0].device, budget_seconds=0.5, rounds=5)
    return {"threads": threads, "seconds": seconds, "speedup": (alone or seconds) / seconds}


def cpu_threads(rows: Rows) -> None:
    """Time the methods on this machine's CPU, by one thread and by more."""
    available = len(os.sched_getaffinity(0))
    for shape in SMALL if rows.small else VIT[:2]:
        deltas = deltas_like_fine_tuning(*shape, TASKS, "decay")
        for name in NAMES:
            alone: float | None = None
            for threads in sorted({1, *(count for count in (4, 16) if count <= available)}):
                timed_merge = partial(_by_threads, threads, name, deltas, alone)
                found = rows.attempt(f"{name} {dimensions(shape)}, {threads} threads", timed_merge)
                alone = alone or found.get("seconds")
