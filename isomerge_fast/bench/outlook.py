"""Predict the time of a merge over Ray (``plan --ray``), from its plan and the rates of one worker."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from ..checkpoint.io.direct_io import READ_BYTES, open_direct, page_buffer
from ..ops import torch_threads
from ..planning.cost import Rates, TensorCost, cost_of, divide, least_seconds
from ..planning.plan import Plan
from .ceilings import matmul_rate

# Of the inputs, this much is read, or what comes in so many seconds.
SAMPLE_BYTES, SAMPLE_SECONDS = 1 << 30, 2.0
WORKERS = (1, 2, 4, 8, 16, 32, 64)


def predict(plan: Plan, rates: Rates, workers: Collection[int]) -> dict[str, Any]:
    """Return the rates, and for every number of workers a row with the least time and the wall (``least_seconds``).

    Where the storage has no limit, a row has a second one, ``shared``: of storage that gives all workers together no
    more than one of them can move.
    """
    has_limit = math.isfinite(rates.storage_bytes_per_second)
    shared = replace(rates, storage_bytes_per_second=rates.read_bytes_per_second)
    total = cost_of(plan.tensors)
    rows = []
    for count in sorted(set(workers)):
        items = [cost_of(item) for item in divide(plan, count, rates)]
        row = _row(items, total, count, rates)
        rows.append(row if has_limit else {**row, "shared": _row(items, total, count, shared)})
    limit = rates.storage_bytes_per_second if has_limit else None
    return {"rates": {**asdict(rates), "storage_bytes_per_second": limit}, "rows": rows}


def _row(items: Sequence[TensorCost], total: TensorCost, workers: int, rates: Rates) -> dict[str, Any]:
    seconds, wall = least_seconds(items, workers, rates)
    speedup = least_seconds([total], 1, rates)[0] / seconds if seconds else 1.0
    return {"workers": workers, "seconds": seconds, "speedup": speedup, "wall": wall, "units": len(items)}


def measure_rates(
    plan: Plan,
    device: torch.device,
    threads: int,
    *,
    flops: float | None = None,
    worker_bytes: float | None = None,
    storage_bytes: float | None = None,
) -> Rates:
    """Return the rates of one worker with ``threads`` CPU threads: measured where they are not given.

    ``flops`` are operations a second: float32 products are timed when None. ``worker_bytes`` are read, or written, a
    second by one worker: the inputs are read when None, and writing is taken to be as fast; nothing is written.
    ``storage_bytes`` are those of all workers together, without a limit when None.
    """
    if flops is None:
        with torch_threads(threads):
            flops = matmul_rate(device, 8192 if device.type == "cuda" else 1536, torch.float32)
    each = read_rate(plan) if worker_bytes is None else worker_bytes
    return Rates(flops, each, each, math.inf if storage_bytes is None else storage_bytes)


def read_rate(plan: Plan) -> float:
    """Measure the bytes a second from the files that are to be read, past the page cache where the file system can."""
    started, count = time.perf_counter(), 0
    for size in _read_all(plan):
        count += size
        if count >= SAMPLE_BYTES or time.perf_counter() - started > SAMPLE_SECONDS:
            break
    return count / (time.perf_counter() - started)


def _read_all(plan: Plan) -> Iterator[int]:
    """Read whole files, one after the other, and yield the bytes of every block."""
    pages = page_buffer()[:READ_BYTES]
    for path in dict.fromkeys(stored.file for tensor in plan.tensors for stored in tensor.inputs):
        descriptor = open_direct(path, os.O_RDONLY)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while count := os.readv(descriptor, [pages]):
                yield count
        finally:
            os.close(descriptor)
