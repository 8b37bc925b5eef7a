"""Runs a plan: read, compute, write, one tensor at a time, into a staged folder that one rename makes the output."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import __version__, ops
from .checkpoint.checksum import ALGORITHM
from .checkpoint.companions import config_with_dtype, copy_companions, model_card
from .checkpoint.layout import ADAPTER_CONFIG_FILE, StoredTensor
from .checkpoint.manifest import FORMAT, MANIFEST_FILE, Journal, describe_inputs, fingerprint, read_manifest, to_json
from .checkpoint.read_ahead import THREADS as READ_THREADS
from .checkpoint.read_ahead import ReadAhead
from .checkpoint.reader import Reader, allow_open_files
from .checkpoint.staging import Staging
from .checkpoint.write_behind import WriteBehind
from .checkpoint.writer import ShardWriter, write_durably
from .config import MergeConfig
from .errors import ConfigError, InputError, ResourceError, VerificationError, nearest
from .heap import return_freed_blocks
from .methods import METHODS, Method, NotFiniteError
from .methods.certified import UnsolvedError, exact_products
from .methods.factors import merge_factors
from .output import TensorOutput
from .plan import DELTA_FOLDER, Plan, TensorPlan, check_resources, scaling_folders
from .report import REPORT_FILE, Observer, Progress, Report, Stopwatch
from .routes import ADAPTER, BY_ROWS
from .sources import FactorSource, TensorSource, first_pass
from .transfers import Uploads
from .workers import Workers

# About what glibc's heap may keep of freed blocks. Tensors that come so close to the plan's peak return theirs at once.
HEAP_RESIDUE_BYTES = 128 << 20
IO = ("auto", "buffered")


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


def run(
    plan: Plan,
    *,
    device: str = "auto",
    max_ram: int | None = None,
    max_vram: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    observer: Observer | None = None,
) -> Report:
    """Executes ``plan`` and returns the report that is also in the output.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_ram, max_vram: ceilings in bytes; a plan that needs more is refused before anything is written.
        resume: continue an unfinished merge of the same config and inputs; a finished one is left as it is.
        overwrite: replace a finished output (at the commit, not before) or discard an unfinished one.
        io: ``auto``: files past the page cache where that is faster and the file system can; ``buffered``: never.
        observer: called at every change of phase.

    Raises:
        ConfigError, InputError, ResourceError: see ``errors``; the output is then absent or as it was before.
    """
    if plan.config.out is None:
        raise ConfigError("out is not given")
    if io not in IO:
        raise ConfigError(f"io {io!r} is unknown{nearest(io, IO)}")
    target = resolve_device(device)
    check_resources(plan, max_ram=max_ram, max_vram=max_vram, device=target)
    if max_vram is not None and target.type == "cuda":
        total = torch.cuda.get_device_properties(target).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max_vram / total), target)
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)
    with Staging(Path(plan.config.out), resume=resume, overwrite=overwrite) as staging:
        description = _describe(plan, target)
        try:
            if resume and staging.is_committed:
                finished = _finished_report(staging.out, description, overwrite)
                if finished is not None or not overwrite:
                    staging.discard()
                if finished is not None:
                    return finished
                if not overwrite:
                    raise ConfigError(f"{staging.out}: holds another merge; --overwrite replaces it")
            return _Run(plan, target, staging, description, resume, overwrite, io == "auto", observer).execute()
        except InputError:
            staging.discard()  # the same inputs cannot succeed later
            raise
        except OSError as error:
            raise ResourceError(f"{error.filename or staging.out}: {error.strerror}; --resume continues") from error
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"{target} is out of memory ({error}); a lower --max-vram takes less") from error


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


def _finished_report(out: Path, description: dict[str, Any], overwrite: bool) -> Report | None:
    """Of the finished merge in ``out``; None where that is of another description, or damaged and to be replaced."""
    try:
        if read_manifest(out).get("description") != json.loads(to_json(description)):
            return None
        try:
            return Report.from_dict(json.loads((out / REPORT_FILE).read_bytes()))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise VerificationError(f"{out / REPORT_FILE}: cannot be read ({error})") from error
    except VerificationError:
        if overwrite:
            return None
        raise


class _Run:
    """One execution of a plan in its staging folder."""

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        staging: Staging,
        description: dict[str, Any],
        resume: bool,
        overwrite: bool,
        direct: bool,
        observer: Observer | None,
    ) -> None:
        self._direct, self._overwrite = direct, overwrite
        self._io: dict[str, Any] = {}
        self._plan, self._device, self._staging, self._resume = plan, device, staging, resume
        self._description = description
        self._scalings = scaling_folders(plan.config.scalings)
        self._progress = Progress(len(plan.tensors), plan.read_bytes + plan.write_bytes)
        self._stopwatch = Stopwatch(self._progress, observer)
        self._writers: dict[tuple[str, str], ShardWriter] = {}

    def execute(self) -> Report:
        started = time.perf_counter()
        journal = Journal(
            self._staging.journal_path,
            fingerprint(self._description),
            self._description["inputs"],
            threads=torch.get_num_threads(),
            resume=self._resume,
            overwrite=self._overwrite,
        )
        completed = False
        threads = torch.get_num_threads()
        torch.set_num_threads(journal.threads)
        try:
            # Shards are worth nothing without a journal that tells what is in them.
            folders = self._plan.folders.items()
            shards = [(Path(folder) / file).as_posix() for folder, files in folders for file in files]
            self._staging.start(shards if journal.finished else ())
            self._open_writers()
            self._merge_all(journal)
            completed = True
        finally:
            with self._stopwatch.phase("write"), ExitStack() as closing:
                # As glibc's own threshold ends up; the process may go on without us.
                closing.callback(return_freed_blocks, eager=False)
                closing.callback(journal.close)
                closing.callback(torch.set_num_threads, threads)
                for writer in self._writers.values():
                    closing.callback(writer.close, validate=completed)
        return self._finish(journal.finished, started)

    def _open_writers(self) -> None:
        allow_open_files(2 * sum(map(len, self._plan.folders.values())))
        for folder, files in self._plan.folders.items():
            (self._staging.new / folder).mkdir(exist_ok=True)
            for file, tensors in files.items():
                path = self._staging.new / folder / file
                writer = ShardWriter(path, tensors, resume=self._resume, direct=self._direct)
                self._writers[folder, file] = writer

    def _writers_of(self, tensor: TensorPlan) -> dict[str, ShardWriter]:
        """By folder."""
        return {
            folder: self._writers[folder, tensor.shard]
            for folder in self._plan.folders
            if folder != DELTA_FOLDER or tensor.delta is not None
        }

    def _merge_all(self, journal: Journal) -> None:
        """Reads ahead, merges and writes behind, tensor after tensor; what the journal has and the files hold is
        kept.
        """
        plan, budget = self._plan, self._plan.budget
        intact = {
            tensor.name
            for tensor in plan.tensors
            if tensor.name in journal.finished and self._is_intact(tensor, journal.finished[tensor.name])
        }
        ahead_of = (bundle for tensor in plan.tensors if tensor.name not in intact for bundle in first_pass(tensor))
        with (
            Reader(plan.base, *plan.experts, direct=self._direct) as reader,
            ThreadPoolExecutor(READ_THREADS, "isomerge-read") as threads,
            ReadAhead(
                reader,
                threads,
                ahead_of,
                budget_bytes=budget.read_ahead,
                pinned=self._device.type == "cuda",
            ) as ahead,
            Uploads(ahead, self._device) as uploads,
            WriteBehind(budget.write_behind) as writes,
            Workers() as workers,
        ):
            for tensor in plan.tensors:
                self._progress.tensor = tensor.name
                if tensor.name not in intact:
                    if tensor.pairs:
                        source = FactorSource(tensor, uploads, workers, self._device, self._stopwatch.phase)
                    else:
                        source = TensorSource(
                            tensor, uploads, reader, threads, workers, budget, self._device, self._stopwatch.phase
                        )
                    self._merge_tensor(tensor, source, reader, writes, journal)
                self._progress.done_tensors += 1
                self._progress.done_bytes += tensor.read_bytes + self._write_bytes(tensor)
            with self._stopwatch.phase("write"):
                writes.drain()
            reader.check_unchanged()
            self._io = {
                "read": "direct" if reader.direct_files else "page-cache",
                "write": "direct" if any(writer.is_direct for writer in self._writers.values()) else "page-cache",
                "reading_seconds": ahead.busy_seconds,
                "writing_seconds": writes.busy_seconds,
            }
            if self._device.type == "cuda":
                self._io["peak_vram_bytes"] = torch.cuda.max_memory_allocated(self._device)

    def _write_bytes(self, tensor: TensorPlan) -> int:
        kept = 0 if tensor.delta is None else tensor.delta.bytes
        return tensor.write_bytes * len(self._scalings) + kept

    def _is_intact(self, tensor: TensorPlan, entry: dict[str, Any]) -> bool:
        """Whether the bytes that the journal claims are in the staged shards."""
        with self._stopwatch.phase("read"):
            return all(
                writer.checksum(name) == entry["checksum"].get(folder, {}).get(name)
                for folder, writer in self._writers_of(tensor).items()
                for name in tensor.names_in(folder)
            )

    def _merge_tensor(
        self,
        plan: TensorPlan,
        source: FactorSource | TensorSource,
        reader: Reader,
        writes: WriteBehind,
        journal: Journal,
    ) -> None:
        started = time.perf_counter()
        work, peak = plan.route.work_bytes, self._plan.peak_work_bytes
        return_freed_blocks(eager=work > max(HEAP_RESIDUE_BYTES, peak - HEAP_RESIDUE_BYTES))
        report: dict[str, Any] = {"name": plan.name, "action": plan.action, "route": plan.route.name}
        output = TensorOutput(plan, self._writers_of(plan), self._scalings, writes, self._stopwatch.phase)
        with self._stopwatch.phase("compute"):
            try:
                if isinstance(source, FactorSource):
                    stats = _merge_factors(plan, source, output)
                elif plan.method is None:
                    stats = _copy(source, output)
                elif plan.route.name == BY_ROWS:
                    stats = _merge_by_rows(plan.method, source, output)
                else:
                    stats = _merge_whole(plan.method, source, output, report)
            except NotFiniteError as error:
                raise _not_finite(plan, reader) from error
            except UnsolvedError as error:
                raise InputError(f"tensor {plan.name!r}: {error}") from error
            output.check_finite()
        report.update(stats)
        report["read_bytes"] = source.read_bytes
        report["write_bytes"] = self._write_bytes(plan)
        report["seconds"] = round(time.perf_counter() - started, 6)

        def finish() -> None:
            journal.add({"name": plan.name, "checksum": output.checksums(), "report": report})

        with self._stopwatch.phase("write"):
            writes.put(finish)

    def _finish(self, finished: dict[str, dict[str, Any]], started: float) -> Report:
        """Everything beside the weights, then the commit."""
        plan, config = self._plan, self._plan.config
        entries = {tensor.name: finished[tensor.name] for tensor in plan.tensors}
        for folder, files in plan.folders.items():
            path = self._staging.new / folder
            if folder in self._scalings:
                self._add_companions(path, self._scalings[folder])
            if plan.index_name is not None:
                total_bytes = sum(output.bytes for tensors in files.values() for output in tensors)
                weight_map = {output.name: file for file, tensors in files.items() for output in tensors}
                index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
                write_durably(path / plan.index_name, to_json(index, indent=2))
        manifest = {
            "format": FORMAT,
            "checksum": ALGORITHM,
            "description": self._description,
            "outputs": {
                folder: {
                    "scaling": self._scalings.get(folder),
                    "tensors": {
                        name: {"file": tensor.shard, "action": tensor.action, "checksum": checksum}
                        for tensor in plan.tensors
                        for name, checksum in entries[tensor.name]["checksum"].get(folder, {}).items()
                    },
                }
                for folder in plan.folders
            },
        }
        report = Report(
            version=__version__,
            method=config.method,
            scaling=list(config.scalings),
            outputs=[str(self._staging.out / folder) for folder in plan.folders],
            device=str(self._device),
            tensors=[entry["report"] for entry in entries.values()],
            seconds={**self._progress.seconds, "total": time.perf_counter() - started},
            io=self._io,
            notes=list(plan.notes),
        )
        write_durably(self._staging.new / MANIFEST_FILE, to_json(manifest))
        write_durably(self._staging.new / REPORT_FILE, to_json(report.to_dict()))
        self._staging.commit()
        return report

    def _add_companions(self, path: Path, scaling: float) -> None:
        """What belongs to a checkpoint, or an adapter, beside its weights and their index."""
        plan = self._plan
        if plan.base.is_folder:
            copy_companions(plan.base.path, path, plan.companions)
        if plan.adapter_settings is not None:
            write_durably(path / ADAPTER_CONFIG_FILE, to_json(plan.adapter_settings, indent=2))
        elif plan.base.config is not None:
            text = json.dumps(config_with_dtype(plan.base.config, plan.config.dtype), indent=2, ensure_ascii=False)
            write_durably(path / "config.json", (text + "\n").encode())
        write_durably(path / "README.md", self._card(scaling).encode())

    def _card(self, scaling: float) -> str:
        plan, config = self._plan, self._plan.config
        nothing = MergeConfig(base="", experts=[])
        said = {
            key: value
            for key, value in asdict(config).items()
            if key not in ("out", "save_delta") and value != getattr(nothing, key)
        }
        recipe = {
            "method": config.method,
            **said,
            "base": str(plan.base.path),
            "experts": [str(expert.path) for expert in plan.experts],
            "scaling": scaling,
        }
        kinds = {"LoRA adapters": plan.has_adapters, "deltas": config.experts_are_deltas}
        library = "transformers" if "model_type" in (plan.base.config or {}) else None
        return model_card(
            recipe,
            kind=next((kind for kind, holds in kinds.items() if holds), "checkpoints"),
            citation=METHODS[config.method].citation,
            version=__version__,
            library=library if plan.adapter_settings is None else "peft",
        )


def _merge_factors(plan: TensorPlan, source: FactorSource, output: TensorOutput) -> dict[str, Any]:
    assert plan.method is not None
    merged, stats = merge_factors(plan.method, source.factors(), source.shape, source.dtype)
    if plan.route.name == ADAPTER:
        left, right, truncation = merged.truncated(plan.outputs[0].shape[0])
        output.add_factors(left, right)
        return {**stats.to_dict(), "truncation": truncation}
    left, right = merged.left.to(source.dtype), merged.right.to(source.dtype)
    del merged
    with exact_products(source.device):
        for block in source.base_blocks():
            if ops.count_nonfinite(block.base):
                raise NotFiniteError([0])
            output.add(block, lambda part: left[part.rows] @ right, source.parts(block), source)
    return stats.to_dict()


def _copy(source: TensorSource, output: TensorOutput) -> dict[str, Any]:
    for block in source.blocks():
        output.copy(block, source.parts(block), source)
    return {"algorithm": "copy"}


def _merge_by_rows(method: Method, source: TensorSource, output: TensorOutput) -> dict[str, Any]:
    row_map = method.row_map(source)
    for block in source.blocks():
        if method.any_shape:
            output.add(block, row_map.rows, source.parts(block), source)
        else:  # matrices are multiplied, with all threads at once
            for piece in output.pieces(block):
                output.add(piece, row_map.rows, [piece], source)
    return row_map.stats().to_dict()


def _merge_whole(method: Method, source: TensorSource, output: TensorOutput, report: dict[str, Any]) -> dict[str, Any]:
    try:
        value, stats = method.merge(source)
    except torch.OutOfMemoryError:
        if source.device.type == "cpu":
            raise
        report["remarks"] = f"out of memory on {source.device}: computed on the CPU"
        torch.cuda.empty_cache()
        source.on_cpu()
        value, stats = method.merge(source)
    for block in source.base_blocks():
        output.add(block, lambda part: value[part.rows], source.parts(block), source)
    return stats.to_dict()


def _not_finite(plan: TensorPlan, reader: Reader) -> InputError:
    """Which input holds the NaN or Inf, and how many."""
    counts: dict[StoredTensor, int] = {}
    for bundle in first_pass(plan):
        for piece in bundle.pieces:
            counts[piece.stored] = counts.get(piece.stored, 0) + ops.count_nonfinite(reader.read(piece))
    found = [
        f"{stored.file}: tensor {stored.name!r} holds {count} NaN or Inf" for stored, count in counts.items() if count
    ]
    return InputError("a weight is not finite:", found or [f"tensor {plan.name!r}: the deltas overflow float32"])
