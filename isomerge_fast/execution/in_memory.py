"""Merge state dicts tensor by tensor in memory, by the routes of a merge of files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checkpoint.state_dict import StoredStateDict
from ..errors import ConfigError, InputError
from ..machine import memory_bytes
from ..methods import (
    DeltaSource,
    MemoryDeltas,
    Method,
    NotFiniteError,
    OutOfRangeError,
    RowBlock,
    TensorSpec,
    method_for,
)
from ..methods.source import Factors, MemoryFactors, check_finite, checked_weights
from ..parsing.values import dtype_name, list_of, number, pattern, whole_number
from ..planning.budget import TOGETHER_SHARE
from ..planning.drafts import tensor_seed
from ..planning.factor_routes import ToAdapter
from ..planning.part_sizes import ROW_STEP
from ..planning.pattern_checks import require_matches
from ..planning.routes import memory_route
from ..planning.schedule import cores_of, default_cores
from .in_order import Task, in_order
from .jobs import Demand
from .memory_inputs import Array, as_tensor, check_fit, read_experts, read_weights, shapes_of
from .threads import OneCore

# So much of a tensor is rounded at once.
PART_ELEMENTS = 1 << 22
# Tensors with fewer elements of all experts together are made by the calling thread, which takes as long for them as
# for handing them to another.
LEAST_ELEMENTS = 1 << 12


@dataclass
class StateDictMerge:
    """Hold the options of a merge of state dicts (see ``merge_state_dicts``)."""

    method: Method
    scaling: float = 1.0
    exclude: Sequence[str] = ()
    dtype: torch.dtype | str | None = None
    stochastic_rounding: int | None = None
    weights: Sequence[float] | None = None
    device: torch.device | None = None  # where to compute; the device of the base's tensor when None

    def merge(self, base: Mapping[str, Array], experts: Iterable[Mapping[str, Array]]) -> Iterator[tuple[str, Tensor]]:
        """Return an iterator of (name, merged tensor) in the order of ``base``, made while they are asked for.

        All checks come before that. On a CPU several threads make those that come next.
        """
        self.scaling = number(self.scaling, "scaling")
        self.exclude = list_of(pattern, "a list of patterns: ['*lm_head*', '*norm*']")(self.exclude, "exclude")
        wanted = self.dtype = None if self.dtype is None else getattr(torch, dtype_name(self.dtype, "dtype"))
        seed = self.stochastic_rounding
        seed = None if seed is None else whole_number(seed, "stochastic_rounding", 0)
        known = shapes_of(base, "base")
        states = read_experts(experts)
        given = read_weights(self.weights, len(states))
        dtypes = check_fit(known, isinstance(base, StoredStateDict), states)
        weights: dict[torch.dtype, Sequence[float] | None] = {}
        for name, found in dtypes.items():
            compute, where = ops.compute_dtype(*found), f"tensor {name!r}: "
            check_finite(f"{where}scaling", [self.scaling], compute)
            if compute not in weights:
                weights[compute] = checked_weights(given, compute, where)
        require_matches([("exclude", self.exclude)], known)
        if seed is not None:
            outputs = [wanted or tensor.dtype for tensor in known.values() if tensor.is_floating_point()]
            if torch.bfloat16 not in outputs:
                raise ConfigError(
                    "stochastic_rounding: no merged tensor becomes bfloat16 (dtype=torch.bfloat16 does that)"
                )

        share = self._operations_a_core(known, dtypes, len(states))

        def task(name: str, tensor: Tensor) -> Task[Tensor]:
            """Return what makes a tensor; its inputs are read at once, by the thread that asks."""
            origin = as_tensor(base[name], f"base: tensor {name!r}") if isinstance(base, StoredStateDict) else tensor
            if name not in dtypes:
                return Task(lambda: origin.detach().clone())
            bits = tensor_seed(seed, name) if (wanted or tensor.dtype) == torch.bfloat16 else None
            spec = TensorSpec(name, tuple(tensor.shape), ops.compute_dtype(*dtypes[name]))
            read = enumerate(states if tensor.numel() else ())
            given = [as_tensor(state[name], f"experts[{index}]: tensor {name!r}") for index, state in read]
            make = partial(self._merge_tensor, spec, origin, given, weights[spec.dtype], bits)
            result_bytes = tensor.numel() * (wanted or tensor.dtype).itemsize
            return Task(make, self._demand(spec, origin, len(states), share), result_bytes)

        return _once_for_tied(known, task)

    def _operations_a_core(
        self, known: Mapping[str, Tensor], dtypes: Mapping[str, Collection[torch.dtype]], tasks: int
    ) -> float:
        """Return the operations of all matrices together, over the number of cores."""
        specs = (
            TensorSpec(name, tuple(known[name].shape), ops.compute_dtype(*found)) for name, found in dtypes.items()
        )
        chosen = ((method_for(self.method, spec, self.exclude), spec) for spec in specs)
        return math.fsum(method.flops(spec, tasks) for method, spec in chosen if not method.any_shape) / default_cores()

    def _demand(self, spec: TensorSpec, base: Tensor, tasks: int, share: float) -> Demand | None:
        """Return what a thread takes that makes the tensor; None where the calling thread is to make it, or to fail."""
        device = self.device or base.device
        if device.type != "cpu" or base.is_meta or spec.elements * tasks < LEAST_ELEMENTS:
            return None
        method = method_for(self.method, spec, self.exclude)
        try:
            method.check(spec, tasks)
        except ConfigError:
            return None
        cores = 1 if method.any_shape else cores_of(method.flops(spec, tasks), share, default_cores())
        return Demand(cores, method.workspace_bytes(spec, tasks, device))

    @torch.no_grad()
    def _merge_tensor(
        self,
        spec: TensorSpec,
        base: Tensor,
        experts: Sequence[Tensor],
        weights: Sequence[float] | None,
        seed: int | None,
    ) -> Tensor:
        out_dtype = self.dtype if isinstance(self.dtype, torch.dtype) else base.dtype
        if base.numel() == 0:
            return base.to(out_dtype, copy=True)
        name, scaling = spec.name, self.scaling
        chosen = method_for(self.method, spec, self.exclude)
        try:
            if base.is_meta:
                chosen.check(spec, len(experts))
                return torch.empty(base.shape, dtype=out_dtype, device="meta")
            origin = base.to(self.device or base.device)
            tensors = [expert.to(origin.device) for expert in experts]
            if base.ndim == 0:  # tensors are walked by rows, of which it has none
                origin, tensors = origin[None], [tensor[None] for tensor in tensors]
            source = MemoryDeltas(tensors, origin, weights=weights, dtype=spec.dtype, full_spec=spec)
            merged = merge_source(chosen, source, origin, scaling=scaling, dtype=out_dtype, seed=seed)
        except NotFiniteError as error:
            held = any(bool(ops.count_nonfinite(tensor)) for tensor in (base, *experts))
            what = "hold NaN or Inf" if held else f"are too far apart for {ops.dtype_name(spec.dtype)}"
            raise InputError(f"tensor {name!r}: base or experts{error.tasks} {what}") from error
        except OutOfRangeError as error:
            raise InputError(f"tensor {name!r}: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"tensor {name!r} {list(base.shape)}: {error}") from error
        if count := int(ops.count_nonfinite(merged)):
            raise InputError(
                f"tensor {name!r}: {count} merged weights overflow {ops.dtype_name(out_dtype)} at scaling {scaling:g}"
            )
        return merged.view(base.shape).to(base.device)


def _once_for_tied(
    tensors: Mapping[str, Tensor], task_of: Callable[[str, Tensor], Task[Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, made tensor); names of the same memory (tied weights) share what is made for the first of them."""
    names = Counter(map(_place, tensors.values()))
    firsts = {_place(tensor): name for name, tensor in reversed(list(tensors.items()))}
    tied: dict[tuple[Any, ...], Tensor] = {}
    tasks = (task_of(name, tensor) for name, tensor in tensors.items() if firsts[_place(tensor)] == name)
    made = in_order(tasks, default_cores(), together_bytes())
    for name, tensor in tensors.items():
        place = _place(tensor)
        result = tied[place] if place in tied else next(made)
        if names[place] > 1:
            tied[place] = result
        yield name, result
    for _ in made:  # to its end
        raise AssertionError


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tensors of the same memory have in common; empty tensors have nothing in common."""
    memory = tensor.untyped_storage()._cdata if tensor.is_meta else tensor.data_ptr()
    alone = None if tensor.numel() else id(tensor)
    return (tensor.device, memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, alone)


def merge_source(
    method: Method, source: DeltaSource, base: Tensor, *, scaling: float, dtype: torch.dtype, seed: int | None = None
) -> Tensor:
    """Return θ₀ + α·Δ of one tensor, or of a batch of matrices [B, M, N], rounded once to ``dtype``.

    ``source`` has all copies in memory as they are stored: no T deltas are made of them. ``base`` is its θ₀, and
    ``seed`` that of stochastic rounding.
    """
    if source.device.type == "cpu":
        source.threads = OneCore()
    sink = MemorySink(base, scaling, dtype, seed)
    memory_route(method, base.shape).run(source, sink)
    return sink.merged


def merge_matrices(
    method: Method, sources: Sequence[MemoryDeltas], scaling: float, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield ``merge_source`` of matrices, each beside its base, in their order; on a CPU several at once, a core each.

    All have one shape; the method is one for matrices.
    """

    def task(source: MemoryDeltas) -> Task[Tensor]:
        assert source.base is not None
        make = torch.no_grad()(partial(merge_source, method, source, source.base, scaling=scaling, dtype=dtype))
        if source.device.type != "cpu":
            return Task(make)
        flops = method.flops(source.full_spec, source.n_tasks)
        demand = method.workspace_bytes(source.full_spec, source.n_tasks, source.device)
        result_bytes = source.base.numel() * dtype.itemsize
        return Task(make, Demand(cores_of(flops, len(sources) * flops / cores, cores), demand), result_bytes)

    cores = default_cores()
    yield from in_order(map(task, sources), cores, together_bytes())


def together_bytes() -> int:
    """Return how many bytes the tensors that are merged at once in memory may take."""
    return int(TOGETHER_SHARE * memory_bytes())


def merge_to_factors(
    method: Method, factors: Sequence[Factors | None], spec: TensorSpec, rank: int
) -> tuple[Tensor, Tensor, float]:
    """Return the merged Δ of deltas given as factors, as (left [M, rank], right [rank, N], what the rank cut off).

    The last is ‖Δ − left right‖_F / ‖Δ‖_F. No matrix of the tensor's size is made.
    """
    base = torch.empty(spec.shape, dtype=spec.dtype, device="meta")  # adapters leave it alone
    source = MemoryFactors(factors, base, dtype=spec.dtype, block_rows=spec.shape[0])
    sink = MemorySink(base, 1.0, spec.dtype)
    stats = ToAdapter(spec.shape, spec.shape[0], method, 0, rank, rank).run(source, sink)
    return *sink.factors, float(stats.values["truncation"])


class MemorySink:
    """Take the rows, or the factors, of one tensor in memory: the ``Sink`` of a merge of state dicts."""

    factors: tuple[Tensor, Tensor]  # left [M, r] and right [r, N], where the route gives these

    def __init__(self, base: Tensor, scaling: float, dtype: torch.dtype, seed: int | None = None) -> None:
        self._base, self._scaling, self._dtype, self._seed = base, scaling, dtype, seed
        self._row_elements = prod(base.shape[1:])

    @cached_property
    def merged(self) -> Tensor:
        """Return the merged tensor, allocated when its first rows come: the method has freed its own memory by then."""
        return torch.empty(self._base.shape, dtype=self._dtype, device=self._base.device)

    def add(self, block: RowBlock, value: Callable[[RowBlock], Tensor], *, shared: bool) -> None:
        for part in self._parts(block) if shared else (block,):
            assert part.base is not None
            (self.merged[part.rows],) = ops.apply_delta(
                part.base,
                value(part),
                scalings=[self._scaling],
                dtype=self._dtype,
                seed=self._seed,
                first=part.rows.start * self._row_elements,
            )

    def _parts(self, block: RowBlock) -> Iterator[RowBlock]:
        """Yield the block in parts of so few elements that what is computed of one takes little memory."""
        elements = ops.traits_of(block.like.device).block_elements(PART_ELEMENTS)
        return block.parts(ROW_STEP * max(1, elements // max(1, ROW_STEP * self._row_elements)))

    def copy(self, block: RowBlock) -> None:
        assert block.base is not None
        self.merged[block.rows] = block.base

    def add_factors(self, left: Tensor, right: Tensor) -> None:
        self.factors = left, right
