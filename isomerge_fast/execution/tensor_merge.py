"""Merge one planned tensor from its source into the files of all outputs, and write down that it is finished."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch

from .. import ops
from ..checkpoint.io.read_ahead import InputChecksums
from ..checkpoint.io.reader import Reader
from ..checkpoint.io.write_behind import WriteBehind
from ..checkpoint.io.writer import ShardWriter
from ..checkpoint.layout import StoredTensor
from ..checkpoint.output.journal import Entries, ItemJournal
from ..errors import InputError, ResourceError, visible
from ..methods import NotFiniteError, OutOfRangeError
from ..methods.certified import UnsolvedError
from ..methods.source import Threads
from ..planning.plan import TensorPlan
from ..planning.routes import Made, Stacked, merge_stack_with_retry, out_of_memory_at_once
from .input_damage import absurd_deltas, out_of_range, require_checksums, require_finite
from .report import PhaseTimer
from .sinks import FileSink
from .sources import PlannedSource
from .tensor_runs import RunSource, RunWriter, TensorRun
from .tensor_stacks import StackSource
from .work_item import MergeSettings, this_process

LOG = logging.getLogger("isomerge_fast")


def summed_inputs(plan: TensorPlan, settings: MergeSettings) -> tuple[StoredTensor, ...]:
    """Return the inputs whose checksums are made: to be compared, or recorded for ``apply``."""
    if plan.checksums:
        return (plan.base, *plan.experts)
    return (plan.base,) if settings.records_base else ()


class TensorMerge:
    """Merge tensors of one work item, several at once where several threads ask.

    What is finished is added to ``entries``, by the thread that writes.
    """

    def __init__(
        self,
        settings: MergeSettings,
        reader: Reader,
        checksums: InputChecksums,
        writes: WriteBehind,
        writers: Mapping[tuple[str, str], ShardWriter],
        journal: ItemJournal,
        entries: Entries,
        timer: PhaseTimer,
    ) -> None:
        self._settings, self._timer = settings, timer
        self._reader, self._checksums = reader, checksums
        self._writes, self._writers = writes, writers
        self._journal, self._entries, self._process = journal, entries, this_process()

    def merge(self, plan: TensorPlan, source: PlannedSource) -> None:
        """Merge a tensor, or a run; when this returns, its bytes and its journal entry wait to be written.

        Raises:
            InputError, ResourceError: naming the tensor, and what can be done.
        """
        if not isinstance(source, RunSource):
            self._merge_one(plan, source)
        elif source.run.is_apart:
            for tensor, own in source.apart(self._checksums):
                self._merge_one(tensor, own)
        elif not self._merge_run(source.run, source):
            with closing(source.one_by_one(self._checksums)) as singles:
                for tensor, own in singles:
                    self._merge_one(tensor, own)

    def merge_stack(self, source: StackSource) -> None:
        """Merge the tensors of a stack, as ``merge`` does one.

        Where something is wrong with one, each is merged by itself, so that those before it are finished and the error
        is its own; so, too, where there is no room for all. Their bytes are the same.
        """
        started, tensors = time.perf_counter(), source.stack.tensors
        made: list[Made] = []
        remarks: list[str] = []
        with self._timer.phase("compute"), self._explained(tensors[0]):
            try:
                made = merge_stack_with_retry(source.stack.route.merging, source.members)
            except (NotFiniteError, OutOfRangeError, UnsolvedError):
                pass
            except torch.OutOfMemoryError:
                remarks.append(out_of_memory_at_once(torch.device(self._settings.device), len(tensors)))
        if made:
            seconds = (time.perf_counter() - started) / len(made)
            for tensor, own, result in zip(tensors, source.members, made, strict=True):
                self._merge_one(tensor, own, result, seconds)
            return
        for remark in remarks:
            LOG.warning("tensor %s: %s", visible(repr(tensors[0].name)), remark)
        with closing(source.one_by_one(self._checksums)) as singles:
            for tensor, own in singles:
                self._merge_one(tensor, own, remarks=remarks)

    def _merge_one(
        self,
        plan: TensorPlan,
        source: PlannedSource,
        made: Made | None = None,
        seconds: float = 0.0,
        remarks: Sequence[str] = (),
    ) -> None:
        """Merge a tensor, or write what was ``made`` of it in so many seconds, with ``remarks`` beside its own."""
        started = time.perf_counter() - seconds
        writers = {folder: self._writers[folder, plan.shard] for folder in plan.scalings}
        sink = FileSink(plan, writers, self._writes, source.threads, self._timer.phase)
        with self._timer.phase("compute"), self._explained(plan):
            if made is None:
                stats = plan.route.run(source, sink)
            else:
                assert isinstance(plan.route, Stacked)
                value, stats = made
                plan.route.write(value, source, sink)
            evidence = stats.to_dict()
            require_finite(evidence)
            if (overflow := sink.overflows()) is not None:
                raise OutOfRangeError(overflow)
            remarks = [*remarks, *stats.remarks, *absurd_deltas(plan, evidence, self._reader)]
        found = {stored: self._checksums.take(stored) for stored in summed_inputs(plan, self._settings)}
        require_checksums(plan, found)
        seconds = time.perf_counter() - started
        self._finish(writers, [(plan, self._entry(plan, evidence, remarks, source.read_bytes, seconds, found))])

    def _merge_run(self, run: TensorRun, source: RunSource) -> bool:
        """Merge tensors as one; return False where something is wrong with one, which merging it by itself tells."""
        started = time.perf_counter()
        names = {folder: [tensor.tensors_in(folder)[0].name for tensor in run.tensors] for folder in run.scalings}
        writers = {folder: RunWriter(self._writers[folder, run.shard], own) for folder, own in names.items()}
        # One part, for the calling thread, whatever the size of parts: its tensors are measured together.
        sink = FileSink(run, writers, self._writes, Threads(), self._timer.phase)
        with self._timer.phase("compute"), self._explained(run):
            try:
                algorithm = run.route.run(source, sink).algorithm
            except (NotFiniteError, OutOfRangeError):
                return False
            sizes = source.sizes()
            if sizes is None or sink.overflows() is not None:
                return False
            found = source.checksums(len(summed_inputs(run.tensors[0], self._settings)))
            seconds = (time.perf_counter() - started) / run.spec.elements
            read_bytes = run.read_bytes // run.spec.elements
            made = []
            for tensor, own, sums in zip(run.tensors, sizes, found, strict=True):
                evidence = {"algorithm": algorithm, **own}
                require_checksums(tensor, sums)
                remarks = list(absurd_deltas(tensor, evidence, self._reader))
                elements = tensor.spec.elements
                entry = self._entry(tensor, evidence, remarks, read_bytes * elements, seconds * elements, sums)
                made.append((tensor, entry))
        self._finish(writers, made)
        return True

    def _entry(
        self,
        plan: TensorPlan,
        evidence: Mapping[str, Any],
        remarks: Sequence[str],
        read_bytes: int,
        seconds: float,
        found: Mapping[StoredTensor, str],
    ) -> dict[str, Any]:
        """Return the journal entry of a tensor, without the checksums of what is yet to be written."""
        report = {"name": plan.name, "action": plan.action, "route": plan.route.name, **evidence}
        if plan.cores > 1:
            report["cores"] = plan.cores
        if remarks:
            report["remarks"] = "; ".join(remarks)
        report["read_bytes"] = read_bytes
        report["write_bytes"] = plan.write_bytes
        report["seconds"] = round(seconds, 6)
        entry = {"name": plan.name, "report": report, "process": self._process}
        if self._settings.records_base:
            entry["base_checksum"] = found[plan.base]
        return entry

    def _finish(
        self, writers: Mapping[str, ShardWriter | RunWriter], made: Sequence[tuple[TensorPlan, dict[str, Any]]]
    ) -> None:
        """Have the entries of tensors written down, after all that was put before."""

        def finish() -> None:
            for plan, entry in made:
                entry["checksum"] = {
                    folder: {tensor.name: writer.finish(tensor.name) for tensor in plan.tensors_in(folder)}
                    for folder, writer in writers.items()
                }
            self._journal.add_texts([self._entries.add(entry) for _, entry in made])

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
                f"{self._settings.device} is out of memory at tensor {plan.name!r}, which was planned to take "
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
