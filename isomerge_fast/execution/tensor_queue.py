"""Merge tensors on a CPU: matrices at once, each by its own cores, and between them what all cores share."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from ..checkpoint.io.read_ahead import ReadAhead
from ..methods.source import Threads
from ..planning.plan import TensorPlan
from .jobs import Demand, Jobs
from .malloc import set_heap_thresholds
from .report import PhaseTimer, Progress
from .sources import FirstPass, PlannedSource, first_pass
from .tensor_runs import TensorRun
from .threads import ComputeThreads, OneCore

# About what glibc's heap may keep of freed blocks. Tensors that come so close to the plan's peak return theirs at once.
HEAP_RESIDUE_BYTES = 128 << 20


class TensorQueue:
    """Merge tensors in the order in which they are added, which is that of the bundles of ``ahead``.

    A matrix is a job for some threads of ``threads``, and the next tensor is begun beside it. Other tensors are walked
    in blocks, which all threads share. With one thread all is done by the caller.

    Args:
        merge: ``TensorMerge.merge``.
        source_of: returns the source of a tensor, given its first pass and the threads that share its blocks.
        together_bytes: what the tensors that are merged at once may take together.
    """

    def __init__(
        self,
        merge: Callable[[TensorPlan, PlannedSource], None],
        source_of: Callable[[TensorPlan, FirstPass, Threads], PlannedSource],
        ahead: ReadAhead,
        threads: ComputeThreads,
        together_bytes: int,
        timer: PhaseTimer,
        progress: Progress,
    ) -> None:
        self._merge, self._source_of, self._ahead, self._threads = merge, source_of, ahead, threads
        self._timer, self._progress, self._together_bytes = timer, progress, together_bytes
        self._jobs = Jobs(threads, together_bytes, timer.tell)
        self._count, self._counting = 0, Lock()

    def add(self, plan: TensorPlan) -> None:
        """Merge a tensor, or begin to; raise the first error of those that were added before."""
        self._count += 1
        is_job = self._threads.count > 1 and not plan.route.shares_blocks
        demand = Demand(plan.cores if is_job else 0, plan.route.work_bytes)
        try:
            with self._timer.phase("compute"):
                self._jobs.wait_for_room(demand)
            in_use = self._together_bytes - self._jobs.free_bytes + demand.work_bytes
            set_heap_thresholds(eager=in_use > max(HEAP_RESIDUE_BYTES, self._together_bytes - HEAP_RESIDUE_BYTES))
            if is_job:
                self._begin(plan, demand)
            else:
                self._merge_with(plan, FirstPass(self._ahead, plan), self._threads)
        except Exception:
            self.end()  # what came before may have failed as well, and is told of first
            raise

    def end(self) -> None:
        """Wait until all are merged; raise the first error."""
        with self._timer.phase("compute"):
            self._jobs.end()

    def _begin(self, plan: TensorPlan, demand: Demand) -> None:
        """Start a job; return when the next tensor's bundles can be taken."""
        first = FirstPass(self._ahead, plan, self._jobs.changed)
        # As many tensors as there are cores can hold so much each, and one more is read.
        share = self._ahead.budget_bytes // (self._threads.count + 1)
        if plan.route.holds_copies or sum(bundle.bytes for bundle in first_pass(plan)) <= share:
            with self._timer.phase("read"):
                first.fetch()

        def job() -> None:
            with self._timer.job(plan.name, demand.cores):
                self._merge_with(plan, first, self._threads if demand.cores > 1 else OneCore())

        self._jobs.start(self._count, demand, job)
        if not first.are_taken:
            with self._timer.phase("compute"):
                self._jobs.wait_until(lambda: first.are_taken)

    def _merge_with(self, plan: TensorPlan, first: FirstPass, threads: Threads) -> None:
        try:
            self._merge(plan, self._source_of(plan, first, threads))
        finally:
            first.close()
        with self._counting:
            self._progress.done_tensors += len(plan.tensors) if isinstance(plan, TensorRun) else 1
            self._progress.done_bytes += plan.moved_bytes
