"""Iso-C and Iso-CTS on real shapes, and the published algorithm beside them."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.rows import Rows
from benchmarks.gpu.shapes import LLAMA, SMALL, TASKS, VIT, named
from isomerge_fast.bench import published
from isomerge_fast.bench.ceilings import median_seconds, synchronise, timed
from isomerge_fast.bench.problems import deltas_like_fine_tuning, relative_error
from isomerge_fast.methods import TensorDeltas, make_method
from isomerge_kernels import devices

NAMES = ("iso-c", "iso-cts")
# Where the published algorithm runs in full; elsewhere one SVD is timed and multiplied.
FULL = (*VIT, (1024, 4096), (4096, 4096))
PROFILED_OPERATIONS = 20
# Of a vision transformer's matrices of one shape.
BATCH = 48
BLOCK_ELEMENTS = (1 << 22, 1 << 28)


def methods(rows: Rows) -> None:
    """Our methods: Llama's shapes first, then a vision transformer's, one by one and as a batch."""
    device = torch.device(rows.device)
    llama, vit = (SMALL[:1], SMALL[1:]) if rows.small else (LLAMA, VIT)
    for shape in (*llama, *vit):
        deltas = deltas_like_fine_tuning(*shape, TASKS, "decay", device=device)
        for name in NAMES:
            rows.attempt(f"{name} {named(shape)}", lambda name=name, deltas=deltas: _merged(name, deltas))
            if shape == llama[0]:
                rows.attempt(f"{name} {named(shape)}, fast", lambda n=name, d=deltas: _merged(n, d, "fast"))
    for shape in (llama[0], vit[0], *llama[2:3]):
        deltas = deltas_like_fine_tuning(*shape, TASKS, "decay", device=device)
        for name in NAMES:
            rows.attempt(f"{name} {named(shape)}, profile", lambda name=name, deltas=deltas: _profiled(name, deltas))
    stack = (3 if rows.small else BATCH, *vit[0])
    rows.attempt(
        f"iso-c {named(stack)}", lambda: _merged("iso-c", [torch.randn(stack, device=device) for _ in range(TASKS)])
    )
    deltas = deltas_like_fine_tuning(*(SMALL[1] if rows.small else (14336, 4096)), TASKS, "decay", device=device)
    for elements in BLOCK_ELEMENTS:
        label = f"{named(tuple(deltas[0].shape))}, blocks of 2^{elements.bit_length() - 1}"
        rows.attempt(f"iso-cts {label}", lambda elements=elements: _in_blocks(elements, deltas))


def _merged(name: str, deltas: list[Tensor], tier: str = "default") -> dict[str, Any]:
    device, source = deltas[0].device, TensorDeltas(deltas)
    call = partial(make_method(name, {"precision": tier}).merge, source)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    stats = call()[1]
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    found = {"seconds": median_seconds(call, device, budget_seconds=1.0, rounds=10), "certified": not stats.missed()}
    return found | {"algorithm": stats.algorithm, "escalations": len(stats.escalations), "peak_bytes": peak}


def _profiled(name: str, deltas: list[Tensor]) -> dict[str, Any]:
    """The operations that take longest: (name, calls, milliseconds on the device)."""
    device, method, source = deltas[0].device, make_method(name), TensorDeltas(deltas)
    method.merge(source)
    synchronise(device)
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
    return {"launches": launches, "waits": waits, "operations": top}


def _in_blocks(elements: int, deltas: list[Tensor]) -> dict[str, Any]:
    """Iso-CTS with other blocks than those of ``devices``, for that constant's sake."""
    before, devices.GPU_BLOCK_ELEMENTS = devices.GPU_BLOCK_ELEMENTS, elements
    try:
        return _merged("iso-cts", deltas)
    finally:
        devices.GPU_BLOCK_ELEMENTS = before


def published_algorithm(rows: Rows) -> None:
    """The published algorithm in float32 by two drivers of torch.linalg.svd, with the distance of our result from it.

    The faster driver first, on all shapes; then the other where it is run in full at all.
    """
    device = torch.device(rows.device)
    drivers = ("gesvd", None) if device.type == "cuda" else (None,)
    shapes = SMALL if rows.small else ((4096, 4096), (1024, 4096), *VIT, (14336, 4096), (4096, 14336))
    later: list[tuple[tuple[int, int], str | None, float]] = []
    torch.linalg.svd(torch.eye(64, device=device))  # its library is loaded
    for shape in shapes:
        deltas = deltas_like_fine_tuning(*shape, TASKS, "decay", device=device)
        total = torch.stack(deltas).sum(0)
        once: dict[str | None, float] = {}
        for driver in drivers:
            label = f"one SVD {named(shape)}, {driver or 'default'}"
            call = partial(torch.linalg.svd, total, full_matrices=False, driver=driver)
            found = rows.attempt(label, lambda call=call: {"seconds": timed(call, device)[1]})
            once[driver] = found.get("seconds", float("inf"))
        first, *rest = sorted(once, key=lambda driver: once[driver])
        _published(rows, shape, deltas, first, once[first], full=rows.small or shape in FULL)
        later += [(shape, driver, once[driver]) for driver in rest]
    for shape, driver, seconds in later:
        deltas = deltas_like_fine_tuning(*shape, TASKS, "decay", device=device) if shape in FULL else []
        _published(rows, shape, deltas, driver, seconds, full=shape in FULL)


def _published(
    rows: Rows, shape: tuple[int, int], deltas: list[Tensor], driver: str | None, once: float, *, full: bool
) -> None:
    """Rows of both methods by one driver: run where there is time for as many SVDs as it takes, else estimated."""
    for name, count in (("iso-c", 1), ("iso-cts", TASKS + 3)):
        label = f"{name} {named(shape)}, {driver or 'default'}"
        if not full or 1.3 * count * once > rows.seconds_left - 2.0:
            rows.note(label, seconds=count * once, estimated=f"{count} x one SVD")
            continue

        def compared(name: str = name) -> dict[str, Any]:
            ours = make_method(name).merge(TensorDeltas(deltas))[0].double()
            algorithm = getattr(published, name.replace("-", "_"))
            theirs, seconds = timed(lambda: algorithm(deltas, driver=driver), deltas[0].device)
            return {"seconds": seconds, "distance": relative_error(theirs.double(), ours)}

        rows.attempt(label, compared)


def cpu_threads(rows: Rows) -> None:
    """The same methods on this machine's CPU, by one thread and by more."""
    cpu = torch.device("cpu")
    available = len(os.sched_getaffinity(0))
    for shape in SMALL if rows.small else VIT:
        deltas = deltas_like_fine_tuning(*shape, TASKS, "decay")
        for name in NAMES:
            alone = float("nan")
            for threads in sorted({1, *(count for count in (4, 16) if count <= available)}):
                torch.set_num_threads(threads)
                call = partial(make_method(name).merge, TensorDeltas(deltas))

                def measured(threads: int = threads, call: Any = call, alone: float = alone) -> dict[str, Any]:
                    seconds = median_seconds(call, cpu, budget_seconds=0.5, rounds=5)
                    return {"threads": threads, "seconds": seconds, "speedup": alone / seconds}

                found = rows.attempt(f"{name} {named(shape)}, {threads} threads", measured)
                if threads == 1:
                    alone = found.get("seconds", alone)
