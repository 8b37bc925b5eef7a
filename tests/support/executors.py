"""Executors without Ray: the work items of a merge done one after the other."""

from __future__ import annotations

from itertools import pairwise

from isomerge_fast.checkpoint.output.journal import Entries
from isomerge_fast.execution.report import Observer
from isomerge_fast.execution.work_item import MergeSettings, WorkItem, WorkResult
from isomerge_fast.execution.worker import merge_item
from isomerge_fast.planning.plan import Plan, TensorPlan


def runs_of(plan: Plan, count: int) -> list[tuple[TensorPlan, ...]]:
    """Every file's tensors in ``count`` runs, or as many as it has tensors; the last run of each file first."""
    shards: dict[str, list[TensorPlan]] = {}
    for tensor in plan.tensors:
        shards.setdefault(tensor.shard, []).append(tensor)
    runs = []
    for shard in shards.values():
        cuts = [len(shard) * index // count for index in range(count + 1)]
        runs += [tuple(shard[start:end]) for start, end in pairwise(cuts) if start < end]
    return runs[::-1]


class InTurn:
    """Merges so, with every file in ``count`` work items; ``merge`` is an ``engine.Executor``."""

    def __init__(self, count: int) -> None:
        self._count = count

    def merge(
        self, plan: Plan, settings: MergeSettings, journal_entries: Entries, observer: Observer | None
    ) -> list[WorkResult]:
        runs = enumerate(runs_of(plan, self._count), 1)
        return [
            merge_item(settings, WorkItem.of(plan, number, tensors, journal_entries), observer)
            for number, tensors in runs
        ]
