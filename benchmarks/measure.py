"""Medians, and what this very device can do at most: the figures that all others are shares of."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The device's public name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "CPU"


def median_seconds(
    function: Callable[[], Any], device: torch.device, *, budget_seconds: float = 1.0, rounds: int = 30
) -> float:
    """Median wall time of one call, the device idle before and after each; two calls first, to compile and to warm up.

    Fewer rounds where ``budget_seconds`` are spent before.
    """
    for _ in range(2):
        function()
    synchronise(device)
    times: list[float] = []
    while len(times) < 3 or (len(times) < rounds and sum(times) < budget_seconds):
        start = time.perf_counter()
        function()
        synchronise(device)
        times.append(time.perf_counter() - start)
        if sum(times) > 4 * budget_seconds:
            break
    return statistics.median(times)


@contextlib.contextmanager
def float32_matmul(precision: str) -> Iterator[None]:
    """``ieee`` or ``tf32`` products of float32 matrices by the vendor's library."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def copy_rate(device: torch.device, size_bytes: int = 1 << 30) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / median_seconds(lambda: target.copy_(source), device)


def transfer_rates(device: torch.device, size_bytes: int = 1 << 28) -> dict[str, float]:
    """Bytes a second between pinned host memory and the device, both ways."""
    there = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    here = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    return {
        "host_to_device": size_bytes / median_seconds(lambda: there.copy_(here, non_blocking=True), device),
        "device_to_host": size_bytes / median_seconds(lambda: here.copy_(there, non_blocking=True), device),
    }


def matmul_rate(device: torch.device, side: int, dtype: torch.dtype, precision: str = "ieee") -> float:
    """Operations a second of a square product by the vendor's library."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    with float32_matmul(precision):
        return 2 * side**3 / median_seconds(lambda: a @ b, device)
