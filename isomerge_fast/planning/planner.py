"""Make the plan of a merge, and find every error that headers alone can show.

What becomes of a tensor and what is written of it (``drafts``) → which way it goes through memory, beside the largest
budget that leaves room for all (``routes``) → its plan.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any

import torch

from ..checkpoint.header_metadata import kept_metadata
from ..checkpoint.layout import SINGLE_FILE, Checkpoint, StoredTensor
from ..checkpoint.lora.adapter import Adapter
from ..checkpoint.output.companions import FolderContents, contents_of
from ..config import MergeConfig
from ..errors import ConfigError, bounded, visible
from ..linalg.cusolver import describe_arithmetic
from ..machine import memory_bytes
from ..methods import make_method
from .budget import PROCESS_BYTES, SOLVER_BYTES, TOGETHER_SHARE, Budget, budgets_to_try, usable_memory_bytes
from .drafts import Draft, Drafter
from .factor_routes import factor_route
from .inputs import Inputs, adapts, open_inputs, require_possible_rank
from .notes import notes_of
from .outputs import PlannedTensor
from .part_sizes import PartSizes
from .pattern_checks import require_matches, rules_of
from .plan import LeftOut, Plan, TensorPlan
from .routes import LEAST_ALIKE, Copied, Route, choose_route, places_of, stack_route
from .schedule import default_cores, schedule

# What is held of all tensors beside their bytes: of each copy where it lies; of the merged one its plan, journal entry
# and report, in which there are numbers of every task; of each output where it will lie, and its checksum. A name is
# held once, and in the journal entry a few times over. (45,000 tensors of 8 numbers, averaged: of 8 experts 4.5 kB a
# tensor seen, 5.3 planned for; of 2 experts 2.7 and 3.7. Reports of spectral methods have 0.5 kB more.)
COPY_METADATA_BYTES, TENSOR_METADATA_BYTES, TASK_METADATA_BYTES, OUTPUT_METADATA_BYTES = 200, 2_000, 80, 300
NAMES_HELD = 5
# Of that, what is in the baseline already: about a thousand tensors of eight experts.
METADATA_IN_BASELINE_BYTES = 4_000_000
_PLANNED = attrgetter(*(each.name for each in fields(PlannedTensor)))


def make_plan(
    config: MergeConfig,
    device: torch.device | None = None,
    *,
    max_ram: int | None = None,
    max_vram: int | None = None,
    threads: int | None = None,
    is_new: bool = True,
) -> Plan:
    """Read headers, decide what becomes of every tensor, and find every error that can be found that way.

    The device, by default the CPU, decides the solvers; the ceilings in bytes leave out those that need more, and
    ``check_resources`` refuses what cannot be met. ``threads`` are the CPU cores of a process, by default
    ``default_cores``. Of a merge that is done (``is_new`` is False) patterns may match nothing: earlier releases took
    that.
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
        if config.adapter_rank is not None:
            require_possible_rank(config.adapter_rank, experts)
    drafts = _draft_all(inputs, Drafter(config, experts, method, overrides))
    metadata = _metadata_bytes(base, experts, drafts)
    ceiling = None if max_ram is None else max_ram - metadata
    budget, routes = _choose_routes(drafts, device, ceiling, max_vram, config.adapter_rank)
    tensors = tuple(_plan_tensors(drafts, routes, device, config.experts_are_deltas))
    if config.stochastic_rounding is not None and not any(plan.rounding_seed is not None for plan in tensors):
        raise ConfigError("stochastic_rounding: no merged tensor is written as bfloat16 (dtype: bfloat16 does that)")
    made = Plan(
        config,
        base,
        experts,
        tensors,
        _contents(base, experts, config),
        _header_metadata(base, config),
        budget,
        metadata,
        describe_arithmetic(device),
        usable_memory_bytes(device),
        buffers=inputs.buffers,
        left_out=left_out,
    )
    made = scheduled(made, default_cores() if threads is None else threads, device, max_ram)
    # Names of files may hold bytes that are no text, and no JSON.
    return replace(made, notes=tuple(bounded(map(visible, notes_of(made)))))


def scheduled(plan: Plan, cores: int, device: torch.device, max_ram: int | None) -> Plan:
    """Return the plan for so many CPU cores of a process; what a GPU computes does not depend on them."""
    if device.type == "cuda":
        return replace(plan, cores=cores)
    most = int(TOGETHER_SHARE * memory_bytes()) if max_ram is None else max_ram
    tensors, budget, cores = schedule(plan.tensors, plan.budget, cores, most - PROCESS_BYTES - plan.metadata_bytes)
    return replace(plan, budget=budget, tensors=tensors, cores=cores)


def _contents(base: Checkpoint, experts: Sequence[Checkpoint], config: MergeConfig) -> FolderContents:
    if not base.is_folder or config.adapter_rank is not None:
        return FolderContents()
    merged = [path.name for path in base.files] + ([base.index_name] if base.index_name else [])
    is_model = not config.experts_are_deltas  # a Δ has no parts
    checkpoints = [expert.path for expert in experts if is_model and not isinstance(expert, Adapter)]
    return contents_of(base.path, merged, checkpoints, config.method)


def _header_metadata(base: Checkpoint, config: MergeConfig) -> dict[str, dict[str, str]]:
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
    """Return what experts have and the output will not, for each expert that has such tensors."""
    return tuple(
        LeftOut(expert, {name: expert.tensors[name] for name in sorted(names)})
        for expert in experts
        if (names := expert.tensors.keys() - base.tensors.keys() - extras.keys())
    )


def _draft_all(inputs: Inputs, drafter: Drafter) -> list[Draft]:
    """Return the drafts of all tensors, in the order in which their bytes lie in the base's files; extras last."""
    base, is_folder = inputs.base, inputs.base.is_folder
    order = sorted(base.tensors.values(), key=lambda stored: (str(stored.file), stored.start))
    if drafter.config.adapter_rank is not None:
        order = [stored for stored in order if any(adapts(expert, stored.name) for expert in inputs.experts)]
    drafts = [drafter.draft(stored.name, stored, stored.file.name if is_folder else SINGLE_FILE) for stored in order]
    last = drafts[-1].shard if drafts else SINGLE_FILE
    extras = [drafter.draft(name, stored, last, is_extra=True) for name, stored in inputs.extras.items()]
    return drafts + extras


def _metadata_bytes(base: Checkpoint, experts: Sequence[Checkpoint], drafts: Sequence[Draft]) -> int:
    """Return what is held of all tensors beside their bytes, as far as the baseline has no room for it."""
    copies = len(base.tensors) + sum(expert.stored_tensors for expert in experts)
    held = COPY_METADATA_BYTES * copies
    for draft in drafts:
        outputs = draft.written_tensors
        names = (NAMES_HELD + outputs) * sys.getsizeof(draft.name)
        held += TENSOR_METADATA_BYTES + TASK_METADATA_BYTES * draft.tasks
        held += OUTPUT_METADATA_BYTES * outputs + names
    return max(0, held - METADATA_IN_BASELINE_BYTES)


def _choose_routes(
    drafts: Sequence[Draft], device: torch.device, max_ram: int | None, max_vram: int | None, adapter_rank: int | None
) -> tuple[Budget, dict[tuple[Any, ...], Route]]:
    """Return the largest budget beside which every tensor fits, and the route of every ``kind`` of drafts.

    Where there is no such budget it is the smallest, which says what is needed.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and max_vram is None:
        max_vram = usable_memory_bytes(device)
    kinds: dict[tuple[Any, ...], Draft] = {}
    for draft in drafts:
        kinds.setdefault(draft.kind, draft)
    alike = Counter(draft.kind for draft in drafts)
    merged = [draft for draft in kinds.values() if draft.method and not draft.method.any_shape]
    largest = max((_copies_at_once(draft, alike[draft.kind], device) for draft in merged), default=0)
    solving = SOLVER_BYTES if merged and not on_gpu else 0
    host = None if max_ram is None else max(0, max_ram - PROCESS_BYTES - solving)
    budget, routes = Budget(0, None), {}
    for budget in budgets_to_try(largest, host=host, vram=max_vram, on_gpu=on_gpu):
        routes = {kind: _route_of(draft, budget, device, adapter_rank, alike[kind]) for kind, draft in kinds.items()}
        if budget.work is None or all(route.work_bytes <= budget.work for route in routes.values()):
            break
    return replace(budget, solving=solving), routes


def _copies_at_once(draft: Draft, alike: int, device: torch.device) -> int:
    """Return the bytes of the copies that are to be held while a matrix is merged, or a stack of them."""
    assert draft.method is not None
    is_stacked = alike >= LEAST_ALIKE and not draft.pairs
    places = places_of(draft.method, draft.spec, draft.traffic.tasks, device) if is_stacked else 1
    return places * draft.spec.elements * sum(draft.traffic.read)


def _route_of(draft: Draft, budget: Budget, device: torch.device, adapter_rank: int | None, alike: int) -> Route:
    sizes = PartSizes(draft.traffic, budget, device)
    if draft.method is None:
        return Copied.plan(draft.base.shape, sizes)
    if not draft.pairs:
        return stack_route(draft.method, draft.spec, sizes, alike) or choose_route(draft.method, draft.spec, sizes)
    ranks = {"rank": draft.rank, "adapter_rank": adapter_rank}
    return factor_route(draft.method, draft.spec, sizes, tasks=len(draft.pairs), **ranks)


def _plan_tensors(
    drafts: Sequence[Draft], routes: Mapping[tuple[Any, ...], Route], device: torch.device, experts_are_deltas: bool
) -> Iterator[TensorPlan]:
    """Yield the plans of all tensors. Those of a model's layers are explained once."""
    known: dict[tuple[Any, ...], tuple[str, float]] = {}
    for draft in drafts:
        kind = draft.kind
        route, key = routes[kind], (kind, draft.reason)
        if key not in known:
            reason = route.reason(draft.spec, draft.tasks, device, draft.reason)
            known[key] = sys.intern(reason), route.flops(draft.spec, draft.tasks)
        reason, flops = known[key]
        yield TensorPlan(
            *_PLANNED(draft), reason=reason, route=route, flops=flops, experts_are_deltas=experts_are_deltas
        )
