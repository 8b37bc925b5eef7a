"""Medians, and what this very device can do at most: the figures that all others are shares of."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..checkpoint.io.direct_io import READ_BYTES, open_direct, page_buffer
from ..errors import ConfigError, ResourceError

# A disk is measured with files of the first size, and where five of the second take no longer than so, with those.
SMALL_FILE_BYTES, LARGE_FILE_BYTES, DISK_SECONDS = 1 << 26, 1 << 29, 8.0

# Calls that are timed as one on a GPU: as many as take so long, and not more than so many.
BATCH_SECONDS, MAX_CALLS = 2e-3, 1000

Result = TypeVar("Result")


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


def machine(device: torch.device) -> dict[str, Any]:
    """What figures have to be given with: the device, the threads and the release of torch."""
    return {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}


def timed(function: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """(the result, wall seconds) of one call, the device idle before and after."""
    synchronise(device)
    start = time.perf_counter()
    result = function()
    synchronise(device)
    return result, time.perf_counter() - start


def median_seconds(
    function: Callable[[], Any], device: torch.device, *, budget_seconds: float = 1.0, rounds: int = 30
) -> float:
    """Return the median seconds of one call, after two that compile and warm up.

    On a GPU by events around so many calls that a batch of them takes ``BATCH_SECONDS`` or more, and nothing waits in
    between: a wait a call costs as much as a small kernel; the second call alone where it takes a third of the budget
    or more. On a CPU the wall time of every call. Fewer rounds where ``budget_seconds`` are spent before.
    """
    function()
    once = _seconds_by_events if device.type == "cuda" else _seconds_by_clock
    second, calls = once(function, device, 1), 1
    if device.type == "cuda":
        if second > budget_seconds / 3:  # a few calls more would take longer than all of it
            return second
        calls = max(1, min(MAX_CALLS, math.ceil(BATCH_SECONDS / max(1e-7, once(function, device, 3)))))
    times: list[float] = []
    while len(times) < 3 or (len(times) < rounds and sum(times) * calls < budget_seconds):
        times.append(once(function, device, calls))
        if sum(times) * calls > 4 * budget_seconds:
            break
    return statistics.median(times)


def result_and_seconds(call: Callable[[], Result], device: torch.device, budget_seconds: float) -> tuple[Result, float]:
    """Return what a call gives and its seconds: of this very call where it takes all the budget, else the median."""
    result, seconds = timed(call, device)
    if seconds < budget_seconds:
        seconds = median_seconds(call, device, budget_seconds=budget_seconds, rounds=10)
    return result, seconds


def _seconds_by_clock(function: Callable[[], Any], device: torch.device, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _seconds_by_events(function: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Return the seconds a call by the GPU's own clock, and wait once."""
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


@dataclass(frozen=True)
class Ceilings:
    """What nothing on this device can be faster than: bytes a second of a copy, operations a second of a product."""

    copy_bytes_per_second: float
    float32_flops_per_second: float
    float64_flops_per_second: float

    def floor_seconds(self, moved_bytes: float, float32_flops: float, float64_flops: float) -> float:
        """The least time for so much: the bytes and the products can overlap, two products cannot."""
        products = float32_flops / self.float32_flops_per_second + float64_flops / self.float64_flops_per_second
        return max(moved_bytes / self.copy_bytes_per_second, products)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Three seconds or so: a copy beyond every cache, products of a side where libraries are at their best."""
    side, size_bytes = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 28)
    return Ceilings(
        copy_rate(device, size_bytes),
        matmul_rate(device, side, torch.float32),
        matmul_rate(device, side, torch.float64),
    )


def forget(files: Sequence[Path]) -> None:
    """Puts files out of the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_blocks(files: Sequence[Path], *, direct: bool) -> bool:
    """Reads files as ``dd bs=4M`` does; False where ``direct`` (past the page cache) is not to be had."""
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
    """Writes files ``0``, ``1``, … of these sizes, as ``dd bs=4M conv=fsync`` does; False as ``read_blocks``."""
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
    """Seconds for reading files once that are not in the page cache; infinite where ``direct`` is not to be had."""
    forget(files)
    started = time.perf_counter()
    done = read_blocks(files, direct=direct)
    return time.perf_counter() - started if done else float("inf")


def write_all(folder: Path, sizes: Sequence[int], *, direct: bool) -> float:
    """Seconds for writing new files of these sizes, which are removed again; infinite as ``read_all``."""
    page_buffer()[:READ_BYTES] = os.urandom(READ_BYTES)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        started = time.perf_counter()
        done = write_blocks(Path(temporary), sizes, direct=direct)
        return time.perf_counter() - started if done else float("inf")


def disk_rates(folder: Path, size_bytes: int = 1 << 29) -> tuple[float, float]:
    """(bytes a second read, bytes a second written and synced) of the disk under ``folder``, past the page cache where
    that is faster.
    """
    writing = min(write_all(folder, [size_bytes], direct=direct) for direct in (True, False))
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(READ_BYTES) * (size_bytes // READ_BYTES))
        file.flush()
        reading = min(read_all([Path(file.name)], direct=direct) for direct in (True, False))
    return size_bytes / reading, size_bytes / writing


@dataclass(frozen=True)
class Disk:
    """What the disk under ``folder`` gives: bytes a second read, and written and synced."""

    folder: str
    read_bytes_per_second: float
    write_bytes_per_second: float


def require_folder(folder: Path) -> None:
    """Raises ConfigError where there is no such folder to put files into."""
    if not folder.is_dir():
        raise ConfigError(f"folder {folder} is not there; --folder names one on the disk to be measured")


def measure_disk(folder: Path) -> Disk:
    """``disk_rates`` with files as large as a few seconds allow, since caches in the disk flatter small ones.

    Raises:
        ConfigError: no such folder.
        ResourceError: it cannot be written to, or is full.
    """
    require_folder(folder)
    try:
        rates = disk_rates(folder, SMALL_FILE_BYTES)
        if 5 * LARGE_FILE_BYTES / min(rates) < DISK_SECONDS:
            rates = disk_rates(folder, LARGE_FILE_BYTES)
    except OSError as error:
        raise ResourceError(f"{folder}: {error.strerror}; --folder names another one") from error
    return Disk(str(folder), *rates)
