"""What a merge will do with every tensor, and every error that headers alone can show. Nothing is read but headers."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch

from .checkpoint.adapter import Adapter, LoraPair, base_name
from .checkpoint.adapter_output import merged_settings
from .checkpoint.companions import code_files, companion_files
from .checkpoint.direct_io import READ_BYTES
from .checkpoint.layout import (
    ADAPTER_FILE,
    DTYPE_NAMES,
    DTYPES,
    FLOAT_DTYPES,
    SINGLE_FILE,
    TOKEN_TABLES,
    Checkpoint,
    StoredTensor,
)
from .checkpoint.read_ahead import THREADS as READ_THREADS
from .checkpoint.staging import staged_bytes
from .checkpoint.writer import OutputTensor
from .config import MergeConfig
from .errors import ConfigError, ResourceError
from .inputs import last_part, open_inputs, touches
from .linalg.arithmetic import describe_arithmetic
from .methods import Mean, Method, TensorSpec, make_method
from .methods.protocol import check_factors
from .ops import compute_dtype, traits_of
from .routes import BY_ROWS, STREAMED, Budget, Route, Traffic, budgets, choose_route, copy_route, factor_route

# Resident memory of Python, torch and BLAS: 234 MB before the first tensor, about 350 MB after a merge with the heap
# trimmed (BLAS keeps buffers), of which the estimates of single tensors cover some. With 335 MB the promise lies above
# the peaks seen: 603 MB promised, 580 to 596 MB seen in merges of the 162 M parameter test model by Iso-CTS under 600
# MiB, the most beside busy processes.
BASELINE_BYTES = 335_000_000
# With the page-aligned buffers of the threads that read and write.
PROCESS_BYTES = BASELINE_BYTES + (READ_THREADS + 1) * READ_BYTES
# What is held of all tensors beside their bytes: of each copy where it lies; of the merged one its plan, journal entry
# and report, in which there are numbers of every task; of each output where it will lie, and its checksum. A name is
# held once, and in the journal entry a few times over. (45,000 tensors of 8 numbers, averaged: of 8 experts 4.5 kB a
# tensor seen, 5.3 planned for; of 2 experts 2.7 and 3.7. Reports of spectral methods have 0.5 kB more.)
COPY_METADATA_BYTES, TENSOR_METADATA_BYTES, TASK_METADATA_BYTES, OUTPUT_METADATA_BYTES = 200, 2_000, 80, 300
NAMES_HELD = 5
# Of that, what is in the baseline already: about a thousand tensors of eight experts.
METADATA_IN_BASELINE_BYTES = 4_000_000
# Of a GPU's memory, where no ceiling is given: the rest is for its context, for libraries' workspaces, and for what
# blocks of many sizes leave between them. (Not tried to the limit: merges under a ceiling of 8 GiB reserved 3.7 and 6.4
# GiB on an H200.)
GPU_MEMORY_SHARE = 0.85
# Sub-folder of the output for the merged Δ.
DELTA_FOLDER = "delta"


def scaling_folders(scalings: tuple[float, ...]) -> dict[str, float]:
    """Sub-folder of the output for every α: the output itself when there is one, else ``scaling-<α>``."""
    return {"": scalings[0]} if len(scalings) == 1 else {f"scaling-{value:g}": value for value in scalings}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor's fate: merged by ``method``, or copied when that is None.

    ``base`` is what is copied, or moved: in a tensor that only an expert has, the expert's.
    """

    name: str
    reason: str
    spec: TensorSpec
    base: StoredTensor
    experts: tuple[StoredTensor, ...]  # one a task, or none where the tensor is copied or adapted
    pairs: tuple[LoraPair | None, ...]  # likewise, of adapters; None: a task that leaves the tensor alone
    outputs: tuple[OutputTensor, ...]  # one, or the two factors of an adapter
    delta: OutputTensor | None  # the merged Δ, where it is kept
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
        if self.method is None or self.route.name not in (STREAMED, BY_ROWS):
            return self.read_bytes
        if self.route.name == BY_ROWS:
            return self.read_bytes * (1 + self.method.row_map_passes)
        again = sum(expert.bytes + self.base.bytes for expert in self.experts) * self.method.deltas_taken
        return self.read_bytes + again + self.base.bytes

    @property
    def out_dtype(self) -> str:
        return self.outputs[0].dtype

    def names_in(self, folder: str) -> tuple[str, ...]:
        """Of what it is in a sub-folder of the output."""
        if folder == DELTA_FOLDER:
            return () if self.delta is None else (self.delta.name,)
        return tuple(output.name for output in self.outputs)

    @property
    def write_bytes(self) -> int:
        """For one scaling."""
        return sum(output.bytes for output in self.outputs)

    def bytes_written(self, scalings: int) -> int:
        """For so many of them, and for the merged Δ where it is kept."""
        return self.write_bytes * scalings + (0 if self.delta is None else self.delta.bytes)

    def moved_bytes(self, scalings: int) -> int:
        """Read at least once, and written: what progress is counted in."""
        return self.read_bytes + self.bytes_written(scalings)

    @property
    def action(self) -> str:
        return self.method.name if self.method is not None else "copy"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.base.shape),
            "dtype": self.base.dtype,
            "out_dtype": self.out_dtype,
            "action": self.action,
            "reason": self.reason,
            "route": self.route.name,
            "work_bytes": self.route.work_bytes,
        }


@dataclass(frozen=True)
class Plan:
    """The whole merge. ``tensors`` are in the order in which their bytes lie in the base's files."""

    config: MergeConfig
    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    tensors: tuple[TensorPlan, ...]
    companions: tuple[str, ...]
    budget: Budget
    metadata_bytes: int  # of what is held of all tensors beside their bytes, as far as the baseline has no room for it
    arithmetic: str  # see ``describe_arithmetic``
    device_bytes: int  # that a merge may take of the GPU it is planned for; 0 on a CPU
    notes: tuple[str, ...] = field(default=())

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
        names = [output.name for plan in self.tensors for output in plan.outputs]
        return merged_settings(adapters, names, self.config.adapter_rank)

    @cached_property
    def folders(self) -> dict[str, dict[str, tuple[OutputTensor, ...]]]:
        """What is written: the files of every sub-folder of the output, and what each of them holds."""
        merged: dict[str, list[OutputTensor]] = {}
        kept: dict[str, list[OutputTensor]] = {}
        for plan in self.tensors:
            merged.setdefault(plan.shard, []).extend(plan.outputs)
            if plan.delta is not None:
                kept.setdefault(plan.shard, []).append(plan.delta)
        shards = {file: tuple(tensors) for file, tensors in merged.items()}
        folders = dict.fromkeys(scaling_folders(self.config.scalings), shards)
        if self.config.save_delta:
            folders[DELTA_FOLDER] = {file: tuple(tensors) for file, tensors in kept.items()}
        return folders

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
        return sum(output.bytes for files in self.folders.values() for tensors in files.values() for output in tensors)

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
            "notes": list(self.notes),
            "read_bytes": self.read_bytes,
            "passed_bytes": self.passed_bytes,
            "write_bytes": self.write_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_work_bytes": self.peak_work_bytes,
            "read_ahead_bytes": self.budget.read_ahead,
            "metadata_bytes": self.metadata_bytes,
        }


def make_plan(
    config: MergeConfig,
    device: torch.device | None = None,
    *,
    max_ram: int | None = None,
    max_vram: int | None = None,
) -> Plan:
    """Reads headers, decides every tensor's fate, and finds every error that can be found that way.

    Args:
        device: where it is to run, which decides the solvers; the CPU when None.
        max_ram, max_vram: ceilings in bytes, which leave out solvers that need more; ``check_resources`` refuses what
            cannot be met.

    Raises:
        ConfigError: method, options or patterns that do not fit; output folder that is an input.
        InputError: checkpoints that cannot be opened or do not fit each other; ``problems`` lists them all.
    """
    device = device or torch.device("cpu")
    method = make_method(config.method, config.options)
    overrides = [(override.match, make_method(override.method, override.options)) for override in config.overrides]
    base, experts, extras = open_inputs(config)
    order = sorted(base.tensors.values(), key=lambda stored: (str(stored.file), stored.start))
    if config.adapter_rank is not None:
        order = [stored for stored in order if any(touches(expert, stored.name) for expert in experts)]
    fates = [_Fate(stored.name, stored, _shard(base, stored), experts, config, method, overrides) for stored in order]
    last = fates[-1].shard if fates else SINGLE_FILE
    fates += [
        _Fate(name, stored, last, experts, config, method, overrides, is_extra=True) for name, stored in extras.items()
    ]
    if config.adapter_rank is not None:
        fates = [fate.as_adapter(config.adapter_rank, experts) for fate in fates]
    metadata = _metadata_bytes(base, experts, fates, len(config.scalings))
    budget, routes = _choose_routes(fates, device, None if max_ram is None else max_ram - metadata, max_vram)
    tensors = [fate.plan(route, device) for fate, route in zip(fates, routes, strict=True)]
    if config.stochastic_rounding is not None and not any(plan.rounding_seed is not None for plan in tensors):
        raise ConfigError("stochastic_rounding: no merged tensor is written as bfloat16 (dtype: bfloat16 does that)")
    companions = tuple(companion_files(base.path)) if base.is_folder and config.adapter_rank is None else ()
    notes = tuple(_notes(config, base, experts, tensors, code_files(companions)))
    return Plan(
        config,
        base,
        experts,
        tuple(tensors),
        companions,
        budget,
        metadata,
        describe_arithmetic(device),
        usable_memory_bytes(device),
        notes,
    )


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


def _shard(base: Checkpoint, stored: StoredTensor) -> str:
    return stored.file.name if base.is_folder else SINGLE_FILE


class _Fate:
    """What becomes of one tensor, before it is known how it goes through memory."""

    __slots__ = (
        "adapter_rank",
        "delta",
        "experts_are_deltas",
        "is_converted",
        "method",
        "name",
        "outputs",
        "pairs",
        "reason",
        "rounding_seed",
        "shard",
        "sources",
        "spec",
        "stored",
        "traffic",
        "weights",
    )

    def __init__(
        self,
        name: str,
        stored: StoredTensor,
        shard: str,
        experts: tuple[Checkpoint, ...],
        config: MergeConfig,
        method: Method,
        overrides: list[tuple[str, Method]],
        *,
        is_extra: bool = False,
    ) -> None:
        self.name, self.stored, self.shard = name, stored, shard
        is_float = stored.dtype in FLOAT_DTYPES
        dtype = DTYPE_NAMES[getattr(torch, config.dtype)] if is_float and config.dtype else stored.dtype
        self.is_converted = config.dtype is not None
        self.outputs = (OutputTensor(name, dtype, stored.shape),)
        self.sources: tuple[StoredTensor, ...] = ()
        self.pairs: tuple[LoraPair | None, ...] = ()
        self.method: Method | None = None
        self.rounding_seed = None
        self.weights: tuple[float, ...] | None = None
        self.adapter_rank: int | None = None
        touched = any(touches(expert, name) for expert in experts)
        if is_extra or not is_float or 0 in stored.shape or not touched:
            self.reason = "empty" if 0 in stored.shape else f"{stored.dtype} is not a float: copied from the base"
            if is_extra:
                self.reason = f"not in the base: copied from {stored.file}"
            elif is_float and not touched:
                self.reason = "in no adapter: copied from the base"
            self.spec = TensorSpec(name, stored.shape, torch.float32)
        else:
            if any(isinstance(expert, Adapter) and name in expert.pairs for expert in experts):
                self.pairs = tuple(expert.pairs.get(name) for expert in experts if isinstance(expert, Adapter))
            else:  # an adapter without it leaves it as it is in the base
                self.sources = tuple(expert.tensors.get(name, stored) for expert in experts)
            compute = compute_dtype(*(DTYPES[source.dtype] for source in (stored, *self.sources, *self._factors)))
            self.spec = TensorSpec(name, stored.shape, compute)
            self.method, self.reason = _choose_method(self.spec, config, method, overrides)
            try:
                self.method.check(self.spec, len(experts))
            except ConfigError as error:
                raise ConfigError(f"tensor {name!r} {list(stored.shape)}: {error}") from error
            self.weights = config.weights_of(name)
            where = f"tensor {name!r} {list(stored.shape)}: "
            check_factors(f"{where}scaling", config.scalings, compute)
            check_factors(f"{where}weight", self.weights or (), compute)
            self.rounding_seed = tensor_seed(config.stochastic_rounding, name) if dtype == "BF16" else None
        self.experts_are_deltas = config.experts_are_deltas
        self.delta = None
        if config.save_delta and is_float and not is_extra:
            self.delta = OutputTensor(name, DTYPE_NAMES[self.spec.dtype], stored.shape)
        read = tuple(DTYPES[source.dtype].itemsize for source in (stored, *self.sources))
        written = DTYPES[dtype].itemsize * len(config.scalings) + (self.spec.dtype.itemsize if self.delta else 0)
        self.traffic = Traffic(read, written, len(self.sources))

    @property
    def _factors(self) -> list[StoredTensor]:
        return [stored for pair in self.pairs if pair is not None for stored in (pair.a, pair.b)]

    @property
    def _trained(self) -> list[StoredTensor]:
        """What the experts have of this tensor; of a tensor that is copied, itself."""
        return [*self._factors, *self.sources] or [self.stored]

    @property
    def all_bytes(self) -> int:
        """Of all copies."""
        return self.spec.elements * sum(self.traffic.read)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(pair.rank for pair in self.pairs if pair is not None)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for tensors that go the same way: those of a model's layers are planned once."""
        ranks = len(self.pairs), sum(self.ranks), self.adapter_rank
        return self.spec.shape, self.spec.dtype, self.traffic, self.method, ranks

    def metadata_bytes(self, scalings: int) -> int:
        """Return what is held of it beside its bytes, its copies' places aside."""
        outputs = len(self.outputs) * scalings + (self.delta is not None)
        tasks = len(self.sources) or len(self.pairs)
        names = (NAMES_HELD + outputs) * sys.getsizeof(self.name)
        return TENSOR_METADATA_BYTES + TASK_METADATA_BYTES * tasks + OUTPUT_METADATA_BYTES * outputs + names

    def as_adapter(self, rank: int, experts: tuple[Checkpoint, ...]) -> _Fate:
        """This, as it is written into an adapter: under the names that the first expert which has it gives it."""
        expert = next(expert for expert in experts if touches(expert, self.name))
        assert isinstance(expert, Adapter)
        self.shard = ADAPTER_FILE
        pair = expert.pairs.get(self.name)
        dtype = self.outputs[0].dtype
        if not self.is_converted:  # as wide as the experts' own
            dtype = DTYPE_NAMES[reduce(torch.promote_types, (DTYPES[stored.dtype] for stored in self._trained))]
        if pair is None:
            self.outputs = (OutputTensor(expert.tensors[self.name].name, dtype, self.stored.shape),)
            return self
        self.adapter_rank = rank
        inner, outer = pair.a.shape[1], pair.b.shape[0]
        self.outputs = (
            OutputTensor(pair.a.name, dtype, (rank, inner)),
            OutputTensor(pair.b.name, dtype, (outer, rank)),
        )
        return self

    def route(self, budget: Budget, device: torch.device) -> Route:
        if self.method is None:
            return copy_route(self.stored.shape, self.traffic, budget)
        if self.pairs:
            return factor_route(
                self.method,
                self.spec,
                self.traffic,
                budget,
                device,
                tasks=len(self.pairs),
                rank=sum(self.ranks),
                adapter_rank=self.adapter_rank,
            )
        return choose_route(self.method, self.spec, self.traffic, budget, device)

    def plan(self, route: Route, device: torch.device) -> TensorPlan:
        reason, flops = self.reason, 0.0
        tasks = len(self.sources) or len(self.pairs)
        if self.pairs and route.method is not None:
            rank, sides = sum(self.ranks), sum(self.spec.shape)
            reason = self.reason or f"factors of rank {rank} in all: no matrix of this size is factored"
            # QR of both stacks, and the product.
            flops = 16.0 * sides * rank**2 + 2.0 * self.spec.elements * rank
        elif route.method is not None:
            reason = self.reason or route.method.explain(self.spec, tasks, device)
            if route.name == BY_ROWS and not route.method.any_shape:
                reason = "by rows, to keep to the ceiling: float64 Gram matrices"
            flops = route.method.flops(self.spec, tasks)
        return TensorPlan(
            self.name,
            sys.intern(reason),
            self.spec,
            self.stored,
            self.sources,
            self.pairs,
            self.outputs,
            self.delta,
            route,
            flops,
            self.shard,
            self.rounding_seed,
            self.experts_are_deltas,
            self.weights,
        )


def _metadata_bytes(base: Checkpoint, experts: Sequence[Checkpoint], fates: Sequence[_Fate], scalings: int) -> int:
    """Return what is held of all tensors beside their bytes, as far as the baseline has no room for it."""
    copies = len(base.tensors) + sum(expert.stored_tensors for expert in experts)
    held = COPY_METADATA_BYTES * copies + sum(fate.metadata_bytes(scalings) for fate in fates)
    return max(0, held - METADATA_IN_BASELINE_BYTES)


def _choose_routes(
    fates: Sequence[_Fate], device: torch.device, max_ram: int | None, max_vram: int | None
) -> tuple[Budget, list[Route]]:
    """The largest budget beside which every tensor fits; where none is, the smallest, which says what is needed."""
    on_gpu = device.type == "cuda"
    if on_gpu and max_vram is None:
        max_vram = usable_memory_bytes(device)
    host = None if max_ram is None else max(0, max_ram - PROCESS_BYTES)
    largest = max((fate.all_bytes for fate in fates if fate.method and not fate.method.any_shape), default=0)
    budget, routes = Budget(0, None), []
    for budget in budgets(largest, host=host, vram=max_vram, on_gpu=on_gpu):
        known: dict[tuple[Any, ...], Route] = {}
        routes = []
        for fate in fates:
            if fate.key not in known:
                known[fate.key] = fate.route(budget, device)
            routes.append(known[fate.key])
        if budget.work is None or all(route.work_bytes <= budget.work for route in routes):
            break
    return budget, routes


def usable_memory_bytes(device: torch.device) -> int:
    """Return what a merge without a ceiling may take of a GPU: a share of all of its memory.

    Not of what is free: the same merge on the same kind of GPU is to give the same bytes.
    """
    return int(GPU_MEMORY_SHARE * traits_of(device).memory_bytes)


def tensor_seed(seed: int | None, name: str) -> int | None:
    """A seed of a tensor's own, 63 bits: equal tensors under two names are not rounded alike."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]) >> 1


def _choose_method(
    spec: TensorSpec,
    config: MergeConfig,
    method: Method,
    overrides: list[tuple[str, Method]],
) -> tuple[Method, str]:
    """Overrides first, then ``exclude``, then what the method accepts and excludes itself; others are averaged.

    With the reason, which is empty for what the config's own method merges.
    """
    for pattern, override in overrides:
        if fnmatch.fnmatchcase(spec.name, pattern):
            if override.accepts(spec):
                return override, f"overrides: {pattern!r}"
            return Mean(), f"overrides: {pattern!r}, but {override.name} takes matrices only: averaged"
    for pattern in config.exclude:
        if fnmatch.fnmatchcase(spec.name, pattern):
            return Mean(), f"exclude: {pattern!r}: averaged"
    if not method.accepts(spec):
        return Mean(), f"{len(spec.shape)}-D: averaged, as published"
    for pattern in method.default_exclude:
        if fnmatch.fnmatchcase(spec.name, pattern):
            return Mean(), f"{pattern!r}: averaged, as published"
    return method, ""


def _notes(
    config: MergeConfig,
    base: Checkpoint,
    experts: tuple[Checkpoint, ...],
    tensors: list[TensorPlan],
    code: list[str],
) -> Iterable[str]:
    """What might surprise, each with what changes it."""
    if code:
        yield (
            f"code is copied from {base.path}, which loading the output with trust_remote_code would run: "
            f"{', '.join(code)}"
        )
    tables = [
        plan.name
        for plan in tensors
        if plan.method and plan.action.startswith("iso") and TOKEN_TABLES.search(plan.name)
    ]
    if tables:
        lines = ", ".join(f'{{match: "{name}", method: mean}}' for name in tables)
        yield (
            f"token tables are matrices and are merged by {config.method}, as published; "
            f"to average them: overrides: [{lines}]"
        )
    stacks = [plan.name for plan in tensors if plan.method and len(plan.base.shape) == 3]
    if stacks and make_method(config.method, config.options).default_exclude:
        yield f"{len(stacks)} 3-D tensor(s), such as {stacks[0]!r}, are averaged: the methods are defined on matrices"
    extras = [plan for plan in tensors if plan.name not in base.tensors]
    if extras:
        yield f"{len(extras)} tensor(s) that only an expert has are copied, such as {extras[0].name!r}"
    if any(
        plan.method is None and plan.base.dtype not in FLOAT_DTYPES for plan in tensors if plan.name in base.tensors
    ):
        yield "integer and boolean tensors come from the base"
    paths = [os.path.realpath(expert.path) for expert in experts]
    for expert in experts:
        trained_on = base_name(expert) if isinstance(expert, Adapter) else None
        if trained_on and last_part(trained_on) != last_part(str(base.path)):
            yield f"{expert.path} was trained on {trained_on!r}: see to it that {base.path} is the same"
        if isinstance(expert, Adapter) and expert.copies:
            yield f"{expert.path}: {', '.join(expert.copies)} of its base lies in it too; the base's own is taken"
    for index, path in enumerate(paths):
        if path in paths[:index]:
            yield f"expert {config.experts[index]} is given more than once"
        if path == os.path.realpath(base.path):
            yield f"expert {config.experts[index]} is the base itself: its delta is zero"
    for expert in experts:
        mine, other = (base.config or {}).get("model_type"), (expert.config or {}).get("model_type")
        if mine and other and mine != other:
            yield f"{expert.path} is a {other!r} model, the base a {mine!r}; their tensors fit all the same"
    if config.dtype in ("float16", "bfloat16") and any(plan.base.dtype in ("F32", "F64") for plan in tensors):
        yield f"float tensors are rounded to {config.dtype}; the base is wider"
