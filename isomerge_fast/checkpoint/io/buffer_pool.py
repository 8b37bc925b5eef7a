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
        self._taken: list[tuple[int, int]] = []  # start and end of each part, in the order of their places

    def take(self, size: int) -> Tensor | None:
        """Return ``size`` bytes, or None where there is no gap for them at this moment."""
        wanted = page_ceiling(max(1, size))
        ends = [0, *(end for _, end in self._taken)]
        starts = [*(start for start, _ in self._taken), self.size]
        gaps = [(stop - start, start) for start, stop in zip(ends, starts, strict=True) if stop - start >= wanted]
        if not gaps:
            return None
        if self._memory is None:
            self._memory = self._allocate()
        _, start = min(gaps)
        part = (start, start + wanted)
        self._taken.insert(bisect(self._taken, part), part)
        return self._memory[start : start + size]

    def give_back(self, part: Tensor) -> None:
        """Give back a part that was taken."""
        start = int(part.storage_offset())
        del self._taken[bisect(self._taken, (start, 0))]

    def release(self) -> None:
        """Give the memory back to the system, while nothing is taken; the next ``take`` allocates it again."""
        assert not self._taken
        self._memory = None

    def _allocate(self) -> Tensor:
        if self._pinned:
            return torch.empty(self.size, dtype=torch.uint8, device="cpu", pin_memory=True)
        memory = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)
