"""Run the merges of several tensors at once, as far as cores and memory go, with the errors of one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition

import torch

from .threads import ComputeThreads

# How often the thread that waits looks for changes to tell the observer of.
TELL_SECONDS = 0.05


@dataclass(frozen=True)
class Demand:
    """Hold what a tensor's merge takes: cores, and bytes of ``Budget.together``."""

    cores: int
    work_bytes: int


class Jobs:
    """Start jobs in the threads of ``threads``, each when there are cores and memory for it, in the order of numbers.

    One thread starts them all, and ``tell`` is called in it while it waits. Where a job fails none is started any more,
    those before it come to their end, and the error of the first that failed is raised.
    """

    def __init__(self, threads: ComputeThreads, together_bytes: int, tell: Callable[[], None]) -> None:
        self._threads, self._tell = threads, tell
        self._free_cores, self.free_bytes = threads.count, together_bytes
        self._running: set[int] = set()
        self._failures: dict[int, BaseException] = {}
        self._changed = Condition()  # guards all of these

    def wait_for_room(self, demand: Demand) -> None:
        """Wait until what runs leaves so many cores and bytes; a job alone is let in whatever it takes."""
        self.wait_until(
            lambda: not self._running or (demand.cores <= self._free_cores and demand.work_bytes <= self.free_bytes)
        )

    def start(self, number: int, demand: Demand, job: Callable[[], None]) -> None:
        """Run a job for which there is room, in a thread that computes with its cores."""
        with self._changed:
            self._running.add(number)
            self._take(demand.cores, demand.work_bytes)

        def run() -> None:
            failure: BaseException | None = None
            if demand.cores > 1:
                torch.set_num_threads(demand.cores)
            try:
                job()
            except BaseException as error:
                failure = error
            if demand.cores > 1:
                torch.set_num_threads(1)
            with self._changed:
                self._running.remove(number)
                self._take(-demand.cores, -demand.work_bytes)
                if failure is not None:
                    self._failures[number] = failure
                self._changed.notify_all()
            failure = None  # a frame that its own traceback holds on to would keep all that the job held

        self._threads.start(run)

    def _take(self, cores: int, work_bytes: int) -> None:
        self._free_cores -= cores
        self.free_bytes -= work_bytes

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait for a change in what runs; raise the first error of those that have failed."""
        while True:
            self._tell()
            with self._changed:
                self._raise_first()
                if is_so():
                    return
                self._changed.wait(TELL_SECONDS)

    def changed(self) -> None:
        """Have ``wait_until`` look again."""
        with self._changed:
            self._changed.notify_all()

    def end(self) -> None:
        """Wait until all have come to their end; raise the first error."""
        self.wait_until(lambda: not self._running)

    def _raise_first(self) -> None:
        if not self._failures:
            return
        while any(number < min(self._failures) for number in self._running):
            self._changed.wait()
        failure = self._failures.pop(min(self._failures))
        self._failures.clear()  # with all that their frames hold
        try:
            raise failure
        finally:
            del failure  # which would hold on to this frame, and be held by it
