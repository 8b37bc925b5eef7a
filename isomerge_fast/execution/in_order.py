"""Compute results in several threads, and hand them out in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Generic, TypeVar

import torch

from .jobs import Demand, Jobs
from .threads import ComputeThreads

# So many for every core are computed, or wait to be taken, beside the one that is asked for; and so much of what may be
# computed at once, in bytes.
AHEAD, AHEAD_SHARE = 2, 1 / 4

Result = TypeVar("Result")


class Task(Generic[Result]):
    """Hold what makes one result of ``result_bytes``, and what that takes.

    Where ``demand`` is None, it is made by the thread that asks for it.
    """

    def __init__(self, make: Callable[[], Result], demand: Demand | None = None, result_bytes: int = 0) -> None:
        self.demand, self.result_bytes = demand, result_bytes
        self._make = [make]
        self.results: list[Result] = []

    def run(self) -> None:
        self.results.append(self._make.pop()())  # what it holds goes with it


def in_order(tasks: Iterable[Task[Result]], cores: int, together_bytes: int) -> Iterator[Result]:
    """Yield the results of ``tasks`` in their order, while ``cores`` threads compute those that follow.

    A task begins when there is room for it: those that are computed at once demand ``together_bytes`` at most, unless
    one alone demands more. Where several fail, the error is that of the first.
    """
    if cores == torch.get_num_threads() == 1:
        for task in tasks:
            task.run()
            yield task.results.pop()
        return
    with ComputeThreads(cores) as threads:
        jobs = Jobs(threads, together_bytes, lambda: None)
        begun: deque[Task[Result]] = deque()
        try:
            for number, task in enumerate(tasks):
                begun.append(task)
                if task.demand is None:
                    task.run()
                else:
                    jobs.wait_for_room(task.demand)
                    jobs.start(number, task.demand, task.run)
                while begun and (begun[0].results or _are_far_ahead(begun, cores, together_bytes)):
                    yield _taken(begun, jobs)
            while begun:
                yield _taken(begun, jobs)
        except Exception:
            jobs.end()  # what came before may have failed as well, and is told of first
            raise


def _are_far_ahead(begun: Collection[Task[Result]], cores: int, together_bytes: int) -> bool:
    held = sum(task.result_bytes for task in begun)
    return len(begun) > AHEAD * cores or (len(begun) > 1 and held > AHEAD_SHARE * together_bytes)


def _taken(begun: deque[Task[Result]], jobs: Jobs) -> Result:
    first = begun.popleft()
    jobs.wait_until(lambda: bool(first.results))
    return first.results.pop()
