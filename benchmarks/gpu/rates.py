"""Measure what the device can do at most, and which share of that the kernels reach in every configuration."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.gpu.shapes import TASKS
from benchmarks.harness.readings import Rows
from benchmarks.shapes import dimensions
from isomerge_fast.bench.ceilings import copy_rate, float32_matmul, matmul_rate, median_seconds, transfer_rates
from isomerge_fast.bench.problems import relative_error
from isomerge_kernels import apply_delta, symmetric_matmul, task_sum
from isomerge_kernels._launch import TRITON_DTYPES
from isomerge_kernels.devices import traits_of

# To a pass over bytes 4096 x 14336 is 14336 x 4096.
BANDWIDTH_SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096))
# Inputs are rotated until so many bytes lie between two uses of one: no cache holds them.
ROTATED_BYTES = 1 << 28
# Calls that are queued while the device copies; of what it has not begun, some thousand launches are queued at most.
QUEUED_CALLS, MAX_COPIES, COPIED_BYTES = 40, 400, 1 << 30
# Rows and columns of a product whose entries are compared with exact ones.
JUDGED_ROWS = 64


def ceilings(rows: Rows) -> None:
    """Measure the copy, the transfers, and products by the vendor's library."""
    device = torch.device(rows.device)
    _copy(rows)
    if device.type == "cuda":
        rows.attempt("transfers", lambda: {key: rate / 1e9 for key, rate in transfer_rates(device).items()})
    for side in (128,) if rows.small else (4096, 8192):
        dtypes = {"fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
        for name, dtype in dtypes.items():
            rate = partial(matmul_rate, device, side, dtype, "tf32" if name == "tf32" else "ieee")
            rows.attempt(f"matmul {side} {name}", lambda rate=rate: {"tflop_per_s": rate() / 1e12})


def _copy(rows: Rows) -> float:
    """Add the row of the copy; return its GB/s."""
    size = 1 << 22 if rows.small else 1 << 30
    found = rows.attempt("copy", lambda: {"gb_per_s": copy_rate(torch.device(rows.device), size) / 1e9})
    return found.get("gb_per_s", float("nan"))


def bandwidths(rows: Rows) -> None:
    """Measure task_sum and apply_delta as shares of the copy."""
    device = torch.device(rows.device)
    ceiling = _copy(rows)
    copies: dict[int, float] = {}  # seconds, by bytes: what begins and ends cost a small matrix, they cost its copy

    def rated(form: str, shape: tuple[int, int], size: int, calls: list[Any], config: Any) -> None:
        def measured() -> dict[str, Any]:
            turns = itertools.cycle(calls)
            host = median_seconds(lambda: next(turns)(), device, budget_seconds=0.05)
            seconds = device_seconds(calls, device)
            found = {"seconds": seconds, "host_seconds": host, "gb_per_s": size / seconds / 1e9}
            return found | {"of_copy": size / seconds / 1e9 / ceiling, "of_copy_as_large": copies[size] / seconds}

        if size not in copies:
            as_large = rows.attempt(f"copy, {size} bytes", lambda: {"seconds": _copy_seconds(size, device)})
            copies[size] = as_large.get("seconds", float("nan"))
        rows.attempt(f"{form}, {dimensions(shape)}, {'/'.join(map(str, config))}", measured)

    for shape in ((32, 64),) if rows.small else BANDWIDTH_SHAPES:
        elements = shape[0] * shape[1]
        for dtype, total in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.float64), (torch.float32,) * 2):
            size = elements * ((TASKS + 1) * dtype.itemsize + total.itemsize)
            inputs = [
                [torch.randn(shape, device=device).to(dtype) for _ in range(TASKS + 1)]
                for _ in range(1 + min(8, ROTATED_BYTES // size))
            ]
            out = torch.empty(shape, dtype=total, device=device)
            for config in task_sum.CONFIGS[torch.float32]:
                calls = [partial(task_sum.task_sum, x[1:], x[0], [1.0] * TASKS, out, config=config) for x in inputs]
                rated(f"task_sum {TRITON_DTYPES[dtype]} to {TRITON_DTYPES[total]}", shape, size, calls, config)
            del inputs, out
        for scalings, seed in (([1.0], None), ([0.8, 1.0, 1.3], None), ([1.0], 7)):
            size = elements * (2 + 4 + 2 * len(scalings))
            pairs = [
                (torch.randn(shape, device=device).bfloat16(), torch.randn(shape, device=device))
                for _ in range(1 + min(8, ROTATED_BYTES // size))
            ]
            kind = f"{len(scalings)} outputs" if seed is None else "stochastic"
            for config in apply_delta.CONFIGS:
                options = {"scalings": scalings, "dtype": torch.bfloat16, "seed": seed, "config": config}
                calls = [partial(apply_delta.apply_delta, *pair, **options) for pair in pairs]
                rated(f"apply_delta {kind}", shape, size, calls, config)
            del pairs


def device_seconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Return the median seconds of a call on the device itself, of calls in turn; on a CPU those of every call.

    A small kernel has ended before the host has queued the next, so that events around plain calls show the host. Here
    a GPU copies until all of a batch are queued; RuntimeError is raised where no number of copies lasts so long.
    """
    turns = itertools.cycle(calls)
    if device.type != "cuda":
        return median_seconds(lambda: next(turns)(), device, budget_seconds=0.05)
    for _ in range(2):  # which compile and warm up
        next(turns)()
    copy = _copying(device)
    copies, times = 8, []
    while len(times) < 5:
        with torch.cuda.device(device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(copies):
                copy()
            first.record()
            for _ in range(QUEUED_CALLS):
                next(turns)()
            last.record()
            was_ahead = not first.query()
            last.synchronize()
        if was_ahead:
            times.append(first.elapsed_time(last) / 1e3 / QUEUED_CALLS)
        elif copies >= MAX_COPIES:
            raise RuntimeError(f"the host queued {QUEUED_CALLS} calls in more time than {copies} copies take")
        else:
            copies *= 2
    return statistics.median(times)


def _copying(device: torch.device) -> Callable[[], Any]:
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def _copy_seconds(size: int, device: torch.device) -> float:
    """Return the seconds of a copy that reads and writes ``size`` bytes in all, rotated past the cache."""
    source = torch.empty(1 + min(8, ROTATED_BYTES // size), size // 2, dtype=torch.uint8, device=device)
    pairs = zip(torch.empty_like(source), source, strict=True)
    return device_seconds([partial(into.copy_, out_of) for into, out_of in pairs], device)


def products(rows: Rows) -> None:
    """Time symmetric_matmul in every configuration, that in use first, beside torch.matmul, with both errors."""
    device = torch.device(rows.device)
    for side in (128,) if rows.small else (4096, 1280, 2048, 1024, 3072, 8192):
        for key, configs in symmetric_matmul.CONFIGS.items():
            dtype = {"fp64": torch.float64, "half": torch.bfloat16}.get(key, torch.float32)
            if device.type == "cpu" and dtype == torch.bfloat16:  # which the interpreter multiplies wrongly
                continue
            a = torch.randn(side, side, device=device).to(dtype)
            precision = key if dtype == torch.float32 and device.type == "cuda" else "ieee"
            used = symmetric_matmul.default_config(key, traits_of(device).capability, side * side)
            configs = (used, *(config for config in configs if config != used))
            _beside_torch(rows, key, configs, lambda a=a: a @ a.mT, _judged_product(a, a.mT), (a,), precision=precision)
            if key == "fp64" and side <= 4096:  # the product of two polynomials that a polar iteration adds to a third
                x = a / side**0.5
                gram = x @ x.mT
                gram += gram.mT.clone()
                exact = _judged_product(gram, gram) + gram[:: _step(gram), :: _step(gram)]
                theirs = partial(torch.addmm, gram, gram, gram)
                _beside_torch(rows, "fp64 A B + C", configs[:1], theirs, exact, (gram, gram), c=gram)


def _beside_torch(
    rows: Rows,
    key: str,
    configs: Sequence[symmetric_matmul.TileConfig],
    theirs: Callable[[], Tensor],
    exact: Tensor,
    factors: Sequence[Tensor],
    **options: Any,
) -> None:
    with float32_matmul("ieee"):
        their_seconds = median_seconds(theirs, exact.device, budget_seconds=0.1)
        their_error = _error(theirs(), exact)

    def measured(call: Callable[[], Tensor]) -> dict[str, Any]:
        value = call()
        error, side = _error(value, exact), len(value)
        seconds = median_seconds(call, exact.device, budget_seconds=0.1)
        return {
            "seconds": seconds,
            "torch_seconds": their_seconds,
            "ratio": their_seconds / seconds,
            "tflop_per_s": 2 * side**3 / seconds / 1e12,  # of the whole product, as torch's
            "error": error,
            "torch_error": their_error,
        }

    for config in configs:
        call = partial(symmetric_matmul.symmetric_matmul, *factors, config=config, **options)
        tile = f"{config.block}x{config.block_k}/{config.num_warps}/{config.num_stages}"
        name = f"{key}, {len(factors[0])}, {tile}"
        rows.attempt(name, partial(measured, call))


def _judged_product(a: Tensor, b: Tensor) -> Tensor:
    """Return every n-th row and column of A B, to judge by: float64, or numpy's long double for float64 inputs."""
    left, right = a[:: _step(a)].double(), b[:, :: _step(a)].double()
    if a.dtype != torch.float64:
        return left @ right
    wide = left.cpu().numpy().astype(numpy.longdouble) @ right.cpu().numpy().astype(numpy.longdouble)
    return torch.from_numpy(wide.astype(numpy.float64)).to(a.device)


def _error(value: Tensor, exact: Tensor) -> float:
    return relative_error(value[:: _step(value), :: _step(value)], exact)


def _step(matrix: Tensor) -> int:
    return max(1, len(matrix) // JUDGED_ROWS)
