"""Merge the tensors of one work item: read, compute and write them one after the other, into files that exist already.

A merge by one process is one work item; over several processes each gets work items of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .. import ops
from ..checkpoint.io.read_ahead import GPU_THREADS, THREADS, InputChecksums, ReadAhead
from ..checkpoint.io.reader import Reader, allow_open_files
from ..checkpoint.io.write_behind import WriteBehind
from ..checkpoint.io.writer import ShardWriter
from ..checkpoint.layout import StoredTensor
from ..checkpoint.output.journal import Entries, ItemJournal
from ..errors import InputError, ResourceError
from ..linalg.cusolver import describe_arithmetic
from ..methods import NotFiniteError, OutOfRangeError
from ..methods.certified import UnsolvedError
from ..planning.plan import TensorPlan
from .device_copies import Uploads
from .input_damage import absurd_deltas, out_of_range, require_checksums, require_finite
from .malloc import set_heap_thresholds
from .report import Observer, PhaseTimer, Progress
from .sinks import FileSink
from .sources import FactorSource, FileSource, PlannedSource, first_pass
from .threads import ComputeThreads
from .work_item import MergeSettings, WorkItem, WorkResult, this_process

# About what glibc's heap may keep of freed blocks. Tensors that come so close to the plan's peak return theirs at once.
HEAP_RESIDUE_BYTES = 128 << 20


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
        self._timer = PhaseTimer(self._progress, observer)
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
        threads = torch.get_num_threads()
        torch.set_num_threads(settings.threads)
        with ExitStack() as closing:
            closing.callback(torch.set_num_threads, threads)
            self._limit_vram(closing)
            # As glibc's own threshold ends up; the process may go on without us.
            closing.callback(set_heap_thresholds, eager=False)
            try:
                # Before it is asked whose the folder is: what is opened after that may be another merge's.
                self._open_writers()
                journal = ItemJournal(
                    settings.folder, settings.key, settings.threads, self._item.number, this_process()
                )
                closing.callback(journal.close)
                self._merge_all(journal)
                completed = True
            finally:
                with self._timer.phase("write"), ExitStack() as writers:
                    for writer in self._writers.values():
                        writers.callback(writer.close, validate=completed)

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
        """Read ahead, merge and write behind, tensor after tensor.

        A tensor that has a journal entry stays as it is, where the files hold its bytes.
        """
        settings, tensors, budget = self._settings, self._item.tensors, self._settings.budget
        for tensor in tensors:
            entry = journal.finished.get(tensor.name) or self._item.journal_entries.get(tensor.name)
            if entry is not None and self._is_intact(tensor, entry):
                self._entries.add(entry)
        to_do = [tensor for tensor in tensors if tensor.name not in self._entries]
        checksums = InputChecksums(stored for tensor in to_do for stored in self._summed_inputs(tensor))
        on_gpu = self._device.type == "cuda"
        with (
            Reader(self._item.files, direct=settings.direct) as reader,
            ThreadPoolExecutor(GPU_THREADS if on_gpu else THREADS, "isomerge-read") as readers,
            ReadAhead(
                reader,
                readers,
                (bundle for tensor in to_do for bundle in first_pass(tensor)),
                budget_bytes=budget.read_ahead,
                part_bytes=budget.gpu_part,
                pinned=on_gpu,
                checksums=checksums,
            ) as ahead,
            Uploads(ahead, self._device) as uploads,
            WriteBehind(budget.write_behind) as writes,
            ComputeThreads(1 if on_gpu else None) as threads,
        ):
            self._reader, self._checksums, self._writes, self._journal = reader, checksums, writes, journal
            names = {tensor.name for tensor in to_do}
            for tensor in tensors:
                self._progress.tensor = tensor.name
                if tensor.name in names:
                    kind = FactorSource if tensor.pairs else FileSource
                    source = kind(tensor, uploads, reader, readers, threads, budget, self._device, self._timer.phase)
                    self._merge_tensor(tensor, source)
                self._progress.done_tensors += 1
                self._progress.done_bytes += tensor.moved_bytes
            with self._timer.phase("write"):
                writes.drain()
            reader.check_unchanged()
            self._io = {
                "read": "direct" if reader.direct_files else "page-cache",
                "write": "direct" if any(writer.is_direct for writer in self._writers.values()) else "page-cache",
                "reading_seconds": ahead.busy_seconds,
                "writing_seconds": writes.busy_seconds,
            }
            if on_gpu:
                self._io["peak_vram_bytes"] = torch.cuda.max_memory_allocated(self._device)

    def _summed_inputs(self, tensor: TensorPlan) -> tuple[StoredTensor, ...]:
        """Return the inputs whose checksums are made: to be compared, or recorded for ``apply``."""
        if tensor.checksums:
            return (tensor.base, *tensor.experts)
        return (tensor.base,) if self._settings.records_base else ()

    def _is_intact(self, tensor: TensorPlan, entry: dict[str, Any]) -> bool:
        """Return whether the staged shards hold the bytes that a journal entry tells of."""
        with self._timer.phase("read"):
            return all(
                self._writers[output.folder, tensor.shard].checksum(name)
                == entry["checksum"].get(output.folder, {}).get(name)
                for output in tensor.outputs
                for name in output.names
            )

    def _merge_tensor(self, plan: TensorPlan, source: PlannedSource) -> None:
        started = time.perf_counter()
        work, peak = plan.route.work_bytes, self._settings.peak_work_bytes
        set_heap_thresholds(eager=work > max(HEAP_RESIDUE_BYTES, peak - HEAP_RESIDUE_BYTES))
        writers = {folder: self._writers[folder, plan.shard] for folder in plan.scalings}
        sink = FileSink(plan, writers, self._writes, source.threads, self._timer.phase)
        with self._timer.phase("compute"), self._explained(plan):
            stats = plan.route.run(source, sink)
            evidence = stats.to_dict()
            require_finite(evidence)
            if (overflow := sink.overflows()) is not None:
                raise OutOfRangeError(overflow)
            remarks = [*stats.remarks, *absurd_deltas(plan, evidence, self._reader)]
        found = {stored: self._checksums.take(stored) for stored in self._summed_inputs(plan)}
        require_checksums(plan, found)
        report = {"name": plan.name, "action": plan.action, "route": plan.route.name, **evidence}
        if remarks:
            report["remarks"] = "; ".join(remarks)
        report["read_bytes"] = source.read_bytes
        report["write_bytes"] = plan.write_bytes
        report["seconds"] = round(time.perf_counter() - started, 6)
        entry = {"name": plan.name, "report": report, "process": this_process()}
        if self._settings.records_base:
            entry["base_checksum"] = found[plan.base]

        def finish() -> None:
            entry["checksum"] = sink.checksums()
            self._entries.add(entry)
            self._journal.add(entry)

        with self._timer.phase("write"):
            self._writes.put(finish)

    @contextmanager
    def _explained(self, plan: TensorPlan) -> Iterator[None]:
        """Turn the errors of a merge into those that name the tensor, its files and what to do."""
        try:
            yield
        except NotFiniteError as error:
            dtype = ops.dtype_name(plan.spec.dtype)
            raise out_of_range(plan, self._reader, f"the deltas overflow {dtype}") from error
        except OutOfRangeError as error:
            raise out_of_range(plan, self._reader, str(error)) from error
        except UnsolvedError as error:
            raise InputError(f"tensor {plan.name!r}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"{self._device} is out of memory at tensor {plan.name!r}, which was planned to take "
                f"{plan.route.work_bytes} bytes beside {self._settings.budget.in_transfer} in transfer "
                f"({str(error).splitlines()[0]}); what else runs on it takes room: --resume continues when there is "
                "more, --max-vram plans with less"
            ) from error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "alloc_cpu" not in str(error):  # torch's allocator has no class
                raise
            reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
            raise ResourceError(
                f"out of memory at tensor {plan.name!r}, which was planned to take {plan.route.work_bytes} bytes"
                f"{reason}; --resume continues when there is more, --max-ram plans with less"
            ) from error
