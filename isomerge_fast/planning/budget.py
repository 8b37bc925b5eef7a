"""How many bytes a merge may hold: read ahead, waiting to be written, and for the tensor that is being merged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

MIB = 1 << 20
# Read ahead at least this much where nothing forbids it, and at the very least: four parts of 2 MiB.
READ_AHEAD_BYTES, LEAST_READ_AHEAD_BYTES = 128 * MIB, 8 * MIB
PARTS_AHEAD = 4
# So much is page-locked for copies to a GPU, which takes 0.4 s a GiB beside an H200; torch rounds it up to a power of
# two. Parts are a quarter of it: each takes 3.5 ms of launches and of waiting for Python's lock there. At 32 MiB a part
# that was four fifths of a merge that only reads and writes.
PINNED_BYTES = 512 * MIB
# Without a ceiling tensors are resident whose copies take up to this share of the machine's memory.
RESIDENT_SHARE = 1 / 32


@dataclass(frozen=True)
class Budget:
    """Bytes of host memory for what is read ahead and for what waits to be written; and for a tensor being merged.

    ``work`` is the ceiling on the latter, on the device that computes; None where there is none. ``on_gpu`` are bytes
    of a GPU for the copies of the tensor that comes next; None on a CPU, which works on what is read ahead.
    """

    read_ahead: int
    work: int | None
    on_gpu: int | None = None

    @property
    def write_behind(self) -> int:
        return self.read_ahead // 4

    @property
    def part(self) -> int:
        """Bytes of one part, all copies together."""
        return self.read_ahead // PARTS_AHEAD

    @property
    def again(self) -> int:
        """Bytes read ahead in passes after the first: two parts."""
        return 2 * self.part

    @property
    def whole(self) -> int:
        """Bytes up to which all copies of a tensor are held at once, while the next ones are read."""
        return self.read_ahead // 2 if self.on_gpu is None else self.on_gpu

    @property
    def cut(self) -> int | None:
        """Bytes of the parts that copies are cut into on their way to a GPU; None on a CPU, where they stay whole."""
        return None if self.on_gpu is None else self.part

    @property
    def in_transfer(self) -> int:
        """On a GPU, bytes beside the work: the bundle that comes next, and outputs on their way to the host."""
        return self.whole + self.write_behind


def budgets(largest: int, *, host: int | None, vram: int | None, on_gpu: bool) -> Iterator[Budget]:
    """Budgets to be tried in turn: what is read ahead shrinks until the tensors fit beside it.

    Args:
        largest: bytes of all copies of the largest tensor that would be resident.
        host: ceiling in bytes for all that a merge holds on the host; on a CPU for the work as well.
        vram: ceiling in bytes for the work on a GPU.
    """
    ceiling = vram if on_gpu else host
    if ceiling is None:
        most = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * RESIDENT_SHARE)
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
