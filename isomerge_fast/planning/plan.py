"""Hold the plan of a merge: what is done with every tensor, and what that reads, writes and takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ..checkpoint.checks.buffers import Buffers
from ..checkpoint.header_metadata import PLAIN
from ..checkpoint.layout import DTYPE_NAMES, Checkpoint, OutputTensor, StoredTensor
from ..checkpoint.lora.adapter import Adapter
from ..checkpoint.lora.merged_settings import merged_settings
from ..checkpoint.output.companions import FolderContents, LeftBehind
from ..checkpoint.output.model_config import output_config
from ..config import MergeConfig
from ..methods import Method
from .budget import PROCESS_BYTES, Budget
from .outputs import PlannedTensor, scaling_folders
from .routes import Route


@dataclass(frozen=True, slots=True)
class TensorPlan(PlannedTensor):
    """Hold what is done with one tensor: merged by ``method``, or copied where that is None."""

    reason: str  # as in ``Draft``; where that is empty, which solver or way it gets, and why
    route: Route
    flops: float
    experts_are_deltas: bool = False
    checksums: tuple[str, ...] = ()  # that base and experts are known to have, where they are
    cores: int = 1  # that compute it, where its route does not share its blocks

    @property
    def method(self) -> Method | None:
        return self.route.method

    @property
    def inputs(self) -> tuple[StoredTensor, ...]:
        """Return all stored tensors that are read."""
        return (*((self.base,) if self.route.reads_base else ()), *self.experts, *self.factors)

    @property
    def read_bytes(self) -> int:
        """Return the bytes that are read at least once."""
        return sum([stored.bytes for stored in self.inputs])

    @property
    def passed_bytes(self) -> int:
        """Return the bytes that all passes together read."""
        trained = [stored.bytes for stored in (*self.experts, *self.factors)]
        return self.route.passed_bytes(self.base.bytes if self.route.reads_base else 0, trained)

    @property
    def out_dtype(self) -> torch.dtype:
        """Return the dtype of the merged weights."""
        return self.merged[0].dtype

    @property
    def moved_bytes(self) -> int:
        """Return the bytes read at least once, and written: what progress is counted in."""
        return self.read_bytes + self.write_bytes

    @property
    def action(self) -> str:
        return self.method.name if self.method is not None else "copy"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.base.shape),
            "dtype": DTYPE_NAMES[self.base.dtype],
            "out_dtype": DTYPE_NAMES[self.out_dtype],
            "action": self.action,
            "reason": self.reason,
            "route": self.route.name,
            "work_bytes": self.route.work_bytes,
            "cores": self.cores,
        }


@dataclass(frozen=True)
class OriginalMerge:
    """Describe the merge that kept the Δ which a plan applies."""

    config: MergeConfig
    has_adapters: bool


@dataclass(frozen=True)
class LeftOut:
    """Hold the tensors that an expert has and the output will not, by name."""

    expert: Checkpoint
    tensors: dict[str, StoredTensor]

    def to_dict(self) -> dict[str, Any]:
        shapes = {name: list(stored.shape) for name, stored in self.tensors.items()}
        return {"expert": str(self.expert.path), "tensors": shapes}


@dataclass(frozen=True)
class Plan:
    """Hold the whole merge. ``tensors`` are in the order in which their bytes lie in the base's files."""

    config: MergeConfig
    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    tensors: tuple[TensorPlan, ...]
    contents: FolderContents  # what lies beside the base's weights
    metadata: Mapping[str, Mapping[str, str]]  # of the headers of merged files, by file
    budget: Budget
    metadata_bytes: int  # of what is held of all tensors beside their bytes, as far as the baseline has no room for it
    arithmetic: str  # see ``describe_arithmetic``
    device_bytes: int  # that a merge may take of the GPU it is planned for; 0 on a CPU
    cores: int = 1  # CPU cores of a process
    notes: tuple[str, ...] = field(default=())
    buffers: Buffers = field(default=Buffers())  # that are not merged, since base and experts disagree about them
    original_merge: OriginalMerge | None = None  # where the plan applies a Δ that was kept
    left_out: tuple[LeftOut, ...] = ()

    @property
    def companions(self) -> tuple[str, ...]:
        """Return the files of the base that are copied, by relative names."""
        return self.contents.companions

    @property
    def left_behind(self) -> tuple[LeftBehind, ...]:
        """Return what of the base's folder is not in the output."""
        return self.contents.left_behind

    @property
    def copied_extras(self) -> tuple[TensorPlan, ...]:
        """Return the tensors that an expert has and the base has not."""
        return tuple(tensor for tensor in self.tensors if tensor.name not in self.base.tensors)

    @cached_property
    def config_and_notes(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the output's ``config.json``, where it has one, and notes on it."""
        copied = {tensor.name: tensor.base.file for tensor in self.copied_extras}
        donors = [expert for expert in self.experts if expert.files.keys() & {*copied.values()}]
        return output_config(self.base, donors, copied, self.config.dtype)

    def metadata_of(self, folder: str, file: str) -> Mapping[str, str]:
        """Return the ``__metadata__`` of an output file's header: the base file's own, or the plain one for a Δ."""
        return PLAIN if scaling_folders(self.config)[folder] is None else self.metadata.get(file, PLAIN)

    @property
    def adapters(self) -> list[Adapter]:
        """Return the experts that are LoRA adapters: all of them or none."""
        return [expert for expert in self.experts if isinstance(expert, Adapter)]

    @property
    def index_name(self) -> str | None:
        """Return the name of the file that tells which shard holds which tensor, where there is to be one."""
        return None if self.config.adapter_rank is not None else self.base.index_name

    @property
    def adapter_settings(self) -> dict[str, Any] | None:
        """Return ``adapter_config.json``, where the output is an adapter."""
        if self.config.adapter_rank is None:
            return None
        names = [tensor.name for plan in self.tensors for tensor in plan.merged]
        return merged_settings(self.adapters, names, self.config.adapter_rank)

    @cached_property
    def folders(self) -> dict[str, dict[str, tuple[OutputTensor, ...]]]:
        """Return the files of every sub-folder of the output, and what each of them holds."""
        scalings = scaling_folders(self.config)
        merged = self._files_in(next(iter(scalings)))  # the same for every α
        return {folder: self._files_in(folder) if scaling is None else merged for folder, scaling in scalings.items()}

    def _files_in(self, folder: str) -> dict[str, tuple[OutputTensor, ...]]:
        """Return what each file of a sub-folder of the output holds."""
        found: dict[str, list[OutputTensor]] = {}
        for plan in self.tensors:
            if tensors := plan.tensors_in(folder):
                found.setdefault(plan.shard, []).extend(tensors)
        return {file: tuple(tensors) for file, tensors in found.items()}

    @property
    def read_bytes(self) -> int:
        """Return the bytes to be read at least once: copied tensors from the base only."""
        return sum(plan.read_bytes for plan in self.tensors)

    @property
    def passed_bytes(self) -> int:
        """Return the bytes that all passes together read."""
        return sum(plan.passed_bytes for plan in self.tensors)

    @property
    def write_bytes(self) -> int:
        """Return the bytes of weights to be written, over all scalings, and of the merged Δ where it is kept."""
        return sum(plan.write_bytes for plan in self.tensors)

    @property
    def peak_ram_bytes(self) -> int:
        """Estimate the process's peak resident memory on a CPU."""
        return self.host_buffer_bytes + self.together_bytes

    @property
    def host_buffer_bytes(self) -> int:
        """Estimate the bytes on the host without the tensor that is merged: process, metadata, reads and writes."""
        budget = self.budget
        threads = budget.solving + (self.cores - 1) * budget.thread if budget.on_gpu is None else 0
        return PROCESS_BYTES + self.metadata_bytes + threads + budget.read_pool + budget.write_behind

    @property
    def peak_vram_bytes(self) -> int:
        """Estimate the peak of allocated memory on a GPU."""
        return self.budget.in_transfer + self.peak_work_bytes

    @cached_property
    def peak_work_bytes(self) -> int:
        """Return the largest working set of one tensor, on the device that computes."""
        return max((plan.route.work_bytes for plan in self.tensors), default=0)

    @property
    def cores_of_tensors(self) -> dict[str, int]:
        """Return how many cores compute each of the tensors that more than one does: its last digits depend on it."""
        return {tensor.name: tensor.cores for tensor in self.tensors if tensor.cores > 1}

    def with_cores(self, cores: Mapping[str, int]) -> Plan:
        """Return the plan with so many cores for these tensors, and one for each of the others."""
        return replace(self, tensors=tuple(replace(each, cores=cores.get(each.name, 1)) for each in self.tensors))

    @property
    def together_bytes(self) -> int:
        """Return the largest working set of all tensors that are merged at once."""
        return max(self.budget.together, self.peak_work_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.config.method,
            "scaling": list(self.config.scalings),
            "base": str(self.base.path),
            "experts": [str(expert.path) for expert in self.experts],
            "out": self.config.out,
            "tensors": [plan.to_dict() for plan in self.tensors],
            "folders": {folder: list(files) for folder, files in self.folders.items()},
            "companions": list(self.companions),
            "left_behind": [left.to_dict() for left in self.left_behind],
            "notes": list(self.notes),
            "left_out": [each.to_dict() for each in self.left_out],
            "read_bytes": self.read_bytes,
            "passed_bytes": self.passed_bytes,
            "write_bytes": self.write_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_work_bytes": self.peak_work_bytes,
            "together_bytes": self.together_bytes,
            "cores": self.cores,
            "read_ahead_bytes": self.budget.read_pool,
            "metadata_bytes": self.metadata_bytes,
        }
