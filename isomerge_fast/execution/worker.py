"""The work of one process: some tensors of a merge are read, computed and written, one after the other, into files
that are there already. A merge on one machine is one unit; over several processes each gets units of its own.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..checkpoint.io.read_ahead import GPU_THREADS, THREADS, InputChecksums, ReadAhead
from ..checkpoint.io.reader import Reader, allow_open_files, files_of
from ..checkpoint.io.write_behind import WriteBehind
from ..checkpoint.io.writer import OutputTensor, ShardWriter
from ..checkpoint.layout import FileIdentity, StoredTensor
from ..checkpoint.output.journal import Entries, ItemJournal
from ..errors import InputError, ResourceError
from ..linalg.arithmetic import describe_arithmetic
from ..methods import NotFiniteError, OutOfRangeError
from ..methods.certified import UnsolvedError
from ..planning.budget import Budget
from ..planning.plan import Plan, TensorPlan
from .device_copies import Uploads
from .malloc import return_freed_blocks
from .report import PREPARE, Observer, Progress, Stopwatch
from .sinks import TensorOutput
from .sources import FactorSource, FileSource, PlannedSource, bundle_of, first_pass
from .threads import Workers

# About what glibc's heap may keep of freed blocks. Tensors that come so close to the plan's peak return theirs at once.
HEAP_RESIDUE_BYTES = 128 << 20
LOG = logging.getLogger("isomerge_fast")


@dataclass(frozen=True)
class Job:
    """What every process has to know of a merge, whatever its tensors are.

    Attributes:
        folder: where the journals lie, and under ``new`` the output under construction.
        key: ``fingerprint`` of the merge.
        threads: with which is computed.
        direct: read and write past the page cache where that is faster.
        records_base: whether the checksums of the base's tensors are recorded, for ``apply``.
        peak_work_bytes: of the merge's largest tensor.
        max_vram: ceiling in bytes for the memory of a GPU.
        arithmetic: see ``Plan``.
    """

    folder: Path
    key: str
    device: str
    threads: int
    direct: bool
    records_base: bool
    budget: Budget
    peak_work_bytes: int
    max_vram: int | None
    arithmetic: str

    @classmethod
    def of(
        cls, plan: Plan, folder: Path, key: str, *, device: str, threads: int, direct: bool, max_vram: int | None
    ) -> Job:
        return cls(
            folder,
            key,
            device,
            threads,
            direct,
            plan.config.save_delta,
            plan.budget,
            plan.peak_work_bytes,
            max_vram,
            plan.arithmetic,
        )


@dataclass(frozen=True)
class WorkItem:
    """Tensors for one process.

    Attributes:
        number: names it among the units of a run.
        files: the inputs that are read.
        folders: the files written into, by sub-folder of the output, each with all that will be in it.
        metadata: of these files' headers, by sub-folder and name.
        journal_entries: those of earlier runs, by tensor.
    """

    number: int
    tensors: tuple[TensorPlan, ...]
    files: Mapping[Path, FileIdentity]
    folders: Mapping[str, Mapping[str, tuple[OutputTensor, ...]]]
    metadata: Mapping[tuple[str, str], Mapping[str, str]]
    journal_entries: Entries

    @classmethod
    def of(cls, plan: Plan, number: int, tensors: tuple[TensorPlan, ...], journal_entries: Entries) -> WorkItem:
        """A slice of a plan."""
        shards = {tensor.shard for tensor in tensors}
        read = {stored.file for tensor in tensors for stored in tensor.inputs}
        known = files_of(plan.base, *plan.experts)
        folders = {
            folder: {file: outputs for file, outputs in files.items() if file in shards}
            for folder, files in plan.folders.items()
        }
        return cls(
            number,
            tensors,
            {path: identity for path, identity in known.items() if path in read},
            folders,
            {(folder, file): plan.metadata_of(folder, file) for folder, files in folders.items() for file in files},
            journal_entries.of(tensor.name for tensor in tensors),
        )

    def __str__(self) -> str:
        shards = sorted({tensor.shard for tensor in self.tensors})
        files = shards[0] if len(shards) == 1 else f"{len(shards)} files"
        first, last = self.tensors[0].name, self.tensors[-1].name
        names = f"tensor {first!r}" if len(self.tensors) == 1 else f"{len(self.tensors)} tensors {first!r} to {last!r}"
        return f"unit {self.number} ({files}: {names})"


@dataclass(frozen=True)
class WorkResult:
    """What became of a unit.

    Attributes:
        entries: of the journal, by tensor: its checksums and its part of the report.
        seconds: as ``Report.seconds``.
        io: as ``Report.io``.
        process: where it ran.
    """

    number: int
    entries: Entries
    seconds: dict[str, float]
    io: dict[str, Any]
    process: dict[str, Any]


def this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def merge_item(job: Job, unit: WorkItem, observer: Observer | None = None) -> WorkResult:
    """Merges its tensors, and returns when their bytes are on disk.

    Args:
        observer: called at every change of phase.

    Raises:
        InputError, ResourceError: see ``errors``; what was finished stays, and is found by the next attempt.
    """
    return _ItemRun(job, unit, observer).execute()


class _ItemRun:
    """One attempt at a unit."""

    def __init__(self, job: Job, unit: WorkItem, observer: Observer | None) -> None:
        self._job, self._unit = job, unit
        self._device = ops.indexed(torch.device(job.device))
        moved = sum(tensor.moved_bytes for tensor in unit.tensors)
        self._progress = Progress(len(unit.tensors), moved)
        self._stopwatch = Stopwatch(self._progress, observer)
        self._writers: dict[tuple[str, str], ShardWriter] = {}
        self._entries = Entries()
        self._io: dict[str, Any] = {}

    def execute(self) -> WorkResult:
        started = time.perf_counter()
        with self._stopwatch.phase(PREPARE):
            self._require_same_arithmetic()
            self._work()
        return WorkResult(
            self._unit.number,
            self._entries,
            {**self._progress.seconds, "total": time.perf_counter() - started},
            self._io,
            this_process(),
        )

    def _work(self) -> None:
        job, unit = self._job, self._unit
        completed = False
        threads = torch.get_num_threads()
        torch.set_num_threads(job.threads)
        with ExitStack() as closing:
            closing.callback(torch.set_num_threads, threads)
            closing.enter_context(self._limited_vram())
            # As glibc's own threshold ends up; the process may go on without us.
            closing.callback(return_freed_blocks, eager=False)
            try:
                # Before it is asked whose the folder is: what is opened after that may be another merge's.
                self._open_writers()
                journal = ItemJournal(job.folder, job.key, job.threads, unit.number, this_process())
                closing.callback(journal.close)
                self._merge_all(journal)
                completed = True
            finally:
                with self._stopwatch.phase("write"), ExitStack() as writers:
                    for writer in self._writers.values():
                        writers.callback(writer.close, validate=completed)

    def _require_same_arithmetic(self) -> None:
        """Raise ResourceError where this process would give other last digits than the plan was made for."""
        here = describe_arithmetic(self._device)
        if here != self._job.arithmetic:
            raise ResourceError(
                f"{self._device} computes with {here}, the merge was planned for {self._job.arithmetic}: the results "
                "would differ in their last digits; give it devices of one kind"
            )

    @contextmanager
    def _limited_vram(self) -> Iterator[None]:
        """Hold the process to the ceiling; put back afterwards what it was allowed before."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        if self._job.max_vram is None:
            yield
            return
        before = torch.cuda.get_per_process_memory_fraction(self._device)
        ceiling = self._job.max_vram / ops.traits_of(self._device).memory_bytes
        torch.cuda.set_per_process_memory_fraction(min(before, ceiling), self._device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self._device)

    def _open_writers(self) -> None:
        names: dict[tuple[str, str], list[str]] = {}
        for tensor in self._unit.tensors:
            for folder in tensor.scalings:
                own = names.setdefault((folder, tensor.shard), [])
                own.extend([made.name for made in tensor.tensors_in(folder)])
        allow_open_files(2 * len(names))
        for (folder, file), own in names.items():
            self._writers[folder, file] = ShardWriter(
                self._job.folder / "new" / folder / file,
                self._unit.folders[folder][file],
                names=own,
                direct=self._job.direct,
                metadata=self._unit.metadata[folder, file],
            )

    def _merge_all(self, journal: ItemJournal) -> None:
        """Reads ahead, merges and writes behind, tensor after tensor; what the journal has and the files hold is
        kept.
        """
        tensors, budget = self._unit.tensors, self._job.budget
        for tensor in tensors:
            entry = journal.finished.get(tensor.name) or self._unit.journal_entries.get(tensor.name)
            if entry is not None and self._is_intact(tensor, entry):
                self._entries.add(entry)
        to_do = {tensor.name for tensor in tensors} - self._entries.keys()
        ahead_of = (bundle for tensor in tensors if tensor.name in to_do for bundle in first_pass(tensor))
        checksums = InputChecksums(
            stored for tensor in tensors if tensor.name in to_do for stored in self._summed_inputs(tensor)
        )
        on_gpu = self._device.type == "cuda"
        with (
            Reader(self._unit.files, direct=self._job.direct) as reader,
            ThreadPoolExecutor(GPU_THREADS if on_gpu else THREADS, "isomerge-read") as threads,
            ReadAhead(
                reader,
                threads,
                ahead_of,
                budget_bytes=budget.read_ahead,
                part_bytes=budget.gpu_part,
                pinned=on_gpu,
                checksums=checksums,
            ) as ahead,
            Uploads(ahead, self._device) as uploads,
            WriteBehind(budget.write_behind) as writes,
            Workers(1 if on_gpu else None) as workers,
        ):
            for tensor in tensors:
                self._progress.tensor = tensor.name
                if tensor.name in to_do:
                    kind = FactorSource if tensor.pairs else FileSource
                    source = kind(
                        tensor, uploads, reader, threads, workers, budget, self._device, self._stopwatch.phase
                    )
                    self._merge_tensor(tensor, source, reader, checksums, writes, journal)
                self._progress.done_tensors += 1
                self._progress.done_bytes += tensor.moved_bytes
            with self._stopwatch.phase("write"):
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

    def _writers_of(self, tensor: TensorPlan) -> dict[str, ShardWriter]:
        """By folder."""
        return {folder: self._writers[folder, tensor.shard] for folder in tensor.scalings}

    def _summed_inputs(self, tensor: TensorPlan) -> tuple[StoredTensor, ...]:
        """Of what is read, that of which checksums are made: to be compared, or recorded for ``apply``."""
        if tensor.checksums:
            return (tensor.base, *tensor.experts)
        return (tensor.base,) if self._job.records_base else ()

    def _is_intact(self, tensor: TensorPlan, entry: dict[str, Any]) -> bool:
        """Whether the bytes that the journal claims are in the staged shards."""
        with self._stopwatch.phase("read"):
            return all(
                self._writers[output.folder, tensor.shard].checksum(name)
                == entry["checksum"].get(output.folder, {}).get(name)
                for output in tensor.outputs
                for name in output.names
            )

    def _merge_tensor(
        self,
        plan: TensorPlan,
        source: PlannedSource,
        reader: Reader,
        checksums: InputChecksums,
        writes: WriteBehind,
        journal: ItemJournal,
    ) -> None:
        started = time.perf_counter()
        work, peak = plan.route.work_bytes, self._job.peak_work_bytes
        return_freed_blocks(eager=work > max(HEAP_RESIDUE_BYTES, peak - HEAP_RESIDUE_BYTES))
        report: dict[str, Any] = {"name": plan.name, "action": plan.action, "route": plan.route.name}
        output = TensorOutput(plan, self._writers_of(plan), writes, source.threads, self._stopwatch.phase)
        with self._stopwatch.phase("compute"):
            try:
                stats = plan.route.run(source, output)
                evidence = stats.to_dict()
                _require_finite(evidence)
            except NotFiniteError as error:
                dtype = str(plan.spec.dtype).removeprefix("torch.")
                raise _out_of_range(plan, reader, f"the deltas overflow {dtype}") from error
            except OutOfRangeError as error:
                raise _out_of_range(plan, reader, str(error)) from error
            except UnsolvedError as error:
                raise InputError(f"tensor {plan.name!r}: {error}") from error
            except torch.OutOfMemoryError as error:
                raise ResourceError(
                    f"{self._device} is out of memory at tensor {plan.name!r}, which was planned to take {work} bytes "
                    f"beside {self._job.budget.in_transfer} in transfer ({str(error).splitlines()[0]}); what else runs "
                    "on it takes room: --resume continues when there is more, --max-vram plans with less"
                ) from error
            if (overflow := output.overflows()) is not None:
                raise _out_of_range(plan, reader, overflow)
            remarks = [*stats.remarks, *_absurd(plan, evidence, reader)]
        entry = {"name": plan.name, "report": report, "process": this_process()}
        found = {stored: checksums.take(stored) for stored in self._summed_inputs(plan)}
        _check_inputs(plan, found)
        if self._job.records_base:
            entry["base_checksum"] = found[plan.base]
        report.update(evidence)
        if remarks:
            report["remarks"] = "; ".join(remarks)
        report["read_bytes"] = source.read_bytes
        report["write_bytes"] = plan.write_bytes
        report["seconds"] = round(time.perf_counter() - started, 6)

        def finish() -> None:
            entry["checksum"] = output.checksums()
            self._entries.add(entry)
            journal.add(entry)

        with self._stopwatch.phase("write"):
            writes.put(finish)


def _check_inputs(plan: TensorPlan, found: Mapping[StoredTensor, str]) -> None:
    """Raise InputError where the bytes of an input are not those that they are known to be."""
    for stored, known in zip((plan.base, *plan.experts), plan.checksums, strict=False):
        if found[stored] != known:
            raise InputError(
                f"{stored.file}: tensor {stored.name!r} is not what it was in the merge that kept the delta "
                "(checksum differs)"
            )


def _require_finite(stats: Mapping[str, Any]) -> None:
    """Raises OutOfRangeError where a number of the evidence is NaN or infinite: what it stands for cannot be right."""
    for key, value in stats.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise OutOfRangeError(f"{key} is {value}")


def _out_of_range(plan: TensorPlan, reader: Reader, reason: str) -> InputError:
    """Which input holds NaN or Inf, and how many; where none does, ``reason``, with every input's largest weight."""
    counts: dict[StoredTensor, int] = {}
    largest: dict[StoredTensor, float] = {}
    for bundle in first_pass(plan):
        for piece in bundle.pieces:
            value = reader.read(piece)
            counts[piece.stored] = counts.get(piece.stored, 0) + int(ops.count_nonfinite(value))
            most = _largest(value) if value.is_floating_point() else 0.0
            largest[piece.stored] = max(largest.get(piece.stored, 0.0), most)
    found = [
        f"{stored.file}: tensor {stored.name!r} holds {count} NaN or Inf" for stored, count in counts.items() if count
    ]
    if found:
        return InputError("a weight is not finite:", found)
    sizes = [f"{stored.file}: the largest weight of {stored.name!r} is {most:.3g}" for stored, most in largest.items()]
    return InputError(f"tensor {plan.name!r}: {reason}", sizes)


def _largest(value: torch.Tensor) -> float:
    return max(map(abs, map(float, torch.aminmax(value)))) if value.numel() else 0.0


# No training moves a weight by so many times the tensor's largest one, or, where that is small, by so much. A flipped
# bit makes 1311 of 0.02 in float16, and 7e36 in the other dtypes.
ABSURD = 1e3


def _absurd(plan: TensorPlan, stats: Mapping[str, Any], reader: Reader) -> Iterator[str]:
    """A remark on every expert whose max |Δ_t| (‖Δ_t‖_F, where deltas are factors) is ``ABSURD`` times as large as 1,
    as the base's largest weight (its ‖θ₀‖_F) and as what the others have, in the median of those that have any.
    """
    kind, what = ("delta_norms", "‖Δ‖") if plan.pairs else ("delta_largest", "largest |Δ|")
    sizes: Sequence[float] = stats.get(kind, ())
    of_base: float | None = None
    for task, size in enumerate(sizes):
        others = [other for index, other in enumerate(sizes) if index != task and other > 0]
        beside = {"the others'": statistics.median_low(others)} if others else {}
        if size <= ABSURD * max([1.0, *beside.values()]):
            continue
        if plan.route.reads_base:
            of_base = _size_of_base(plan, reader) if of_base is None else of_base
            beside["the base's own weights'"] = of_base
        elif not others:
            beside["a matrix of ones'"] = math.sqrt(plan.spec.elements)
        if size > ABSURD * max(beside.values()):
            pair = plan.pairs[task] if plan.pairs else None
            file = plan.experts[task].file if pair is None else pair.a.file
            compared = " and ".join(f"{value:.3g}, {whose}" for whose, value in beside.items())
            yield f"{file}: its {what} is {size:.3g}, beside {compared}: is a weight damaged?"


def _size_of_base(plan: TensorPlan, reader: Reader) -> float:
    """max |θ₀|, or ‖θ₀‖_F where deltas are factors, read anew."""
    parts = (reader.read(piece) for rows in plan.route.parts() for piece in bundle_of(plan, rows, ()).pieces)
    if plan.pairs:
        return math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts))
    return max(map(_largest, parts))
