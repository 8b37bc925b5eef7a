"""Execute a plan: its work items, by one process or by many, into a staged folder that one rename makes the output."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint.io.writer import create_shard
from ..checkpoint.output.journal import Entries, Journal, delete_journals
from ..checkpoint.output.json_files import to_json
from ..checkpoint.output.manifest import (
    MANIFEST_FILE,
    ShardEntry,
    describe_inputs,
    file_name,
    fingerprint,
    read_manifest,
)
from ..checkpoint.output.staging import Staging, check_replaceable
from ..errors import ConfigError, InputError, LostWritesError, ResourceError, VerificationError, nearest, shown, visible
from ..linalg.cusolver import describe_eigensolvers
from ..methods import origins_of
from ..ops import indexed
from ..parsing.values import flag, refuse, whole_number
from ..planning.plan import Plan
from ..planning.planner import scheduled
from ..planning.resources import check_resources
from .finalize import read_report, write_metadata
from .report import PHASES, Observer, Report
from .work_item import MergeSettings, WorkItem, WorkResult
from .worker import merge_item

IO = ("auto", "buffered")
# What cannot wait for the report. Without a handler of the caller's, Python prints it on standard error.
LOG = logging.getLogger("isomerge_fast")
# More are started one by one until the machine has no room for another.
MOST_THREADS = 4_096


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` names, with its number; refuse a missing one."""
    if not isinstance(device, str | torch.device):
        refuse(device, "device", "auto, cpu, cuda or cuda:N")
    if device == "auto":
        return indexed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        resolved = torch.device(device)
    except (RuntimeError, UnicodeError):
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {shown(str(device))} is unknown (known: auto, cpu, cuda, cuda:N)")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"device {device!r}: this torch sees {torch.cuda.device_count()} CUDA device(s)")
    return indexed(resolved)


# Merges all tensors of a plan, as work items of ``merge_item``; given the journal entries of earlier runs, by tensor.
Executor = Callable[[Plan, MergeSettings, Entries, Observer | None], list[WorkResult]]


def merge_here(plan: Plan, settings: MergeSettings, entries: Entries, observer: Observer | None) -> list[WorkResult]:
    """Merge all tensors of a plan in this process, as one work item: the ``Executor`` where none is given."""
    return [merge_item(settings, WorkItem.of(plan, 1, plan.tensors, entries), observer)]


def run(plan: Plan, **options: Any) -> Report:
    """Execute ``plan`` as the fields of an ``Execution`` say; return the report that is also in the output.

    After an error the output is absent or as it was before.
    """
    return Execution(plan, **options).run()


@dataclass
class Execution:
    """Hold a plan, and how it is executed.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_ram, max_vram: ceilings in bytes for each process; a plan that needs more is refused before anything is
            written.
        threads: CPU cores that each process computes with; as many as the plan is for when None. Where a tensor is
            computed by several, its last digits depend on how many: then an unfinished merge goes on with the number
            that it began with.
        resume: continue an unfinished merge of the same config and inputs; a finished one is left as it is.
        overwrite: replace a finished output (at the commit, not before) or discard an unfinished one.
        io: ``auto``: files past the page cache where that is faster and the file system can; ``buffered``: never.
        observer: called at every change of phase.
        executor: shares the work out among processes; all is done in this one when None.
    """

    plan: Plan
    _: KW_ONLY
    device: str = "auto"
    max_ram: int | None = None
    max_vram: int | None = None
    threads: int | None = None
    resume: bool = False
    overwrite: bool = False
    io: str = "auto"
    observer: Observer | None = None
    executor: Executor | None = None

    def run(self) -> Report:
        """Execute the plan (see ``run``)."""
        out, target = self._check()
        with Staging(Path(out), resume=self.resume, overwrite=self.overwrite) as staging:
            description = _describe(self.plan, target)
            try:
                if self.resume and staging.is_committed:
                    finished = self._finished(staging, description)
                    if finished is not None:
                        return finished
                return self._merge(staging, description, target)
            except InputError:
                staging.discard()  # the same inputs cannot succeed later
                raise
            except (OSError, ResourceError) as error:
                staging.check_mine()  # what is gone may have gone with the folder
                if isinstance(error, LostWritesError):
                    with suppress(OSError):  # a disk that takes nothing at all is mounted anew, without its cache
                        delete_journals(staging.folder)
                if isinstance(error, OSError):
                    raise ResourceError(
                        f"{error.filename or staging.out}: {error.strerror}; --resume continues"
                    ) from error
                raise

    def _check(self) -> tuple[str, torch.device]:
        """Read the options, and refuse what cannot be honoured; return the output's path and the device."""
        plan, out = self.plan, self.plan.config.out
        if out is None:
            raise ConfigError("out is not given: the folder that the merge is written into (a plan alone needs none)")
        if not isinstance(self.io, str) or self.io not in IO:
            raise ConfigError(f"io {shown(self.io)} is unknown{nearest(self.io, IO)}")
        self.threads = None if self.threads is None else whole_number(self.threads, "threads", 1, MOST_THREADS)
        self.resume, self.overwrite = flag(self.resume, "resume"), flag(self.overwrite, "overwrite")
        if self.observer is not None and not callable(self.observer):
            refuse(self.observer, "observer", "a function of the progress, or None")
        target = torch.device(self.device) if self.executor is not None else resolve_device(self.device)
        check_resources(plan, max_ram=self.max_ram, max_vram=self.max_vram, device=target)
        _check_names(plan, out)
        return out, target

    def _finished(self, staging: Staging, description: Mapping[str, Any]) -> Report | None:
        """Return the report of the finished merge in the output's place; None where that is to be replaced."""
        finished = None
        try:
            if read_manifest(staging.out)["description"] == json.loads(to_json(description)):
                finished = read_report(staging.out)[0]
        except (InputError, VerificationError) as error:
            if not self.overwrite:
                raise VerificationError(str(error)) from error
        if finished is not None or not self.overwrite:
            staging.discard()
        if finished is None:
            if not self.overwrite:
                raise ConfigError(f"{staging.out}: holds another merge; --overwrite replaces it")
            check_replaceable(staging.out)
        return finished

    def _merge(self, staging: Staging, description: dict[str, Any], target: torch.device) -> Report:
        started = time.perf_counter()
        key, notes, plan = fingerprint(description), [], self.plan
        if self.threads not in (None, plan.cores):
            plan = scheduled(plan, self.threads, target, self.max_ram)
        cores = plan.cores_of_tensors
        library = describe_eigensolvers(target) if plan.budget.solving else ""
        begun = {"resume": self.resume, "overwrite": self.overwrite}
        journal = Journal(staging.folder, key, description["inputs"], cores=cores, eigenvectors=library, **begun)
        if journal.eigenvectors != library:
            notes.append(
                f"eigenvectors were computed by {journal.eigenvectors} when the merge began, and are by {library} now: "
                "the last digits of what is left differ from what they would have been"
            )
        if journal.cores != cores:
            plan = plan.with_cores(journal.cores)
            differ = sum(journal.cores.get(name, 1) != cores.get(name, 1) for name in {*cores, *journal.cores})
            notes.append(
                f"{differ} tensor(s) are computed by as many cores as when the merge began, and not by as many as "
                "threads and memory suggest now: their last digits depend on it (--overwrite instead of --resume "
                "begins anew)"
            )
        for note in notes:
            LOG.warning("%s: %s", visible(str(staging.out)), note)
        shards = _create_files(plan, staging, journal, self.resume)
        given = {"device": str(target), "threads": plan.cores, "max_vram": self.max_vram}
        settings = MergeSettings.of(plan, staging.folder, key, direct=self.io == "auto", **given)
        prepared = time.perf_counter() - started
        results = (self.executor or merge_here)(plan, settings, journal.finished, self.observer)
        entries = Entries()
        for result in results:
            entries |= result.entries
        reports, processes = _reports(plan, entries)
        seconds = {phase: sum(result.seconds[phase] for result in results) for phase in PHASES}
        seconds |= {"prepare": seconds["prepare"] + prepared, "total": time.perf_counter() - started}
        report = Report(
            version=__version__,
            method=plan.config.method,
            scaling=list(plan.config.scalings),
            outputs=[str(staging.out / folder) for folder in plan.folders],
            device=settings.device,
            tensors=reports,
            seconds=seconds,
            io=_io(results),
            notes=[*plan.notes, *staging.notes, *notes],
            left_out=[each.to_dict() for each in plan.left_out],
            left_behind=[left.to_dict() for left in plan.left_behind],
            workers=_workers(results, reports, processes),
        )
        write_metadata(plan, staging.new, description, entries, shards, report)
        staging.commit()
        return report


def _check_names(plan: Plan, out: str) -> None:
    """Raise ConfigError where a path is bytes that are no text, as all that is written about it is JSON."""
    checkpoints = (plan.base, *plan.experts)
    inputs = [str(path.absolute()) for found in checkpoints for path in (found.path, *found.files)]
    for name in (os.path.realpath(out), *inputs, *plan.companions):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            encoding = sys.getfilesystemencoding()
            raise ConfigError(
                f"{name}: no text in {encoding}, so {MANIFEST_FILE} cannot record it; rename it"
            ) from error


def _create_files(plan: Plan, staging: Staging, journal: Journal, resume: bool) -> dict[str, ShardEntry]:
    """Create all files that work items write into; return what the manifest says of them."""
    shards: dict[str, ShardEntry] = {}
    folders = plan.folders.items()
    # Shards are worth nothing without a journal that tells what is in them.
    kept = [(Path(folder) / file).as_posix() for folder, files in folders for file in files]
    staging.start(kept if journal.finished else ())
    for folder, files in folders:
        (staging.new / folder).mkdir(exist_ok=True)
        for file, tensors in files.items():
            size, header_sha256 = create_shard(
                staging.new / folder / file, tensors, resume=resume, metadata=plan.metadata_of(folder, file)
            )
            shards[file_name(folder, file)] = {"bytes": size, "header_sha256": header_sha256}
    return shards


def _io(results: Sequence[WorkResult]) -> dict[str, Any]:
    """Return how all processes together read and wrote."""
    found = [result.io for result in results]
    io: dict[str, Any] = {
        way: "direct" if any(each[way] == "direct" for each in found) else "page-cache" for way in ("read", "write")
    }
    io |= {key: sum(each[key] for each in found) for key in ("reading_seconds", "writing_seconds")}
    if peaks := [each["peak_vram_bytes"] for each in found if "peak_vram_bytes" in each]:
        io["peak_vram_bytes"] = max(peaks)
    return io


def _reports(plan: Plan, entries: Entries) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return every tensor's part of the report, where equal strings are one object, and the process that merged it."""
    reports, processes = [], []
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    for tensor in plan.tensors:
        entry = entries[tensor.name]
        reports.append(
            {
                sys.intern(key): sys.intern(value) if isinstance(value, str) else value
                for key, value in entry["report"].items()
            }
        )
        process = entry["process"]
        processes.append(known.setdefault((process["host"], process["pid"]), process))
    return reports, processes


def _workers(
    results: Sequence[WorkResult], reports: Sequence[Mapping[str, Any]], processes: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return what each process did, also in earlier runs; the one that was busy longest comes first."""
    nothing = {"units": 0, "tensors": 0, "read_bytes": 0, "write_bytes": 0, "seconds": 0.0}
    found: dict[tuple[str, int], dict[str, Any]] = {}

    def of(process: Mapping[str, Any]) -> dict[str, Any]:
        return found.setdefault((process["host"], process["pid"]), {**process, **nothing})

    for process, report in zip(processes, reports, strict=True):
        worker = of(process)
        worker["tensors"] += 1
        for key in ("read_bytes", "write_bytes", "seconds"):
            worker[key] += report[key]
    for result in results:
        of(result.process)["units"] += 1
    return sorted(found.values(), key=lambda worker: -worker["seconds"])


def _describe(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Return all that decides the output's bytes."""
    config = {key: value for key, value in plan.config.described.items() if key not in ("out", "base", "experts")}
    outside = origins_of(plan.config.methods)
    return {
        "tool": "isomerge-fast",
        "version": __version__,
        "torch": torch.__version__,
        "device": device.type,
        # Nothing on a CPU, whose instructions are torch's to choose.
        **({"arithmetic": plan.arithmetic} if device.type == "cuda" else {}),
        # Another version of a package may compute something else.
        **({"methods": outside} if outside else {}),
        "config": config,
        # A ceiling can mean another solver, and with it other last digits.
        "solvers": sorted({tensor.reason for tensor in plan.tensors if tensor.method is not None}),
        "inputs": describe_inputs([plan.base, *plan.experts]),
    }
