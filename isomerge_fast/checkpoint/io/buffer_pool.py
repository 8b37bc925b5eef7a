"""Hold memory for what streams through: taken and given back in any order, and never from the heap.

Buffers of many sizes that come and go leave holes in the heap: 70 to 100 MB of them in a merge of the 162 M parameter
test model, on top of 160 MB that were in use; and fresh memory costs a page fault every 4 KiB.
"""

from __future__ import annotations

import mmap
from bisect import bisect

import torch
from torch import Tensor

from .direct_io import page_ceiling


class BufferPool:
    """Lend parts of ``size`` bytes, each on whole pages; bytes that were never used take no memory.

    A part is taken from the smallest gap in which it fits. ``pinned`` memory is page-locked, for asynchronous copies to
    a GPU.
    """

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        self.size = page_ceiling(max(1, size))
        self._pinned = pinned
        self._memory: Tensor | None = None
        self._gaps: list[tuple[int, int]] = [(0, self.size)]  # start and end of each, in the order of their places

    def take(self, size: int) -> Tensor | None:
        """Return ``size`` bytes, or None where there is no gap for them at this moment."""
        wanted = page_ceiling(max(1, size))
        gaps = [(stop - start, index) for index, (start, stop) in enumerate(self._gaps) if stop - start >= wanted]
        if not gaps:
            return None
        if self._memory is None:
            self._memory = self._allocate()
        room, index = min(gaps)
        start, stop = self._gaps[index]
        self._gaps[index : index + 1] = [(start + wanted, stop)] if room > wanted else []
        return self._memory[start : start + size]

    def give_back(self, part: Tensor) -> None:
        """Give back a part that was taken."""
        start = int(part.storage_offset())
        stop = start + page_ceiling(max(1, part.numel()))
        index = bisect(self._gaps, (start, stop))
        first, last = index, index
        if index and self._gaps[index - 1][1] == start:
            first, start = index - 1, self._gaps[index - 1][0]
        if index < len(self._gaps) and self._gaps[index][0] == stop:
            last, stop = index + 1, self._gaps[index][1]
        self._gaps[first:last] = [(start, stop)]

    def release(self) -> None:
        """Give the memory back to the system, while nothing is taken; the next ``take`` allocates it again."""
        assert self._gaps == [(0, self.size)]
        self._memory = None

    def _allocate(self) -> Tensor:
        if self._pinned:
            return torch.empty(self.size, dtype=torch.uint8, device="cpu", pin_memory=True)
        memory = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)
