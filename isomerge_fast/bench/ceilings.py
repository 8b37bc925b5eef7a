"""Time functions, and measure the ceilings of this device and its disk: all other figures are shares of these."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..checkpoint.io.direct_io import READ_BYTES, open_direct, open_on_disk, page_buffer
from ..errors import ConfigError, ResourceError

# A disk is measured with files of the small size; then, if five large ones take no longer than so, with large ones.
SMALL_FILE_BYTES, LARGE_FILE_BYTES, DISK_SECONDS = 1 << 26, 1 << 29, 8.0

# A GPU is timed over batches of calls that take at least so long together, and are at most so many.
BATCH_SECONDS, MAX_CALLS = 2e-3, 1000

Result = TypeVar("Result")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return the name under which the device is sold."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "CPU"


def machine(device: torch.device) -> dict[str, Any]:
    """Return what every figure depends on: the device, the threads and the release of torch."""
    return {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}


def installed(*distributions: str) -> str | None:
    """Return the version of the first distribution that is installed, None where none is."""
    for name in distributions:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None


def timed(function: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Return the result and the wall seconds of one call, the device idle before and after."""
    synchronise(device)
    start = time.perf_counter()
    result = function()
    synchronise(device)
    return result, time.perf_counter() - start


def median_seconds(
    function: Callable[[], Any], device: torch.device, *, budget_seconds: float = 1.0, rounds: int = 30
) -> float:
    """Return the median seconds of one call, after two that compile and warm up.

    A CPU is timed call by call. A GPU is timed by events around batches of ``BATCH_SECONDS`` or more, as a wait after
    every call would cost as much as a small kernel; if the second call takes a third of the budget, it alone counts.
    There are fewer rounds if ``budget_seconds`` are spent before.
    """

    def once(calls: int = 1) -> float:
        if device.type == "cuda":
            return _seconds_by_events(function, device, calls)
        return timed(function, device)[1]

    function()
    second, calls = once(), 1
    if device.type == "cuda":
        if second > budget_seconds / 3:  # a few calls more would take longer than all of it
            return second
        calls = max(1, min(MAX_CALLS, math.ceil(BATCH_SECONDS / max(1e-7, once(3)))))
    times: list[float] = []
    while len(times) < 3 or (len(times) < rounds and sum(times) * calls < budget_seconds):
        times.append(once(calls))
        if sum(times) * calls > 4 * budget_seconds:
            break
    return statistics.median(times)


def result_and_seconds(call: Callable[[], Result], device: torch.device, budget_seconds: float) -> tuple[Result, float]:
    """Return what a call gives and its seconds: of this very call where it takes all the budget, else the median."""
    result, seconds = timed(call, device)
    if seconds < budget_seconds:
        seconds = median_seconds(call, device, budget_seconds=budget_seconds, rounds=10)
    return result, seconds


def _seconds_by_events(function: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Return the seconds a call by the GPU's own clock, with one wait for all."""
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            function()
        last.record()
        last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


@contextlib.contextmanager
def float32_matmul(precision: str) -> Iterator[None]:
    """Let the vendor's library compute products of float32 matrices in ``ieee`` or ``tf32`` precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def copy_rate(device: torch.device, size_bytes: int = 1 << 30) -> float:
    """Return the bytes a second, read and written, of a copy on the device."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / median_seconds(lambda: target.copy_(source), device)


def transfer_rates(device: torch.device, size_bytes: int = 1 << 28) -> dict[str, float]:
    """Return the bytes a second between pinned host memory and the device, both ways."""
    there = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    here = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    return {
        "host_to_device": size_bytes / median_seconds(lambda: there.copy_(here, non_blocking=True), device),
        "device_to_host": size_bytes / median_seconds(lambda: here.copy_(there, non_blocking=True), device),
    }


def matmul_rate(device: torch.device, side: int, dtype: torch.dtype, precision: str = "ieee") -> float:
    """Return the operations a second of a square product by the vendor's library."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    with float32_matmul(precision):
        return 2 * side**3 / median_seconds(lambda: a @ b, device)


@dataclass(frozen=True)
class Ceilings:
    """Hold the most that this device can do: bytes a second of a copy, operations a second of a product."""

    copy_bytes_per_second: float
    float32_flops_per_second: float
    float64_flops_per_second: float

    def floor_seconds(self, moved_bytes: float, float32_flops: float, float64_flops: float) -> float:
        """Return the least time for so much work: bytes and products can overlap, two products cannot."""
        products = float32_flops / self.float32_flops_per_second + float64_flops / self.float64_flops_per_second
        return max(moved_bytes / self.copy_bytes_per_second, products)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure a copy beyond every cache, and products of a side that libraries like best: about three seconds."""
    side, size_bytes = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 28)
    return Ceilings(
        copy_rate(device, size_bytes),
        matmul_rate(device, side, torch.float32),
        matmul_rate(device, side, torch.float64),
    )


def forget(files: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        os.close(open_on_disk(file))


def read_blocks(files: Sequence[Path], *, direct: bool) -> bool:
    """Read files as ``dd bs=4M`` does; return False if ``direct`` reads, past the page cache, are not possible."""
    for file in files:
        descriptor = open_direct(file, os.O_RDONLY) if direct else os.open(file, os.O_RDONLY)
        if descriptor is None:
            return False
        pages = page_buffer()[:READ_BYTES]
        while os.readv(descriptor, [pages]):
            pass
        os.close(descriptor)
    return True


def write_blocks(folder: Path, sizes: Sequence[int], *, direct: bool) -> bool:
    """Write files ``0``, ``1``, … as ``dd bs=4M conv=fsync`` does; return False if ``direct`` is not possible."""
    pages = page_buffer()[:READ_BYTES]
    for index, size in enumerate(sizes):
        file = folder / str(index)
        file.touch()
        descriptor = open_direct(file, os.O_WRONLY) if direct else os.open(file, os.O_WRONLY)
        if descriptor is None:
            return False
        for _ in range(-(-size // READ_BYTES)):
            os.write(descriptor, pages)
        os.fsync(descriptor)
        os.close(descriptor)
    return True


def read_all(files: Sequence[Path], *, direct: bool) -> float:
    """Return the seconds for reading files from the disk; infinite if ``direct`` is not possible."""
    forget(files)
    started = time.perf_counter()
    done = read_blocks(files, direct=direct)
    return time.perf_counter() - started if done else float("inf")


def write_all(folder: Path, sizes: Sequence[int], *, direct: bool) -> float:
    """Return the seconds for writing files of these sizes, then removed; infinite if ``direct`` is not possible."""
    page_buffer()[:READ_BYTES] = os.urandom(READ_BYTES)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        started = time.perf_counter()
        done = write_blocks(Path(temporary), sizes, direct=direct)
        return time.perf_counter() - started if done else float("inf")


def disk_rates(folder: Path, size_bytes: int = 1 << 29) -> tuple[float, float]:
    """Return the bytes a second read, and written and synced, past the page cache where that is faster."""
    writing = min(write_all(folder, [size_bytes], direct=direct) for direct in (True, False))
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(READ_BYTES) * (size_bytes // READ_BYTES))
        file.flush()
        reading = min(read_all([Path(file.name)], direct=direct) for direct in (True, False))
    return size_bytes / reading, size_bytes / writing


def measure_disk(folder: Path) -> dict[str, Any]:
    """Measure ``disk_rates`` with files as large as a few seconds allow: caches in the disk flatter small ones."""
    if not folder.is_dir():
        raise ConfigError(f"folder {folder} is not there; --folder names one on the disk to be measured")
    try:
        rates = disk_rates(folder, SMALL_FILE_BYTES)
        if 5 * LARGE_FILE_BYTES / min(rates) < DISK_SECONDS:
            rates = disk_rates(folder, LARGE_FILE_BYTES)
    except OSError as error:
        raise ResourceError(f"{folder}: {error.strerror}; --folder names another one") from error
    reading, writing = rates
    return {"folder": str(folder), "read_bytes_per_second": reading, "write_bytes_per_second": writing}
