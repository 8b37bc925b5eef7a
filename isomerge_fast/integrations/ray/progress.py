"""Add up how far all workers of a cluster are, from the journals that they keep."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ...checkpoint.output.journal import Entries, ItemProgress
from ...execution.report import Observer, Progress
from ...execution.work_item import MergeSettings, WorkItem, WorkResult
from ...planning.plan import Plan
from .cluster import POLL_SECONDS


class ClusterProgress:
    """Tell an observer how far all work items are together.

    Attributes:
        pause_seconds: until the next look at the journals.
    """

    def __init__(
        self,
        plan: Plan,
        settings: MergeSettings,
        items: Sequence[WorkItem],
        journal_entries: Entries,
        observer: Observer | None,
    ) -> None:
        self._observer = observer
        self._bytes = {tensor.name: tensor.moved_bytes for tensor in plan.tensors}
        self._progress = Progress(len(plan.tensors), sum(self._bytes.values()))
        self._running = {item.number: ItemProgress(settings.folder, item.number) for item in items}
        self._items = len(items)
        self._done = set(journal_entries) & self._bytes.keys()
        self._started = time.perf_counter()
        self.pause_seconds = POLL_SECONDS

    def finish(self, result: WorkResult) -> None:
        """Count a work item as done."""
        del self._running[result.number]
        self._done |= result.entries.keys()

    def update(self) -> None:
        """Read the journals and tell the observer."""
        if self._observer is None:
            return
        started = time.perf_counter()
        at_work = 0
        for journal in self._running.values():
            journal.update()
            at_work += bool(journal.about)
            for name in journal.finished.keys() - self._done:
                self._done.add(name)
                self._progress.tensor = name
        progress = self._progress
        progress.done_tensors = len(self._done)
        progress.done_bytes = sum(self._bytes[name] for name in self._done)
        progress.seconds["compute"] = started - self._started
        progress.phase = f"{at_work} worker(s), unit {self._items - len(self._running)}/{self._items}"
        self._observer(progress)
        # Thousands of journals on a slow file system: no more than a twentieth of the time.
        self.pause_seconds = max(POLL_SECONDS, 20 * (time.perf_counter() - started))
