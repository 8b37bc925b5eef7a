"""Compute passes over memory by threads of one core each, which share the parts of a block.

torch's own threads meet at a barrier after every operation, and wait there for whoever was not given a core. Beside the
threads that read and write, and beside other processes, that costs a multiple: parts of 4 M elements of a base and two
experts in bf16, summed and rounded, took 50 ns an element by torch's threads and 4.0 by these while two other processes
kept the 2 cores busy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from threading import Barrier
from typing import TypeVar

import torch

from ..methods import RowBlock
from ..methods.source import Threads
from ..planning.part_sizes import ROW_STEP

# What one thread is given at a time. Results do not depend on how many threads there are, as the parts do not.
PART_ELEMENTS = 1 << 18

Result = TypeVar("Result")


class ComputeThreads(Threads):
    """Share blocks out among ``count`` threads, or as many as torch computes with, in a ``with`` statement."""

    def __init__(self, count: int | None = None) -> None:
        self._count = torch.get_num_threads() if count is None else count
        self._pool = ThreadPoolExecutor(self._count, "isomerge-compute")

    def __enter__(self) -> ComputeThreads:
        before, together = torch.get_num_threads(), Barrier(self._count)

        def start() -> None:
            together.wait()  # so that every thread of the pool comes by here once
            torch.set_num_threads(1)
            torch.get_num_threads()  # a thread's first look at the setting takes that made last: let it be this one

        for future in [self._pool.submit(start) for _ in range(self._count)]:
            future.result()
        # The setting is a thread's own, but new threads start with the one made last.
        torch.set_num_threads(before)
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def parts(self, block: RowBlock) -> list[RowBlock]:
        """Return the block in parts for one thread each; on a GPU a block stays one."""
        if block.like.device.type != "cpu":
            return [block]
        return list(block.parts(max(1, PART_ELEMENTS // max(1, prod(block.like.shape[1:])) // ROW_STEP) * ROW_STEP))

    def map(self, action: Callable[[RowBlock], Result], parts: Sequence[RowBlock]) -> list[Result]:
        if len(parts) == 1:
            return super().map(action, parts)
        return list(self._pool.map(torch.no_grad()(action), parts))
