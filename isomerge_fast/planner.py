"""Makes the plan of a merge: decides every tensor's fate, and finds every error that headers alone can show."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from .budget import Budget, budgets
from .checkpoint.adapter import Adapter, LoraPair
from .checkpoint.companions import FolderContents, contents_of
from .checkpoint.kept_metadata import kept_metadata
from .checkpoint.layout import (
    ADAPTER_FILE,
    DTYPE_NAMES,
    DTYPES,
    FLOAT_DTYPES,
    SINGLE_FILE,
    Checkpoint,
    StoredTensor,
)
from .checkpoint.writer import OutputTensor
from .config import MergeConfig
from .errors import ConfigError, bounded, visible
from .file_notes import file_notes_of
from .globs import globs_of
from .inputs import open_inputs, touches
from .linalg.arithmetic import describe_arithmetic
from .methods import Mean, Method, TensorSpec, make_method
from .methods.source import check_factors
from .notes import notes_of
from .ops import compute_dtype, traits_of
from .patterns import require_matches, rules_of
from .plan import PROCESS_BYTES, LeftOut, Plan, TensorPlan
from .routes import Route, Traffic, choose_route, copy_route, factor_route

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


def make_plan(
    config: MergeConfig,
    device: torch.device | None = None,
    *,
    max_ram: int | None = None,
    max_vram: int | None = None,
    is_new: bool = True,
) -> Plan:
    """Reads headers, decides every tensor's fate, and finds every error that can be found that way.

    Args:
        device: where it is to run, which decides the solvers; the CPU when None.
        max_ram, max_vram: ceilings in bytes, which leave out solvers that need more; ``check_resources`` refuses what
            cannot be met.
        is_new: False of a merge that is done, whose patterns may match nothing: earlier releases took that.

    Raises:
        ConfigError: method, options or patterns that do not fit; output folder that is an input.
        InputError: checkpoints that cannot be opened or do not fit each other; ``problems`` lists them all.
    """
    device = device or torch.device("cpu")
    method = make_method(config.method, config.options)
    overrides = [(override.match, make_method(override.method, override.options)) for override in config.overrides]
    inputs = open_inputs(config)
    base, experts, extras = inputs.base, inputs.experts, inputs.extras
    left_out = _left_out(base, experts, extras)
    if is_new:
        unused = [*(name for each in left_out for name in each.tensors), *(b.name for b in inputs.buffers.left_out)]
        require_matches(rules_of(config), [*base.tensors, *extras], unused)
    order = sorted(base.tensors.values(), key=lambda stored: (str(stored.file), stored.start))
    if config.adapter_rank is not None:
        order = [stored for stored in order if any(touches(expert, stored.name) for expert in experts)]
    is_folder = base.is_folder
    fates = [
        _Fate(stored.name, stored, stored.file.name if is_folder else SINGLE_FILE, experts, config, method, overrides)
        for stored in order
    ]
    last = fates[-1].shard if fates else SINGLE_FILE
    fates += [
        _Fate(name, stored, last, experts, config, method, overrides, is_extra=True) for name, stored in extras.items()
    ]
    if config.adapter_rank is not None:
        fates = [fate.as_adapter(config.adapter_rank, experts) for fate in fates]
    metadata = _metadata_bytes(base, experts, fates, len(config.scalings))
    budget, routes = _choose_routes(fates, device, None if max_ram is None else max_ram - metadata, max_vram)
    tensors = list(_plan_tensors(fates, routes, device))
    if config.stochastic_rounding is not None and not any(plan.rounding_seed is not None for plan in tensors):
        raise ConfigError("stochastic_rounding: no merged tensor is written as bfloat16 (dtype: bfloat16 does that)")
    made = Plan(
        config,
        base,
        experts,
        tuple(tensors),
        _contents(base, experts, config),
        _metadata(base, config),
        budget,
        metadata,
        describe_arithmetic(device),
        usable_memory_bytes(device),
        buffers=inputs.buffers,
        left_out=left_out,
    )
    # Names of files may hold bytes that are no text, and no JSON.
    return replace(made, notes=tuple(bounded(map(visible, (*notes_of(made), *file_notes_of(made))))))


def _contents(base: Checkpoint, experts: Sequence[Checkpoint], config: MergeConfig) -> FolderContents:
    if not base.is_folder or config.adapter_rank is not None:
        return FolderContents()
    merged = [path.name for path in base.files] + ([base.index_name] if base.index_name else [])
    is_model = not config.experts_are_deltas  # a Δ has no parts
    checkpoints = [expert.path for expert in experts if is_model and not isinstance(expert, Adapter)]
    return contents_of(base.path, merged, checkpoints, config.method)


def _metadata(base: Checkpoint, config: MergeConfig) -> dict[str, dict[str, str]]:
    """Return what the headers of the output's files say beside their tensors."""
    if config.adapter_rank is not None:
        return {}
    return {
        path.name if base.is_folder else SINGLE_FILE: kept_metadata(identity.metadata)[0]
        for path, identity in base.files.items()
    }


def _left_out(
    base: Checkpoint, experts: Sequence[Checkpoint], extras: Mapping[str, StoredTensor]
) -> tuple[LeftOut, ...]:
    """What the experts have and the output will not, of those that have something of the kind."""
    return tuple(
        LeftOut(expert, {name: expert.tensors[name] for name in sorted(names)})
        for expert in experts
        if (names := expert.tensors.keys() - base.tensors.keys() - extras.keys())
    )


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
                whose = "in no adapter" if any(isinstance(expert, Adapter) for expert in experts) else "a buffer"
                self.reason = f"{whose}: copied from the base"
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

    def explain(self, route: Route, device: torch.device) -> tuple[str, float]:
        """Return why it goes this way, and how many operations that takes."""
        tasks = len(self.sources) or len(self.pairs)
        return route.reason(self.spec, tasks, device, self.reason), route.flops(self.spec, tasks)

    def plan(self, route: Route, reason: str, flops: float) -> TensorPlan:
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


def _plan_tensors(fates: Sequence[_Fate], routes: Sequence[Route], device: torch.device) -> Iterator[TensorPlan]:
    """Yield the plans of all tensors. Those of a model's layers are explained once."""
    known: dict[tuple[Any, ...], tuple[str, float]] = {}
    for fate, route in zip(fates, routes, strict=True):
        key = (fate.key, fate.reason, route.name)
        if key not in known:
            known[key] = fate.explain(route, device)
        yield fate.plan(route, *known[key])


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
    if (place := globs_of((*[pattern for pattern, _ in overrides],)).first(spec.name)) is not None:
        pattern, override = overrides[place]
        if override.accepts(spec):
            return override, f"overrides: {pattern!r}"
        return Mean(), f"overrides: {pattern!r}, but {override.name} takes matrices only: averaged"
    if (place := globs_of(tuple(config.exclude)).first(spec.name)) is not None:
        return Mean(), f"exclude: {config.exclude[place]!r}: averaged"
    if not method.accepts(spec):
        return Mean(), f"{len(spec.shape)}-D: averaged, as published"
    if (place := globs_of(tuple(method.default_exclude)).first(spec.name)) is not None:
        return Mean(), f"{method.default_exclude[place]!r}: averaged, as published"
    return method, ""
