"""Runs a plan: read, compute, write, one tensor at a time, into a staged folder that one rename makes the output."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, ops
from .checkpoint.companions import config_with_dtype, copy_companions, model_card
from .checkpoint.layout import DTYPES, SINGLE_FILE, StoredTensor
from .checkpoint.manifest import FORMAT, MANIFEST_FILE, Journal, describe_inputs, fingerprint, to_json
from .checkpoint.reader import Reader
from .checkpoint.staging import Staging
from .checkpoint.writer import ShardWriter, sync_folder, write_durably
from .errors import ConfigError, InputError, ResourceError
from .heap import return_freed_blocks, trim_heap
from .methods import METHODS, NotFiniteError
from .plan import PART_ELEMENTS, Plan, TensorPlan, check_resources
from .report import REPORT_FILE, Progress, Report

Observer = Callable[[Progress], None]
# About what glibc's heap may keep of freed blocks. Tensors that come so close to the plan's peak return theirs at once.
HEAP_RESIDUE_BYTES = 128 << 20


def scaling_folders(scalings: tuple[float, ...]) -> dict[str, float]:
    """Sub-folder of the output for every α: the output itself when there is one, else ``scaling-<α>``."""
    return {"": scalings[0]} if len(scalings) == 1 else {f"scaling-{value:g}": value for value in scalings}


def resolve_device(device: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: unknown name.
        ResourceError: CUDA asked for and not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is unknown (known: auto, cpu, cuda, cuda:N)")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"device {device!r}: this torch sees {torch.cuda.device_count()} CUDA device(s)")
    return resolved


class Stopwatch:
    """Seconds by phase; phases nest, and time is counted for the innermost."""

    def __init__(self, progress: Progress, observer: Observer | None) -> None:
        self._progress, self._observer = progress, observer
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self._progress.phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str) -> None:
        now = time.perf_counter()
        if self._progress.phase:
            self._progress.seconds[self._progress.phase] += now - self._since
        self._since, self._progress.phase = now, name
        if self._observer is not None:
            self._observer(self._progress)


class CheckpointDeltas:
    """``methods.Deltas`` of one planned tensor: experts are read when a task is asked for.

    Small tensors' experts are kept between passes; of large ones a few rows are in memory at a time.
    """

    def __init__(
        self, plan: TensorPlan, base: Tensor, reader: Reader, device: torch.device, stopwatch: Stopwatch
    ) -> None:
        self._plan, self._base, self._reader, self._device, self._stopwatch = plan, base, reader, device, stopwatch
        self._kept: dict[int, Tensor] = {}
        self.read_bytes = 0

    @property
    def n_tasks(self) -> int:
        return len(self._plan.experts)

    @property
    def shape(self) -> torch.Size:
        return self._base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._plan.spec.dtype

    @property
    def device(self) -> torch.device:
        return self._device

    def _parts(self, *tasks: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """Rows of some experts with their place: at once where experts are kept, else block by block, never in whole.

        All of them together hold about ``PART_ELEMENTS`` elements at a time.
        """
        stored = [self._plan.experts[task] for task in tasks]
        if self._plan.keeps_experts:
            for task, expert in zip(tasks, stored, strict=True):
                if task not in self._kept:
                    self._kept[task] = self._read(expert)
            yield slice(None), [self._kept[task] for task in tasks]
            return
        trim_heap()
        for rows in ops.row_blocks(self.shape, PART_ELEMENTS // len(tasks)):
            yield rows, [self._read(expert, rows) for expert in stored]

    def _read(self, stored: StoredTensor, rows: slice | None = None) -> Tensor:
        with self._stopwatch.phase("read"):
            part = self._reader.read(stored, rows)
            self.read_bytes += part.nbytes
            return part.to(self._device)

    def delta(self, task: int) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self._device)
        for rows, (part,) in self._parts(task):
            if out.ndim:
                ops.subtract(part, self._base[rows], dtype=self.dtype, out=out[rows])
            else:
                ops.subtract(part, self._base, dtype=self.dtype, out=out)
        return out

    def sum(self, dtype: torch.dtype, batch_dims: int = 0) -> ops.TaskSum:
        if batch_dims:
            raise ValueError("deltas of a checkpoint are single tensors, not a batch")
        total = torch.empty(self.shape, dtype=dtype, device=self._device)
        seen = []
        for rows, experts in self._parts(*range(self.n_tasks)):
            place, base = (total[rows], self._base[rows]) if total.ndim else (total, self._base)
            seen.append(ops.task_sum(experts, base, out=place))
        return ops.TaskSum(
            total,
            torch.stack([part.squares for part in seen]).sum(0),
            torch.stack([part.largest for part in seen if part.largest is not None]).amax(0),
            torch.stack([part.nonfinite for part in seen]).sum(0),
        )


def run(
    plan: Plan,
    *,
    device: str = "auto",
    max_ram: int | None = None,
    max_vram: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> Report:
    """Executes ``plan`` and returns the report that is also in the output.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_ram, max_vram: ceilings in bytes; a plan that needs more is refused before anything is written.
        resume: continue an unfinished merge of the same config and inputs; a finished one is left as it is.
        overwrite: replace a finished output (at the commit, not before) or discard an unfinished one.
        observer: called at every change of phase.

    Raises:
        ConfigError, InputError, ResourceError: see ``errors``; the output is then absent or as it was before.
    """
    if plan.config.out is None:
        raise ConfigError("out is not given")
    target = resolve_device(device)
    check_resources(plan, max_ram=max_ram, max_vram=max_vram, device=target)
    if max_vram is not None and target.type == "cuda":
        total = torch.cuda.get_device_properties(target).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max_vram / total), target)
    with Staging(Path(plan.config.out), resume=resume, overwrite=overwrite) as staging:
        description = _describe(plan, target)
        if resume and staging.is_committed:
            finished = json.loads((staging.out / MANIFEST_FILE).read_bytes())
            staging.discard()
            if finished.get("description") != json.loads(to_json(description)):
                raise ConfigError(f"{staging.out}: holds another merge; --overwrite replaces it")
            return Report.from_dict(json.loads((staging.out / REPORT_FILE).read_bytes()))
        try:
            return _Run(plan, target, staging, description, resume, observer).execute()
        except InputError:
            staging.discard()  # the same inputs cannot succeed later
            raise
        except OSError as error:
            raise ResourceError(f"{error.filename or staging.out}: {error.strerror}; --resume continues") from error


def _describe(plan: Plan, device: torch.device) -> dict[str, Any]:
    """All that decides the output's bytes."""
    config = {key: value for key, value in asdict(plan.config).items() if key not in ("out", "base", "experts")}
    return {
        "tool": "isomerge-fast",
        "version": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "config": config,
        # A ceiling can mean another solver, and with it other last digits.
        "solvers": sorted({tensor.reason for tensor in plan.tensors if tensor.method is not None}),
        "inputs": describe_inputs([plan.base, *plan.experts]),
    }


class _Run:
    """One execution of a plan in its staging folder."""

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        staging: Staging,
        description: dict[str, Any],
        resume: bool,
        observer: Observer | None,
    ) -> None:
        self._plan, self._device, self._staging, self._resume = plan, device, staging, resume
        self._description = description
        self._folders = scaling_folders(plan.config.scalings)
        self._progress = Progress(len(plan.tensors), plan.read_bytes + plan.write_bytes)
        self._stopwatch = Stopwatch(self._progress, observer)
        self._writers: dict[tuple[str, str], ShardWriter] = {}

    def execute(self) -> Report:
        started = time.perf_counter()
        self._staging.start()
        journal = Journal(self._staging.journal_path, fingerprint(self._description), resume=self._resume)
        completed = False
        try:
            self._open_writers()
            with Reader(self._plan.base, *self._plan.experts) as reader:
                for tensor in self._plan.tensors:
                    self._progress.tensor = tensor.name
                    entry = journal.finished.get(tensor.name)
                    if entry is None or not self._is_intact(tensor, entry):
                        journal.add(self._merge_tensor(tensor, reader))
                    self._progress.done_tensors += 1
                    self._progress.done_bytes += tensor.base.bytes + sum(expert.bytes for expert in tensor.experts)
                    self._progress.done_bytes += tensor.out.bytes * len(self._folders)
                reader.check_unchanged()
            completed = True
        finally:
            with self._stopwatch.phase("write"):
                for writer in self._writers.values():
                    writer.close(validate=completed)
            journal.close()
            return_freed_blocks(eager=False)  # as glibc's own threshold ends up; the process may go on without us
        return self._finish(journal.finished, started)

    def _open_writers(self) -> None:
        for folder in self._folders:
            (self._staging.new / folder).mkdir(exist_ok=True)
            for shard, tensors in self._plan.shards.items():
                path = self._staging.new / folder / shard
                self._writers[folder, shard] = ShardWriter(path, tensors, resume=self._resume)

    def _shard_of(self, tensor: TensorPlan) -> str:
        return tensor.base.file.name if tensor.base.file.name in self._plan.shards else SINGLE_FILE

    def _is_intact(self, tensor: TensorPlan, entry: dict[str, Any]) -> bool:
        """Whether the bytes that the journal claims are in the staged shards."""
        shard = self._shard_of(tensor)
        with self._stopwatch.phase("read"):
            return all(
                self._writers[folder, shard].checksum(tensor.name) == entry["sha256"].get(folder)
                for folder in self._folders
            )

    def _merge_tensor(self, plan: TensorPlan, reader: Reader) -> dict[str, Any]:
        started = time.perf_counter()
        decides_peak = plan.peak_bytes > max(HEAP_RESIDUE_BYTES, self._plan.peak_working_bytes - HEAP_RESIDUE_BYTES)
        return_freed_blocks(eager=decides_peak)
        with self._stopwatch.phase("read"):
            base = reader.read(plan.base)
        report: dict[str, Any] = {"name": plan.name, "action": plan.action, "read_bytes": plan.base.bytes}
        if plan.method is None:
            value, stats = None, {"algorithm": "copy"}
            base = base.to(DTYPES[plan.out.dtype])
        else:
            value, stats, read_bytes, base = self._solve(plan, base, reader, report)
            report["read_bytes"] += read_bytes
        checksums = {}
        with self._stopwatch.phase("compute"):
            outputs = [base] * len(self._folders) if value is None else self._apply(plan, base, value)
            del value
        for folder, out in zip(self._folders, outputs, strict=True):
            with self._stopwatch.phase("write"):
                checksums[folder] = self._writers[folder, self._shard_of(plan)].write(plan.name, out.to("cpu"))
        report.update(stats)
        report["write_bytes"] = plan.out.bytes * len(self._folders)
        report["seconds"] = round(time.perf_counter() - started, 6)
        return {"name": plan.name, "sha256": checksums, "report": report}

    def _solve(
        self, plan: TensorPlan, base: Tensor, reader: Reader, report: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any], int, Tensor]:
        """(merged Δ, its evidence, bytes read, the base on the device used)."""
        assert plan.method is not None
        device = self._device
        with self._stopwatch.phase("compute"):
            try:
                try:
                    on_device = base.to(device)
                    deltas = CheckpointDeltas(plan, on_device, reader, device, self._stopwatch)
                    value, stats = plan.method.merge(deltas)
                except torch.OutOfMemoryError:
                    if device.type == "cpu":
                        raise
                    report["remarks"] = f"out of memory on {device}: computed on the CPU"
                    torch.cuda.empty_cache()
                    on_device = base
                    deltas = CheckpointDeltas(plan, base, reader, torch.device("cpu"), self._stopwatch)
                    value, stats = plan.method.merge(deltas)
            except NotFiniteError as error:
                raise self._not_finite(plan, reader) from error
            evidence = stats.to_dict()
        return value, evidence, deltas.read_bytes, on_device

    def _not_finite(self, plan: TensorPlan, reader: Reader) -> InputError:
        """Which input holds the NaN or Inf, and how many."""
        found = [
            f"{stored.file}: tensor {plan.name!r} holds {count} NaN or Inf"
            for stored in (plan.base, *plan.experts)
            if (count := ops.count_nonfinite(reader.read(stored)))
        ]
        return InputError("a weight is not finite:", found or [f"tensor {plan.name!r}: the deltas overflow float32"])

    def _apply(self, plan: TensorPlan, base: Tensor, value: Tensor) -> list[Tensor]:
        """θ₀ + α Δ for every α, from one read of both."""
        dtype, scalings = DTYPES[plan.out.dtype], list(self._folders.values())
        outputs = ops.apply_delta(base, value, scalings=scalings, dtype=dtype, seed=plan.rounding_seed)
        for scaling, out in zip(scalings, outputs, strict=True):
            if dtype == torch.float16 and (count := ops.count_nonfinite(out)):
                raise InputError(
                    f"tensor {plan.name!r}: {count} merged weights overflow float16 at scaling {scaling:g}"
                )
        return outputs

    def _finish(self, finished: dict[str, dict[str, Any]], started: float) -> Report:
        """Everything beside the weights, then the commit."""
        plan, config = self._plan, self._plan.config
        entries = [finished[tensor.name] for tensor in plan.tensors]
        total_bytes = sum(tensor.out.bytes for tensor in plan.tensors)
        for folder, scaling in self._folders.items():
            path = self._staging.new / folder
            if plan.base.is_folder:
                copy_companions(plan.base.path, path, plan.companions)
            if plan.base.config is not None:
                text = json.dumps(config_with_dtype(plan.base.config, config.dtype), indent=2, ensure_ascii=False)
                write_durably(path / "config.json", (text + "\n").encode())
            if plan.base.index_name is not None:
                weight_map = {tensor.name: self._shard_of(tensor) for tensor in plan.tensors}
                index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
                write_durably(path / plan.base.index_name, to_json(index, indent=2))
            write_durably(path / "README.md", self._card(scaling).encode())
            for name in plan.companions:
                _sync_file(path / name)
            sync_folder(path)
        manifest = {
            "format": FORMAT,
            "description": self._description,
            "outputs": {
                folder: {
                    "scaling": scaling,
                    "tensors": {
                        tensor.name: {
                            "file": self._shard_of(tensor),
                            "action": tensor.action,
                            "sha256": entry["sha256"][folder],
                        }
                        for tensor, entry in zip(plan.tensors, entries, strict=True)
                    },
                }
                for folder, scaling in self._folders.items()
            },
        }
        report = Report(
            version=__version__,
            method=config.method,
            scaling=list(config.scalings),
            outputs=[str(self._staging.out / folder) for folder in self._folders],
            device=str(self._device),
            tensors=[entry["report"] for entry in entries],
            seconds={**self._progress.seconds, "total": time.perf_counter() - started},
            notes=list(plan.notes),
        )
        write_durably(self._staging.new / MANIFEST_FILE, to_json(manifest))
        write_durably(self._staging.new / REPORT_FILE, to_json(report.to_dict()))
        self._staging.commit()
        return report

    def _card(self, scaling: float) -> str:
        config, plan = self._plan.config, self._plan
        return model_card(
            base=str(plan.base.path),
            experts=[str(expert.path) for expert in plan.experts],
            method=config.method,
            citation=METHODS[config.method].citation,
            options=config.options,
            overrides=[asdict(override) for override in config.overrides],
            scaling=scaling,
            exclude=config.exclude,
            dtype=config.dtype,
            stochastic_rounding=config.stochastic_rounding,
            on_extra=config.on_extra,
            version=__version__,
            library_name="transformers" if "model_type" in (plan.base.config or {}) else None,
        )


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
