"""Time Iso-C and Iso-CTS on real shapes: on the GPU, and on the CPU beside it."""

from __future__ import annotations

import os
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.shapes import LLAMA, NAMES, SMALL, TASKS, VIT, Shape
from benchmarks.harness.counting import peak_memory
from benchmarks.harness.readings import Rows
from benchmarks.shapes import dimensions
from isomerge_fast.bench.ceilings import median_seconds, result_and_seconds, synchronise, timed
from isomerge_fast.bench.problems import Kind, deltas_like_fine_tuning
from isomerge_fast.methods import MemoryDeltas, make_method
from isomerge_kernels import devices

PROFILED_OPERATIONS = 20
# Of a vision transformer's matrices of one shape.
BATCH = 48
BLOCK_ELEMENTS = (1 << 22, 1 << 28)
# What a row of them takes at most: 7 s on an H200.
BLOCK_SECONDS = 12.0


def methods(rows: Rows) -> None:
    """Time our methods: Llama's shapes first, then a vision transformer's, one by one and as a batch."""
    device = torch.device(rows.device)
    llama, vit = (SMALL[:1], SMALL[1:]) if rows.small else (LLAMA, VIT)
    square, tall = (SMALL[0], SMALL[1]) if rows.small else (LLAMA[0], LLAMA[2])
    made: dict[tuple[Shape, Kind], list[Tensor]] = {}

    def deltas(shape: Shape, kind: Kind = "decay") -> list[Tensor]:
        if (shape, kind) not in made:
            made[shape, kind] = deltas_like_fine_tuning(*shape, TASKS, kind, device=device)
        return made[shape, kind]

    for shape in (*llama, *vit):
        for name in NAMES:
            rows.attempt(f"{name} {dimensions(shape)}", partial(_merged, name, deltas(shape)))
    for shape in (square, tall):
        for name in NAMES:
            rows.attempt(f"{name} {dimensions(shape)}, fast", partial(_merged, name, deltas(shape), "fast"))
            rows.attempt(f"{name} {dimensions(shape)}, noise", partial(_merged, name, deltas(shape, "noise")))
    for shape in dict.fromkeys((square, *vit, tall)):
        for name in NAMES:
            rows.attempt(f"{name} {dimensions(shape)}, profile", partial(_profiled, name, deltas(shape)))
    stack = (3 if rows.small else BATCH, *vit[0])
    batch = [torch.randn(stack, device=device) for _ in range(TASKS)]
    rows.attempt(f"iso-c {dimensions(stack)}", partial(_merged, "iso-c", batch))
    for elements in BLOCK_ELEMENTS:
        label = f"iso-cts {dimensions(tall)}, blocks of 2^{elements.bit_length() - 1}"
        if rows.seconds_left < BLOCK_SECONDS and not rows.small:
            rows.note(label, left_out="no time")
        else:
            rows.attempt(label, partial(_in_blocks, elements, deltas(tall)))


def _merged(name: str, deltas: list[Tensor], tier: str = "default") -> dict[str, Any]:
    device, call = deltas[0].device, partial(make_method(name, {"precision": tier}).merge, MemoryDeltas(deltas))
    with peak_memory(device) as peak:
        stats = call()[1]
    _, seconds = result_and_seconds(call, device, budget_seconds=1.0)
    found = {"seconds": seconds, "certified": not stats.missed(), "algorithm": stats.algorithm}
    return found | {"escalations": len(stats.escalations), "peak_bytes": peak.bytes}


def _profiled(name: str, deltas: list[Tensor]) -> dict[str, Any]:
    """Return the operations that take longest: (name, calls, milliseconds on the device).

    ``device_ms`` is all of them, ``busy`` that as a share of a call's time without the profiler; in the rest of it the
    device waits for the host.
    """
    device, method, source = deltas[0].device, make_method(name), MemoryDeltas(deltas)
    method.merge(source)
    _, seconds = timed(lambda: method.merge(source), device)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *((ProfilerActivity.CUDA,) if on_gpu else ())]
    with profile(activities=activities) as found:
        method.merge(source)
        synchronise(device)
    kind, key = ("CUDA", "self_device_time_total") if on_gpu else ("CPU", "self_cpu_time_total")
    averages = sorted(found.key_averages(), key=lambda entry: getattr(entry, key), reverse=True)
    own = [entry for entry in averages if entry.device_type.name == kind]  # not what launched them, too
    top = [(entry.key[:60], entry.count, getattr(entry, key) / 1e3) for entry in own[:PROFILED_OPERATIONS]]
    assert top or not on_gpu, "the profiler saw nothing of the GPU"
    launches = sum(entry.count for entry in averages if "LaunchKernel" in entry.key)
    waits = sum(entry.count for entry in averages if "Synchronize" in entry.key)
    device_ms = sum(getattr(entry, key) for entry in own) / 1e3
    counted = {"launches": launches, "waits": waits, "device_ms": device_ms, "busy": device_ms / 1e3 / seconds}
    return counted | {"operations": top}


def _in_blocks(elements: int, deltas: list[Tensor]) -> dict[str, Any]:
    """Time Iso-CTS with ``GPU_BLOCK_ELEMENTS`` set to ``elements``, to choose that constant by."""
    with mock.patch.object(devices, "GPU_BLOCK_ELEMENTS", elements):
        return _merged("iso-cts", deltas)


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
