"""Define the messages between the engine and a worker: settings of the merge, tensors to merge, what was done."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.io.reader import files_of
from ..checkpoint.layout import FileIdentity, OutputTensor
from ..checkpoint.output.journal import Entries
from ..planning.budget import Budget
from ..planning.plan import Plan, TensorPlan


@dataclass(frozen=True)
class MergeSettings:
    """Hold what every process has to know of a merge, whatever its tensors are."""

    folder: Path  # where the journals lie, and under ``new`` the output under construction
    key: str  # ``fingerprint`` of the merge
    device: str
    threads: int
    cores: Mapping[str, int]  # of the tensors that more than one computes, whose last digits depend on it
    direct: bool  # read and write past the page cache where that is faster
    records_base: bool  # whether the checksums of the base's tensors are recorded, for ``apply``
    budget: Budget
    together_bytes: int  # that all tensors which are merged at once may take
    max_vram: int | None  # ceiling in bytes for the memory of a GPU
    arithmetic: str  # see ``Plan``

    @classmethod
    def of(cls, plan: Plan, folder: Path, key: str, **given: Any) -> MergeSettings:
        """Return the settings of a plan; given are also device, threads, direct and max_vram."""
        return cls(
            folder,
            key,
            records_base=plan.config.save_delta,
            budget=plan.budget,
            together_bytes=plan.together_bytes,
            cores=plan.cores_of_tensors,
            arithmetic=plan.arithmetic,
            **given,
        )


@dataclass(frozen=True)
class WorkItem:
    """Hold a slice of a plan: tensors for one process."""

    number: int  # names it among the work items of a run
    tensors: tuple[TensorPlan, ...]
    files: Mapping[Path, FileIdentity]  # the inputs that are read
    # The files written into, by sub-folder of the output, each with all that will be in it.
    folders: Mapping[str, Mapping[str, tuple[OutputTensor, ...]]]
    metadata: Mapping[tuple[str, str], Mapping[str, str]]  # of these files' headers, by sub-folder and name
    journal_entries: Entries  # of earlier runs, by tensor

    @classmethod
    def of(cls, plan: Plan, number: int, tensors: tuple[TensorPlan, ...], journal_entries: Entries) -> WorkItem:
        """Return the work item of some tensors of a plan."""
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
    """Hold the result of a work item; ``seconds`` and ``io`` are those of ``Report``."""

    number: int
    entries: Entries  # of the journal, by tensor: its checksums and its part of the report
    seconds: dict[str, float]
    io: dict[str, Any]
    process: dict[str, Any]  # where it ran


def this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}
