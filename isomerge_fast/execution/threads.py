"""Compute with threads of one core each: whole matrices, and the parts of blocks that passes over memory share.

torch's own threads meet at a barrier after every operation, and wait there for whoever was not given a core. Beside the
threads that read and write, and beside other processes, that costs a multiple: parts of 4 M elements of a base and two
experts in bf16, summed and rounded, took 50 ns an element by torch's threads and 4.0 by these while two other processes
kept the 2 cores busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from threading import Barrier, BrokenBarrierError, Condition, Semaphore, Thread, local
from typing import TypeVar

import torch

from ..errors import ResourceError
from ..methods import RowBlock
from ..methods.source import Threads
from ..planning.part_sizes import ROW_STEP

# What one thread is given at a time. Results do not depend on how many threads there are, as the parts do not.
PART_ELEMENTS = 1 << 18

Result = TypeVar("Result")


class Abandoned(BaseException):
    """End a job that nobody waits for any more."""


_thread = local()  # ``pool``: the ComputeThreads that the thread belongs to


def check_wanted() -> None:
    """Raise Abandoned in a job that nobody waits for any more: called at every step of a merge."""
    pool: ComputeThreads | None = getattr(_thread, "pool", None)
    if pool is not None and pool.failed:
        raise Abandoned


class OneCore(Threads):
    """Compute the parts of a block one after the other in the calling thread: the same parts as several threads."""

    def parts(self, block: RowBlock) -> list[RowBlock]:
        """Return the block in parts for one thread each; on a GPU a block stays one."""
        if block.like.device.type != "cpu":
            return [block]
        return list(block.parts(max(1, PART_ELEMENTS // max(1, prod(block.like.shape[1:])) // ROW_STEP) * ROW_STEP))

    def map(self, action: Callable[[RowBlock], Result], parts: Sequence[RowBlock]) -> list[Result]:
        results: list[Result] = []
        for part in parts:
            check_wanted()
            results.append(action(part))
        return results


class ComputeThreads(OneCore):
    """Run jobs, and share blocks out, among ``count`` threads, or as many as torch computes with; in a ``with``.

    Parts of a block go before jobs that wait, as somebody waits for them. After an error in the ``with`` jobs that wait
    are not begun, and those that run end where they come by ``check_wanted``.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = torch.get_num_threads() if count is None else count
        self.failed = False
        self._parts: deque[Callable[[], None]] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = Condition()  # guards these
        self._ended = False
        self._threads: list[Thread] = []

    def __enter__(self) -> ComputeThreads:
        before, together = torch.get_num_threads(), Barrier(self.count + 1)
        try:
            for number in range(self.count):
                thread = Thread(target=self._begin, args=(together,), name=f"isomerge-compute-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
            together.wait()
        except BaseException as error:
            together.abort()
            self._end(failed=True)
            if isinstance(error, RuntimeError):
                raise ResourceError(f"{self.count} threads cannot be started ({error})") from error
            raise
        finally:
            # The setting is a thread's own, but new threads start with the one made last.
            torch.set_num_threads(before)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._end(failed=kind is not None)
        torch.set_num_threads(torch.get_num_threads())  # for new threads, as above

    def start(self, job: Callable[[], None]) -> None:
        """Have ``job`` run in one of the threads. Its errors are its own to tell."""
        self._put(self._jobs, job)

    def map(self, action: Callable[[RowBlock], Result], parts: Sequence[RowBlock]) -> list[Result]:
        if len(parts) == 1:
            return super().map(action, parts)
        results: dict[int, Result] = {}
        failures: dict[int, BaseException] = {}
        indices, finished = iter(range(len(parts))), Semaphore(0)

        def compute() -> None:
            for index in indices:
                try:
                    if not (failures or self.failed):
                        results[index] = action(parts[index])
                except BaseException as error:
                    failures[index] = error
                finished.release()

        is_mine = getattr(_thread, "pool", None) is self
        for _ in range(min(self.count, len(parts)) - is_mine):
            self._put(self._parts, compute)
        if is_mine:
            compute()
        for _ in parts:
            finished.acquire()
        check_wanted()
        if failures:
            failure = failures[min(failures)]
            failures.clear()  # with all that their frames hold
            try:
                raise failure
            finally:
                del failure  # which would hold on to this frame, and be held by it
        return [results[index] for index in range(len(parts))]

    def _put(self, queue: deque[Callable[[], None]], work: Callable[[], None]) -> None:
        with self._changed:
            queue.append(work)
            self._changed.notify()

    def _end(self, *, failed: bool) -> None:
        with self._changed:
            self._ended, self.failed = True, failed
            if failed:
                self._jobs.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _begin(self, together: Barrier) -> None:
        _thread.pool = self
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread's first look at the setting takes that made last: let it be this one
        with suppress(BrokenBarrierError):
            together.wait()
            self._work()

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._parts or self._jobs or self._ended):
                    self._changed.wait()
                if not (self._parts or self._jobs):
                    return
                work = (self._parts or self._jobs).popleft()
            work()
            del work  # and with it what it holds
