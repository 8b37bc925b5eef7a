"""Compute with threads of one core each: whole matrices, and the parts of blocks that passes over memory share.

torch's own threads meet at a barrier after every operation, and wait there for whoever was not given a core. Beside the
threads that read and write, and beside other processes, that costs a multiple: parts of 4 M elements of a base and two
experts in bf16, summed and rounded, took 50 ns an element by torch's threads and 4.0 by these while two other processes
kept the 2 cores busy.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from threading import Barrier, Condition, Semaphore, Thread, get_ident
from typing import TypeVar

import torch

from ..methods import RowBlock
from ..methods.source import Threads
from ..planning.part_sizes import ROW_STEP

# What one thread is given at a time. Results do not depend on how many threads there are, as the parts do not.
PART_ELEMENTS = 1 << 18

Result = TypeVar("Result")


class OneCore(Threads):
    """Compute the parts of a block one after the other in the calling thread: the same parts as several threads."""

    def parts(self, block: RowBlock) -> list[RowBlock]:
        """Return the block in parts for one thread each; on a GPU a block stays one."""
        if block.like.device.type != "cpu":
            return [block]
        return list(block.parts(max(1, PART_ELEMENTS // max(1, prod(block.like.shape[1:])) // ROW_STEP) * ROW_STEP))


class Abandoned(BaseException):
    """End a job that nobody waits for any more."""


class ComputeThreads(OneCore):
    """Run jobs, and share blocks out, among ``count`` threads, or as many as torch computes with; in a ``with``.

    Parts of a block go before jobs that wait, as somebody waits for them. After an error in the ``with`` jobs that wait
    are not begun, and those that run end at their next step in Python.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = torch.get_num_threads() if count is None else count
        self._parts: deque[Callable[[], None]] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._running: set[int] = set()  # threads that are in a job
        self._changed = Condition()  # guards all of these
        self._ended = False
        self._threads: list[Thread] = []

    def __enter__(self) -> ComputeThreads:
        before, together = torch.get_num_threads(), Barrier(self.count + 1)

        def begin() -> None:
            torch.set_num_threads(1)
            torch.get_num_threads()  # a thread's first look at the setting takes that made last: let it be this one
            together.wait()
            self._work()

        self._threads = [Thread(target=begin, name=f"isomerge-compute-{n}", daemon=True) for n in range(self.count)]
        for thread in self._threads:
            thread.start()
        together.wait()
        # The setting is a thread's own, but new threads start with the one made last.
        torch.set_num_threads(before)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._changed:
            self._ended = True
            if kind is not None:
                self._jobs.clear()
                for ident in self._running:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Abandoned))
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

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
                    if not failures:
                        results[index] = action(parts[index])
                except BaseException as error:
                    failures[index] = error
                finished.release()

        is_mine = get_ident() in self._running
        for _ in range(min(self.count, len(parts)) - is_mine):
            self._put(self._parts, compute)
        if is_mine:
            compute()
        for _ in parts:
            finished.acquire()
        if failures:
            raise failures[min(failures)]
        return [results[index] for index in range(len(parts))]

    def _put(self, queue: deque[Callable[[], None]], work: Callable[[], None]) -> None:
        with self._changed:
            queue.append(work)
            self._changed.notify()

    @torch.no_grad()
    def _work(self) -> None:
        with suppress(Abandoned):
            while True:
                with self._changed:
                    while not (self._parts or self._jobs or self._ended):
                        self._changed.wait()
                    if not (self._parts or self._jobs):
                        return
                    is_job = not self._parts
                    work = (self._jobs if is_job else self._parts).popleft()
                    if is_job:
                        self._running.add(get_ident())
                work()
                del work  # and with it what it holds
                if is_job:
                    with self._changed:
                        self._running.discard(get_ident())
