"""Merge state dicts tensor by tensor in memory, by the routes of a merge of files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checkpoint.state_dict import StoredStateDict
from ..errors import ConfigError, InputError
from ..methods import MemoryDeltas, Method, NotFiniteError, OutOfRangeError, TensorSpec, method_for
from ..methods.source import check_finite, checked_weights
from ..parsing.values import dtype_name, list_of, number, pattern, whole_number
from ..planning.drafts import tensor_seed
from ..planning.pattern_checks import require_matches
from ..planning.schedule import cores_of, default_cores
from .in_memory import merge_stack, together_bytes
from .in_order import Task, in_order
from .jobs import Demand
from .memory_inputs import Array, as_tensor, check_fit, read_experts, read_weights, shapes_of
from .memory_stacks import Stackable, Together, stacks_of

# Tensors with fewer elements of all experts together are made by the calling thread, which takes as long for them as
# for handing them to another.
LEAST_ELEMENTS = 1 << 12


@dataclass(frozen=True)
class _Inputs:
    """Hold what one tensor is merged of."""

    spec: TensorSpec
    base: Tensor
    experts: Sequence[Tensor]
    weights: Sequence[float] | None
    seed: int | None  # of stochastic rounding


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

        def origin(name: str) -> Tensor:
            return as_tensor(base[name], f"base: tensor {name!r}") if isinstance(base, StoredStateDict) else known[name]

        def read(name: str) -> _Inputs:
            spec = TensorSpec(name, tuple(known[name].shape), ops.compute_dtype(*dtypes[name]))
            bits = tensor_seed(seed, name) if (wanted or known[name].dtype) == torch.bfloat16 else None
            given = enumerate(states if spec.elements else ())
            experts = [as_tensor(state[name], f"experts[{index}]: tensor {name!r}") for index, state in given]
            return _Inputs(spec, origin(name), experts, weights[spec.dtype], bits)

        stacks = self._stacks(known, dtypes, isinstance(base, StoredStateDict), read)

        def task(name: str, tensor: Tensor) -> Task[Tensor]:
            """Return what makes a tensor; its inputs are read at once, by the thread that asks."""
            if name in stacks:
                return Task(stacks[name])
            if name not in dtypes:
                return Task(origin(name).detach().clone)
            inputs = read(name)
            result_bytes = tensor.numel() * (wanted or tensor.dtype).itemsize
            demand = self._demand(inputs.spec, inputs.base, len(states), share)
            return Task(partial(self._merge_tensor, inputs), demand, result_bytes)

        return _once_for_tied(known, task)

    def _stacks(
        self,
        known: Mapping[str, Tensor],
        dtypes: Mapping[str, Sequence[torch.dtype]],
        is_stored: bool,
        read: Callable[[str], _Inputs],
    ) -> dict[str, Callable[[], Tensor]]:
        """Return what makes each of the tensors that a GPU merges together."""
        found: list[Stackable] = []
        begin = 0
        for name in _firsts_of_tied(known):
            tensor, given = known[name], dtypes.get(name, ())
            out_dtype = self.dtype if isinstance(self.dtype, torch.dtype) and given else tensor.dtype
            end = begin + tensor.numel() * out_dtype.itemsize
            device = self.device or (torch.device("cpu") if is_stored else tensor.device)
            if given and device.type == "cuda" and (is_stored or not tensor.is_meta):
                spec = TensorSpec(name, tuple(tensor.shape), ops.compute_dtype(*given))
                method = method_for(self.method, spec, self.exclude)
                with suppress(ConfigError):  # which merging the tensor by itself tells
                    method.check(spec, len(given) - 1)
                    found.append(Stackable(spec, method, ops.indexed(device), tuple(given), begin, end))
            begin = end
        made: dict[str, Callable[[], Tensor]] = {}
        for members, places in stacks_of(found):
            names = [member.spec.name for member in members]

            def alone(index: int, names: Sequence[str] = names, places: int = places) -> Tensor:
                return self._merge_tensor(read(names[index]), places)

            together = Together(members[0].device, names, partial(self._merge_stack, names, read, places), alone)
            made |= {name: partial(together.make, index) for index, name in enumerate(names)}
        return made

    @torch.no_grad()
    def _merge_stack(self, names: Sequence[str], read: Callable[[str], _Inputs], places: int) -> list[Tensor]:
        """Return several merged tensors. An error does not say of which it is."""
        given = [read(name) for name in names]
        method = method_for(self.method, given[0].spec, self.exclude)
        sources = [self._source_of(inputs) for inputs in given]
        out_dtype, seeds = self._out_dtype(given[0]), [inputs.seed for inputs in given]
        merged = merge_stack(method, sources, places, scaling=self.scaling, dtype=out_dtype, seeds=seeds)
        return [self._finished(inputs, made) for inputs, made in zip(given, merged, strict=True)]

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
    def _merge_tensor(self, inputs: _Inputs, places: int = 1) -> Tensor:
        """Return a merged tensor; of more than one place, as by a stack that it is alone in."""
        spec, base, experts = inputs.spec, inputs.base, inputs.experts
        out_dtype = self._out_dtype(inputs)
        if base.numel() == 0:
            return base.to(out_dtype, copy=True)
        name, scaling = spec.name, self.scaling
        chosen = method_for(self.method, spec, self.exclude)
        try:
            if base.is_meta:
                chosen.check(spec, len(experts))
                return torch.empty(base.shape, dtype=out_dtype, device="meta")
            source = self._source_of(inputs)
            (merged,) = merge_stack(chosen, [source], places, scaling=scaling, dtype=out_dtype, seeds=[inputs.seed])
        except NotFiniteError as error:
            held = any(bool(ops.count_nonfinite(tensor)) for tensor in (base, *experts))
            what = "hold NaN or Inf" if held else f"are too far apart for {ops.dtype_name(spec.dtype)}"
            raise InputError(f"tensor {name!r}: base or experts{error.tasks} {what}") from error
        except OutOfRangeError as error:
            raise InputError(f"tensor {name!r}: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"tensor {name!r} {list(base.shape)}: {error}") from error
        return self._finished(inputs, merged)

    def _out_dtype(self, inputs: _Inputs) -> torch.dtype:
        return self.dtype if isinstance(self.dtype, torch.dtype) else inputs.base.dtype

    def _source_of(self, inputs: _Inputs) -> MemoryDeltas:
        """Return the deltas of a tensor, on the device that computes."""
        origin = inputs.base.to(self.device or inputs.base.device)
        tensors = [expert.to(origin.device) for expert in inputs.experts]
        if origin.ndim == 0:  # tensors are walked by rows, of which it has none
            origin, tensors = origin[None], [tensor[None] for tensor in tensors]
        spec = inputs.spec
        return MemoryDeltas(tensors, origin, weights=inputs.weights, dtype=spec.dtype, full_spec=spec)

    def _finished(self, inputs: _Inputs, merged: Tensor) -> Tensor:
        """Return a merged tensor as the base has it; refuse weights that are not finite."""
        if count := int(ops.count_nonfinite(merged)):
            raise InputError(
                f"tensor {inputs.spec.name!r}: {count} merged weights overflow "
                f"{ops.dtype_name(merged.dtype)} at scaling {self.scaling:g}"
            )
        return merged.view(inputs.base.shape).to(inputs.base.device)


def _once_for_tied(
    tensors: Mapping[str, Tensor], task_of: Callable[[str, Tensor], Task[Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, made tensor); names of the same memory (tied weights) share what is made for the first of them."""
    names = Counter(map(_place, tensors.values()))
    tied: dict[tuple[Any, ...], Tensor] = {}
    tasks = (task_of(name, tensors[name]) for name in _firsts_of_tied(tensors))
    made = in_order(tasks, default_cores(), together_bytes())
    for name, tensor in tensors.items():
        place = _place(tensor)
        result = tied[place] if place in tied else next(made)
        if names[place] > 1:
            tied[place] = result
        yield name, result
    for _ in made:  # to its end
        raise AssertionError


def _firsts_of_tied(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in their order, of those of the same memory the first alone."""
    firsts = {_place(tensor): name for name, tensor in reversed(list(tensors.items()))}
    return [name for name, tensor in tensors.items() if firsts[_place(tensor)] == name]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tensors of the same memory have in common; empty tensors have nothing in common."""
    memory = tensor.untyped_storage()._cdata if tensor.is_meta else tensor.data_ptr()
    alone = None if tensor.numel() else id(tensor)
    return (tensor.device, memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, alone)
