"""Merge the tensors of one work item: read ahead, compute and write behind, into files that exist already.

A merge by one process is one work item; over several processes each gets work items of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from .. import ops
from ..checkpoint.io.read_ahead import GPU_THREADS, THREADS, Bundle, InputChecksums, ReadAhead
from ..checkpoint.io.reader import Reader, allow_open_files
from ..checkpoint.io.write_behind import WriteBehind
from ..checkpoint.io.writer import ShardWriter
from ..checkpoint.output.journal import Entries, ItemJournal
from ..errors import ResourceError
from ..linalg.cusolver import describe_arithmetic
from ..methods.source import Threads
from ..planning.budget import Budget
from ..planning.plan import TensorPlan
from ..planning.schedule import longest_first
from .device_copies import Uploads
from .malloc import set_heap_thresholds
from .report import Observer, PhaseTimer, Progress
from .sources import Bundles, FactorSource, FileSource, Phase, PlannedSource, first_pass
from .tensor_merge import TensorMerge, summed_inputs
from .tensor_queue import TensorQueue
from .tensor_runs import RunSource, TensorRun, joined
from .tensor_stacks import StackSource, TensorStack, stacked
from .threads import ComputeThreads
from .work_item import MergeSettings, WorkItem, WorkResult, this_process


def merge_item(settings: MergeSettings, item: WorkItem, observer: Observer | None = None) -> WorkResult:
    """Merge the tensors of a work item; return when their bytes are on disk.

    After an error what was finished stays, and is found by the next attempt.
    """
    return _ItemRun(settings, item, observer).execute()


class _ItemRun:
    """Run one attempt at a work item."""

    def __init__(self, settings: MergeSettings, item: WorkItem, observer: Observer | None) -> None:
        self._settings, self._item = settings, item
        self._device = ops.indexed(torch.device(settings.device))
        moved = sum(tensor.moved_bytes for tensor in item.tensors)
        self._progress = Progress(len(item.tensors), moved)
        self._cores = 1 if self._device.type == "cuda" else settings.threads
        self._timer = PhaseTimer(self._progress, observer, self._cores)
        self._writers: dict[tuple[str, str], ShardWriter] = {}
        self._entries = Entries()
        self._io: dict[str, Any] = {}

    def execute(self) -> WorkResult:
        started = time.perf_counter()
        with self._timer.phase("prepare"):
            self._require_same_arithmetic()
            self._run()
        seconds = {**self._progress.seconds, "total": time.perf_counter() - started}
        return WorkResult(self._item.number, self._entries, seconds, self._io, this_process())

    def _run(self) -> None:
        settings = self._settings
        completed = False
        with ExitStack() as closing:
            # On a CPU each of ``ComputeThreads`` has one core, and this one makes small things only.
            closing.enter_context(ops.torch_threads(settings.threads if self._device.type == "cuda" else 1))
            self._limit_vram(closing)
            # As glibc's own threshold ends up; the process may go on without us.
            closing.callback(set_heap_thresholds, eager=False)
            try:
                # Before it is asked whose the folder is: what is opened after that may be another merge's.
                self._open_writers()
                journal = ItemJournal(settings.folder, settings.key, settings.cores, self._item.number, this_process())
                closing.callback(journal.close)
                self._merge_all(journal)
                completed = True
            finally:
                with ExitStack() as writers:
                    for writer in self._writers.values():
                        writers.callback(writer.close, validate=completed)
                    writers.enter_context(self._timer.phase("write"))

    def _require_same_arithmetic(self) -> None:
        """Raise ResourceError where this process would give other last digits than the plan was made for."""
        here = describe_arithmetic(self._device)
        if here != self._settings.arithmetic:
            raise ResourceError(
                f"{self._device} computes with {here}, the merge was planned for {self._settings.arithmetic}: the "
                "results would differ in their last digits; give it devices of one kind"
            )

    def _limit_vram(self, closing: ExitStack) -> None:
        """Hold the process to the ceiling; afterwards allow it again what it was allowed before."""
        if self._device.type != "cuda":
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        if self._settings.max_vram is not None:
            before = torch.cuda.get_per_process_memory_fraction(self._device)
            ceiling = self._settings.max_vram / ops.traits_of(self._device).memory_bytes
            closing.callback(torch.cuda.set_per_process_memory_fraction, before, self._device)
            torch.cuda.set_per_process_memory_fraction(min(before, ceiling), self._device)

    def _open_writers(self) -> None:
        names: dict[tuple[str, str], list[str]] = {}
        for tensor in self._item.tensors:
            for folder in tensor.scalings:
                own = names.setdefault((folder, tensor.shard), [])
                own.extend([made.name for made in tensor.tensors_in(folder)])
        allow_open_files(2 * len(names))
        for (folder, file), own in names.items():
            self._writers[folder, file] = ShardWriter(
                self._settings.folder / "new" / folder / file,
                self._item.folders[folder][file],
                names=own,
                direct=self._settings.direct,
                metadata=self._item.metadata[folder, file],
            )

    def _merge_all(self, journal: ItemJournal) -> None:
        """Read ahead, merge and write behind.

        A tensor that has a journal entry stays as it is, where the files hold its bytes.
        """
        settings, budget = self._settings, self._settings.budget
        for tensor in self._item.tensors if journal.finished or self._item.journal_entries else ():
            entry = journal.finished.get(tensor.name) or self._item.journal_entries.get(tensor.name)
            if entry is not None and self._is_intact(tensor, entry):
                self._entries.add(entry)
                self._count(tensor)
        left = [tensor for tensor in self._item.tensors if tensor.name not in self._entries]
        on_gpu = self._device.type == "cuda"
        checksums = InputChecksums(stored for tensor in left for stored in summed_inputs(tensor, settings))
        in_order = longest_first(left, self._cores)
        to_do: list[TensorPlan | TensorStack] = list(
            stacked(in_order) if on_gpu else joined(in_order, self._writers, budget, settings.together_bytes)
        )
        with (
            Reader(self._item.files, direct=settings.direct) as reader,
            ThreadPoolExecutor(GPU_THREADS if on_gpu else THREADS, "isomerge-read") as readers,
            ReadAhead(
                reader,
                readers,
                (bundle for each in to_do for bundle in _bundles(each)),
                budget_bytes=budget.read_pool,
                part_bytes=budget.gpu_part,
                pinned=on_gpu,
                checksums=checksums,
            ) as ahead,
            Uploads(ahead, self._device) as uploads,
            WriteBehind(budget.write_behind) as writes,
            ComputeThreads(self._cores) as threads,
        ):
            merge = TensorMerge(settings, reader, checksums, writes, self._writers, journal, self._entries, self._timer)
            given = {"reader": reader, "readers": readers, "budget": budget, "phase": self._timer.phase}
            source_of = partial(_source_of, device=self._device, **given)
            queue = TensorQueue(
                merge.merge, source_of, ahead, threads, settings.together_bytes, self._timer, self._progress
            )
            for each in to_do:
                self._timer.begin(each.name)
                if isinstance(each, TensorStack):
                    merge.merge_stack(StackSource(each, uploads, threads=threads, device=self._device, **given))
                elif on_gpu:
                    merge.merge(each, source_of(each, uploads, threads))
                else:
                    queue.add(each)
                    continue
                self._count(each)
            queue.end()
            with self._timer.phase("write"):
                writes.drain()
            reader.check_unchanged()
            self._io = self._io_of(reader, ahead, writes)

    def _io_of(self, reader: Reader, ahead: ReadAhead, writes: WriteBehind) -> dict[str, Any]:
        """Return how files were read and written, for the report."""
        found = {
            "read": "direct" if reader.direct_files else "page-cache",
            "write": "direct" if any(writer.is_direct for writer in self._writers.values()) else "page-cache",
            "reading_seconds": ahead.busy_seconds,
            "writing_seconds": writes.busy_seconds,
        }
        on_gpu = self._device.type == "cuda"
        return found | ({"peak_vram_bytes": torch.cuda.max_memory_allocated(self._device)} if on_gpu else {})

    def _count(self, done: TensorPlan | TensorStack) -> None:
        self._progress.done_tensors += len(done.tensors) if isinstance(done, TensorStack) else 1
        self._progress.done_bytes += done.moved_bytes

    def _is_intact(self, tensor: TensorPlan, entry: dict[str, Any]) -> bool:
        """Return whether the staged shards hold the bytes that a journal entry tells of."""
        with self._timer.phase("read"):
            return all(
                self._writers[output.folder, tensor.shard].checksum(name)
                == entry["checksum"].get(output.folder, {}).get(name)
                for output in tensor.outputs
                for name in output.names
            )


def _bundles(planned: TensorPlan | TensorStack) -> Iterator[Bundle]:
    """Return what is read ahead of a tensor, or of a stack."""
    return iter([planned.bundle()]) if isinstance(planned, TensorStack) else first_pass(planned)


def _source_of(
    plan: TensorPlan,
    first: Bundles,
    threads: Threads,
    *,
    reader: Reader,
    readers: ThreadPoolExecutor,
    budget: Budget,
    device: torch.device,
    phase: Phase,
) -> PlannedSource:
    """Return the source of a tensor whose first pass comes from ``first``."""
    given = (first, reader, readers, threads, budget, device, phase)
    if isinstance(plan, TensorRun):
        return RunSource(plan, *given)
    return (FactorSource if plan.pairs else FileSource)(plan, *given)
