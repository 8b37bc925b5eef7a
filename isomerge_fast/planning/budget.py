"""Decide how many bytes a merge may hold: read ahead, waiting to be written, and for the tensor that is merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..checkpoint.io.direct_io import READ_BYTES
from ..checkpoint.io.read_ahead import THREADS as READ_THREADS
from ..machine import memory_bytes
from ..ops import traits_of

MIB = 1 << 20
# Read ahead at least this much where nothing forbids it, and at the very least: four parts of 2 MiB.
READ_AHEAD_BYTES, LEAST_READ_AHEAD_BYTES = 128 * MIB, 8 * MIB
PARTS_AHEAD = 4
# So much is page-locked for copies to a GPU, which takes 0.4 s a GiB beside an H200; torch rounds it up to a power of
# two. Parts are a quarter of it: each takes 3.5 ms of launches and of waiting for Python's lock there. At 32 MiB a part
# that was four fifths of a merge that only reads and writes.
PINNED_BYTES = 512 * MIB
# Without a ceiling tensors are resident whose copies take up to this share of the memory that the process may use.
RESIDENT_SHARE = 1 / 32
# Without a ceiling, tensors that are merged at once take up to this share together.
TOGETHER_SHARE = 1 / 2
# Resident memory of Python, torch and BLAS: 234 MB before the first tensor, about 350 MB after a merge with the heap
# trimmed (BLAS keeps buffers), of which the estimates of single tensors cover some. With 330 MB and
# ``SOLVER_BYTES`` the promise lies above the peaks seen of the 162 M parameter test model under 600 MiB by two threads:
# 494 MB above 382 to 418 by a mean or task arithmetic, 618 above 580 to 611 by Iso-CTS, the most beside busy processes.
BASELINE_BYTES = 330_000_000
# What BLAS and the heap keep of every thread that has computed a matrix, beside the first, which the baseline has. (3.6
# to 4.8 MB seen with 8 to 64 threads and matrices of 384 x 256.)
THREAD_BYTES = 5 << 20
# What BLAS packs blocks in, of every thread that solves an eigenproblem, beyond what the two above have of it: OpenBLAS
# 2 MB of sides of 768 and 7 of 3000, beside MKL for products.
SOLVER_BYTES = 10 << 20
# With the page-aligned buffers of the threads that read and write.
PROCESS_BYTES = BASELINE_BYTES + (READ_THREADS + 1) * READ_BYTES
# Of a GPU's memory, where no ceiling is given: the rest is for its context, for libraries' workspaces, and for what
# blocks of many sizes leave between them. (Not tried to the limit: merges under a ceiling of 8 GiB reserved 3.7 and 6.4
# GiB on an H200.)
GPU_MEMORY_SHARE = 0.85


@dataclass(frozen=True)
class Budget:
    """Hold the bytes for what is read ahead, for what waits to be written, and for a tensor that is merged."""

    read_ahead: int  # on the host
    work: int | None  # ceiling for a tensor that is merged, on the device that computes; None where there is none
    on_gpu: int | None = None  # for the copies of the tensor that comes next; None on a CPU, which needs no copies
    copies: int = 0  # beside ``read_ahead``, for the copies of tensors that are merged at once
    together: int = 0  # ceiling for the work of all tensors that are merged at once; on a GPU there is one
    solving: int = 0  # of every thread that computes, where there are matrices
    thread: int = THREAD_BYTES  # of every thread that computes beside the first

    @property
    def read_pool(self) -> int:
        """Return the bytes of all copies on the host: those read ahead, and those of tensors that are merged."""
        return self.read_ahead + self.copies

    @property
    def write_behind(self) -> int:
        return self.read_ahead // 4

    @property
    def part(self) -> int:
        """Return the bytes of one part, all copies together."""
        return self.read_ahead // PARTS_AHEAD

    @property
    def reread(self) -> int:
        """Return the bytes that are read ahead in passes after the first: two parts."""
        return 2 * self.part

    @property
    def resident(self) -> int:
        """Return the most bytes of base and experts of a tensor that are held at once (``Resident``)."""
        return self.read_ahead // 2 if self.on_gpu is None else self.on_gpu

    @property
    def gpu_part(self) -> int | None:
        """Return the bytes of a part on its way to a GPU; None on a CPU, where copies stay whole."""
        return None if self.on_gpu is None else self.part

    @property
    def in_transfer(self) -> int:
        """Return a GPU's bytes beside the work: the next tensor's copies, and outputs on their way to the host."""
        return self.resident + self.write_behind


def budgets_to_try(largest: int, *, host: int | None, vram: int | None, on_gpu: bool) -> Iterator[Budget]:
    """Yield budgets in the order in which they are tried: what is read ahead shrinks until the tensors fit beside it.

    ``largest`` is the bytes of all copies of the largest tensor that would be resident. ``host`` bounds all that is
    held on the host, on a CPU the work too; ``vram`` bounds the work on a GPU; both are bytes.
    """
    ceiling = vram if on_gpu else host
    if ceiling is None:
        most = int(memory_bytes() * RESIDENT_SHARE)
    else:
        most = ceiling // 4
    resident = min(largest, most)
    size = PINNED_BYTES if on_gpu else max(READ_AHEAD_BYTES, 3 * resident)
    if host is not None:
        size = min(size, host // 3)
    held = max(size // 2, resident) if on_gpu else None
    least = LEAST_READ_AHEAD_BYTES
    while True:
        size = max(least, size)
        held = None if held is None else max(least // 2, held)
        budget = Budget(size, None, held)
        beside = budget.in_transfer if on_gpu else budget.read_ahead + budget.write_behind
        yield budget if ceiling is None else replace(budget, work=max(0, ceiling - beside))
        if size == least and held in (None, least // 2):
            return
        size //= 2
        held = None if held is None else held // 2


def usable_memory_bytes(device: torch.device) -> int:
    """Return what a merge without a ceiling may take of a GPU: a share of all of its memory.

    Not of what is free: the same merge on the same kind of GPU is to give the same bytes.
    """
    return int(GPU_MEMORY_SHARE * traits_of(device).memory_bytes)
