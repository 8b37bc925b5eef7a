"""What a merge will do with every tensor, and every error that headers alone can show. Nothing is read but headers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checks.buffers import Buffers
from ..checkpoint.header_metadata import PLAIN
from ..checkpoint.io.direct_io import READ_BYTES
from ..checkpoint.io.read_ahead import THREADS as READ_THREADS
from ..checkpoint.io.writer import OutputTensor
from ..checkpoint.layout import DTYPE_NAMES, Checkpoint, StoredTensor
from ..checkpoint.lora.adapter import Adapter, LoraPair
from ..checkpoint.lora.merged_settings import merged_settings
from ..checkpoint.output.companions import FolderContents, LeftBehind
from ..checkpoint.output.model_config import output_config
from ..checkpoint.output.staging import staged_bytes
from ..config import MergeConfig
from ..errors import ResourceError
from ..methods import Method, TensorSpec
from .budget import Budget
from .routes import Route

# Resident memory of Python, torch and BLAS: 234 MB before the first tensor, about 350 MB after a merge with the heap
# trimmed (BLAS keeps buffers), of which the estimates of single tensors cover some. With 335 MB the promise lies above
# the peaks seen: 603 MB promised, 580 to 596 MB seen in merges of the 162 M parameter test model by Iso-CTS under 600
# MiB, the most beside busy processes.
BASELINE_BYTES = 335_000_000
# With the page-aligned buffers of the threads that read and write.
PROCESS_BYTES = BASELINE_BYTES + (READ_THREADS + 1) * READ_BYTES
# Sub-folder of the output for the merged Δ.
DELTA_FOLDER = "delta"


def scaling_folders(config: MergeConfig) -> dict[str, float | None]:
    """Return α by sub-folder of the output: of the output itself where there is one α, else of ``scaling-<α>``.

    Where the merged Δ is kept, its folder comes last, with None.
    """
    several = len(config.scalings) > 1
    folders: dict[str, float | None] = {f"scaling-{value:g}" if several else "": value for value in config.scalings}
    return {**folders, DELTA_FOLDER: None} if config.save_delta else folders


@dataclass(frozen=True, slots=True)
class Output:
    """What is written of a tensor into one sub-folder of the output.

    Attributes:
        scaling: α; None where it is Δ itself.
        tensors: one, or the two factors of an adapter.
    """

    folder: str
    scaling: float | None
    tensors: tuple[OutputTensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """A tensor and its outputs. These are made when they are asked for: of thousands of tensors with ten scalings each
    they would be as much as all else that is held.

    Attributes:
        merged: what is written for every α: one, or the two factors of an adapter.
        scalings: α by sub-folder of the output, and None by that of the merged Δ, last, where the tensor has one that
            is kept. Tensors that are alike in that share it.
    """

    spec: TensorSpec
    merged: tuple[OutputTensor, ...]
    scalings: Mapping[str, float | None]

    @property
    def name(self) -> str:
        """In the base, or in the expert that alone has it."""
        return self.spec.name

    @property
    def outputs(self) -> tuple[Output, ...]:
        """One for every α, and the merged Δ last, where it is kept."""
        return tuple([Output(folder, scaling, self.tensors_in(folder)) for folder, scaling in self.scalings.items()])

    def tensors_in(self, folder: str) -> tuple[OutputTensor, ...]:
        """Return what is written into a sub-folder of the output: nothing into Δ's, where the tensor has no Δ."""
        if folder not in self.scalings:
            return ()
        if self.scalings[folder] is not None:
            return self.merged
        return (OutputTensor(self.spec.name, self.spec.dtype, self.spec.shape),)

    @property
    def written_tensors(self) -> int:
        """How many, in all outputs."""
        return self._in_all(len(self.merged), 1)

    @property
    def write_bytes(self) -> int:
        """Of all outputs."""
        merged = sum([tensor.bytes for tensor in self.merged])
        return self._in_all(merged, self.spec.bytes)

    def _in_all(self, merged: int, delta: int) -> int:
        """Return the sum over all outputs of what is so much for one α, and so much for Δ."""
        return sum([delta if scaling is None else merged for scaling in self.scalings.values()])


@dataclass(frozen=True, slots=True)
class TensorPlan(WrittenTensor):
    """What is done with one tensor: merged by ``method``, or copied where that is None.

    ``base`` is what is copied, or moved: in a tensor that only an expert has, the expert's.
    """

    reason: str
    base: StoredTensor
    experts: tuple[StoredTensor, ...]  # one a task, or none where the tensor is copied or adapted
    pairs: tuple[LoraPair | None, ...]  # likewise, of adapters; None: a task that leaves the tensor alone
    route: Route
    flops: float
    shard: str  # of the output
    rounding_seed: int | None = None  # of stochastic rounding
    experts_are_deltas: bool = False
    weights: tuple[float, ...] | None = None  # w_t; None where all are 1
    checksums: tuple[str, ...] = ()  # that base and experts are known to have, where they are

    @property
    def method(self) -> Method | None:
        return self.route.method

    @property
    def tasks(self) -> int:
        return len(self.experts) or len(self.pairs)

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """A and B of every task that has them."""
        return tuple(stored for pair in self.pairs if pair is not None for stored in (pair.a, pair.b))

    @property
    def inputs(self) -> tuple[StoredTensor, ...]:
        """All that is read."""
        return (*((self.base,) if self.route.reads_base else ()), *self.experts, *self.factors)

    @property
    def read_bytes(self) -> int:
        """At least once."""
        return sum(stored.bytes for stored in self.inputs)

    @property
    def passed_bytes(self) -> int:
        """Read in all, pass after pass: more than once what is not held."""
        trained = [stored.bytes for stored in (*self.experts, *self.factors)]
        return self.route.passed_bytes(self.base.bytes if self.route.reads_base else 0, trained)

    @property
    def out_dtype(self) -> torch.dtype:
        """Of the merged weights."""
        return self.merged[0].dtype

    @property
    def moved_bytes(self) -> int:
        """Read at least once, and written: what progress is counted in."""
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
        }


@dataclass(frozen=True)
class Origin:
    """The merge that kept the Δ which a plan applies."""

    config: MergeConfig
    has_adapters: bool


@dataclass(frozen=True)
class LeftOut:
    """Tensors that an expert has and the output will not, by name."""

    expert: Checkpoint
    tensors: dict[str, StoredTensor]

    def to_dict(self) -> dict[str, Any]:
        shapes = {name: list(stored.shape) for name, stored in self.tensors.items()}
        return {"expert": str(self.expert.path), "tensors": shapes}


@dataclass(frozen=True)
class Plan:
    """The whole merge. ``tensors`` are in the order in which their bytes lie in the base's files."""

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
    notes: tuple[str, ...] = field(default=())
    buffers: Buffers = field(default=Buffers())  # that are not merged, since base and experts disagree about them
    origin: Origin | None = None
    left_out: tuple[LeftOut, ...] = ()

    @property
    def companions(self) -> tuple[str, ...]:
        """The files of the base that are copied, by relative names."""
        return self.contents.companions

    @property
    def left_behind(self) -> tuple[LeftBehind, ...]:
        """What of the base's folder is not in the output."""
        return self.contents.left_behind

    @property
    def copied_extras(self) -> tuple[TensorPlan, ...]:
        """Tensors that an expert has and the base has not."""
        return tuple(tensor for tensor in self.tensors if tensor.name not in self.base.tensors)

    @cached_property
    def config_and_notes(self) -> tuple[dict[str, Any] | None, list[str]]:
        """``config.json`` of the output, where it has one, and what is to be known about it."""
        copied = {tensor.name: tensor.base.file for tensor in self.copied_extras}
        donors = [expert for expert in self.experts if expert.files.keys() & {*copied.values()}]
        return output_config(self.base, donors, copied, self.config.dtype)

    def metadata_of(self, folder: str, file: str) -> Mapping[str, str]:
        """Return what the header of an output's file says beside its tensors. Δ is no model and has no more of it."""
        return PLAIN if scaling_folders(self.config)[folder] is None else self.metadata.get(file, PLAIN)

    @property
    def has_adapters(self) -> bool:
        return any(isinstance(expert, Adapter) for expert in self.experts)

    @property
    def index_name(self) -> str | None:
        """Of the file that tells which shard holds which tensor, where there is to be one."""
        return None if self.config.adapter_rank is not None else self.base.index_name

    @property
    def adapter_settings(self) -> dict[str, Any] | None:
        """``adapter_config.json``, where the output is an adapter."""
        if self.config.adapter_rank is None:
            return None
        adapters = [expert for expert in self.experts if isinstance(expert, Adapter)]
        names = [tensor.name for plan in self.tensors for tensor in plan.merged]
        return merged_settings(adapters, names, self.config.adapter_rank)

    @cached_property
    def folders(self) -> dict[str, dict[str, tuple[OutputTensor, ...]]]:
        """What is written: the files of every sub-folder of the output, and what each of them holds."""
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
        """Bytes to be read at least once: copied tensors from the base only."""
        return sum(plan.read_bytes for plan in self.tensors)

    @property
    def passed_bytes(self) -> int:
        """Bytes to be read in all."""
        return sum(plan.passed_bytes for plan in self.tensors)

    @property
    def write_bytes(self) -> int:
        """Bytes of weights to be written, over all scalings, and of the merged Δ where it is kept."""
        return sum(plan.write_bytes for plan in self.tensors)

    @property
    def peak_ram_bytes(self) -> int:
        """Estimate of the process's peak resident memory on a CPU."""
        return self.host_buffer_bytes + self.peak_work_bytes

    @property
    def host_buffer_bytes(self) -> int:
        """Of that, what does not depend on where is computed: the process itself, what it holds of all tensors beside
        their bytes, reads ahead and waiting writes.
        """
        return PROCESS_BYTES + self.metadata_bytes + self.budget.read_ahead + self.budget.write_behind

    @property
    def peak_vram_bytes(self) -> int:
        """Estimate of the peak of allocated memory on a GPU."""
        return self.budget.in_transfer + self.peak_work_bytes

    @cached_property
    def peak_work_bytes(self) -> int:
        """The largest working set of one tensor, on the device that computes."""
        return max((plan.route.work_bytes for plan in self.tensors), default=0)

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
            "read_ahead_bytes": self.budget.read_ahead,
            "metadata_bytes": self.metadata_bytes,
        }


def check_resources(plan: Plan, *, max_ram: int | None, max_vram: int | None, device: torch.device) -> None:
    """Raises ResourceError when the output does not fit on its disk or the working set not under a ceiling."""
    on_gpu = device.type == "cuda"
    needed = plan.host_buffer_bytes if on_gpu else plan.peak_ram_bytes
    if max_ram is not None and needed > max_ram:
        raise ResourceError(_too_low("max_ram", max_ram, needed, plan))
    if max_vram is not None and on_gpu and plan.peak_vram_bytes > max_vram:
        raise ResourceError(_too_low("max_vram", max_vram, plan.peak_vram_bytes, plan))
    if max_vram is None and on_gpu and plan.peak_vram_bytes > plan.device_bytes:
        largest = max(plan.tensors, key=lambda tensor: tensor.route.work_bytes)
        raise ResourceError(
            f"{device}: {plan.device_bytes} bytes of its memory can be used, the merge takes {plan.peak_vram_bytes} "
            f"(of tensor {largest.name!r} {list(largest.spec.shape)}); --device cpu merges without it"
        )
    if plan.config.out is not None:
        folder = Path(os.path.realpath(plan.config.out)).parent
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free + staged_bytes(Path(plan.config.out))
        if plan.write_bytes > free:
            raise ResourceError(f"{folder}: {free} bytes are free, the output takes {plan.write_bytes}")


def _too_low(option: str, given: int, needed: int, plan: Plan) -> str:
    largest = max(plan.tensors, key=lambda tensor: tensor.route.work_bytes)
    held = (
        f", what is held of {len(plan.tensors)} tensors beside their bytes {plan.metadata_bytes}"
        if option == "max_ram" and plan.metadata_bytes
        else ""
    )
    return (
        f"{option} is {given} bytes; the smallest that would do is {needed} "
        f"(tensor {largest.name!r} {list(largest.base.shape)} takes {largest.route.work_bytes} of it{held})"
    )
