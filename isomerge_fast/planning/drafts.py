"""Decide from headers what becomes of every tensor: copied, merged or adapted, and what is written of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from typing import Any

import torch

from ..checkpoint.layout import ADAPTER_FILE, DTYPE_NAMES, Checkpoint, OutputTensor, StoredTensor
from ..checkpoint.lora.adapter import Adapter, LoraPair
from ..config import MergeConfig
from ..errors import ConfigError
from ..methods import Mean, Method, TensorSpec
from ..methods.factors import require_basis_free
from ..methods.source import check_finite, checked_weights
from ..ops import FLOAT_DTYPES, compute_dtype
from ..parsing.shell_patterns import globs_of
from .inputs import adapts
from .outputs import PlannedTensor, factors_of, scaling_folders
from .part_sizes import Traffic


@dataclass(frozen=True, slots=True)
class Draft(PlannedTensor):
    """Hold the plan of a tensor before it has a route: merged by ``method``, or copied where that is None."""

    reason: str  # why it is copied, or merged by another method than the config's; else empty
    method: Method | None
    traffic: Traffic

    @property
    def rank(self) -> int:
        """Return how many columns all tasks' factors have together."""
        return sum(pair.rank for pair in self.pairs if pair is not None)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Return a key that tensors of one route share, such as a model's layers: each route is planned once."""
        return self.spec.shape, self.spec.dtype, self.traffic, self.method, len(self.pairs), self.rank


@dataclass(frozen=True)
class Drafter:
    """Decide what becomes of tensors."""

    config: MergeConfig
    experts: tuple[Checkpoint, ...]
    method: Method  # the config's
    overrides: Sequence[tuple[str, Method]]  # methods by pattern, of which the first that matches counts

    def draft(self, name: str, stored: StoredTensor, shard: str, *, is_extra: bool = False) -> Draft:
        """Return the draft of a tensor of the base, or of an extra one, which one expert alone has."""
        reason = self._why_copied(name, stored, is_extra)
        method, weights, experts, pairs = None, None, (), ()
        spec = TensorSpec(name, stored.shape, torch.float32)
        if reason is None:
            experts, pairs = self._trained(name, stored)
            copies = (stored, *experts, *factors_of(pairs))
            spec = TensorSpec(name, stored.shape, compute_dtype(*(copy.dtype for copy in copies)))
            method, reason = choose_method(spec, self.config, self.method, self.overrides)
            weights = self._checked_weights(spec, method, is_factored=bool(pairs))
        is_float = stored.dtype in FLOAT_DTYPES
        dtype = getattr(torch, self.config.dtype) if is_float and self.config.dtype else stored.dtype
        scalings = self._scalings if is_float and not is_extra else self._scalings_without_delta
        read = tuple([copy.dtype for copy in (stored, *experts)])
        traffic = _traffic(read, tuple([spec.dtype if scaling is None else dtype for scaling in scalings.values()]))
        is_rounded = method is not None and dtype == torch.bfloat16
        seed = tensor_seed(self.config.stochastic_rounding, name) if is_rounded else None
        merged = (OutputTensor(name, dtype, spec.shape),)
        if self.config.adapter_rank is not None:
            trained = [*factors_of(pairs), *experts] or [stored]
            merged, shard = self._in_adapter(spec, dtype, trained, self.config.adapter_rank), ADAPTER_FILE
        return Draft(spec, merged, scalings, stored, experts, pairs, weights, shard, seed, reason, method, traffic)

    @cached_property
    def _adapters(self) -> list[Adapter]:
        return [expert for expert in self.experts if isinstance(expert, Adapter)]

    @cached_property
    def _scalings(self) -> Mapping[str, float | None]:
        return scaling_folders(self.config)

    @cached_property
    def _scalings_without_delta(self) -> Mapping[str, float | None]:
        return {folder: scaling for folder, scaling in self._scalings.items() if scaling is not None}

    def _why_copied(self, name: str, stored: StoredTensor, is_extra: bool) -> str | None:
        """Return why a tensor is copied; None where it is merged."""
        is_float = stored.dtype in FLOAT_DTYPES
        if is_extra:
            return f"not in the base: copied from {stored.file}"
        if is_float and not any(adapts(expert, name) for expert in self.experts):
            return f"{'in no adapter' if self._adapters else 'a buffer'}: copied from the base"
        if 0 in stored.shape:
            return "empty"
        return None if is_float else f"{DTYPE_NAMES[stored.dtype]} is not a float: copied from the base"

    def _trained(self, name: str, stored: StoredTensor) -> tuple[tuple[StoredTensor, ...], tuple[LoraPair | None, ...]]:
        """Return what the experts have of a tensor: whole tensors, or what adapters have as factors."""
        pairs = tuple(adapter.pairs.get(name) for adapter in self._adapters)
        if any(pair is not None for pair in pairs):
            return (), pairs
        # An adapter without the tensor leaves it as it is in the base.
        return tuple(expert.tensors.get(name, stored) for expert in self.experts), ()

    def _checked_weights(self, spec: TensorSpec, method: Method, *, is_factored: bool) -> tuple[float, ...] | None:
        """Return w_t of a tensor; raise ConfigError where method, scalings or weights do not fit it."""
        where = f"tensor {spec.name!r} {list(spec.shape)}: "
        try:
            method.check(spec, len(self.experts))
            if is_factored:
                require_basis_free(method)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error
        weights = self.config.weights_of(spec.name)
        check_finite(f"{where}scaling", self.config.scalings, spec.dtype)
        return checked_weights(weights, spec.dtype, where)

    def _in_adapter(
        self, spec: TensorSpec, dtype: torch.dtype, trained: Sequence[StoredTensor], rank: int
    ) -> tuple[OutputTensor, ...]:
        """Return a tensor as it is written into an adapter, under the names of the first adapter that has it."""
        adapter = next(adapter for adapter in self._adapters if adapts(adapter, spec.name))
        if self.config.dtype is None:  # as wide as what the experts have trained
            dtype = reduce(torch.promote_types, (copy.dtype for copy in trained))
        pair = adapter.pairs.get(spec.name)
        if pair is None:
            return (OutputTensor(adapter.tensors[spec.name].name, dtype, spec.shape),)
        a, b = (rank, pair.a.shape[1]), (pair.b.shape[0], rank)
        return OutputTensor(pair.a.name, dtype, a), OutputTensor(pair.b.name, dtype, b)


@cache
def _traffic(read: tuple[torch.dtype, ...], written: tuple[torch.dtype, ...]) -> Traffic:
    """Return what moves for one element of a tensor, by the dtypes of its copies, the base's first, and outputs.

    One object for all that are alike: with one for each of 18,675 tensors, garbage was looked for once more, for 0.1 s.
    """
    sizes = tuple(dtype.itemsize for dtype in read)
    return Traffic(sizes, sum(dtype.itemsize for dtype in written), len(sizes) - 1)


def choose_method(
    spec: TensorSpec, config: MergeConfig, method: Method, overrides: Sequence[tuple[str, Method]]
) -> tuple[Method, str]:
    """Return a tensor's method and why it is that, which is empty for what the config's own method merges.

    Overrides first, then ``exclude``, then what the method accepts and excludes itself; others are averaged.
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


def tensor_seed(seed: int | None, name: str) -> int | None:
    """Return a seed of 63 bits for one tensor, so that equal tensors under two names are not rounded alike."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]) >> 1
