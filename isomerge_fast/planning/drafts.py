"""What becomes of every tensor of a merge, by its headers: copied, merged or adapted, and what is written of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from typing import Any

import torch

from ..checkpoint.io.writer import OutputTensor
from ..checkpoint.layout import ADAPTER_FILE, DTYPE_NAMES, Checkpoint, StoredTensor
from ..checkpoint.lora.adapter import Adapter, LoraPair
from ..config import MergeConfig
from ..errors import ConfigError
from ..methods import Mean, Method, TensorSpec
from ..methods.factors import require_basis_free
from ..methods.source import check_finite, checked_weights
from ..ops import FLOAT_DTYPES, compute_dtype
from ..parsing.shell_patterns import globs_of
from .inputs import adapts
from .plan import WrittenTensor, scaling_folders
from .routes import Traffic


@dataclass(frozen=True, slots=True)
class Draft(WrittenTensor):
    """The plan of a tensor, but for how it goes through memory: merged by ``method``, or copied where that is None.

    Fields are as in ``TensorPlan``.

    Attributes:
        reason: why it is copied, or merged by another method than the config's; else empty.
    """

    method: Method | None
    reason: str
    base: StoredTensor
    experts: tuple[StoredTensor, ...]
    pairs: tuple[LoraPair | None, ...]
    weights: tuple[float, ...] | None
    shard: str
    rounding_seed: int | None
    traffic: Traffic

    @property
    def tasks(self) -> int:
        return len(self.experts) or len(self.pairs)

    @property
    def rank(self) -> int:
        """Columns of all tasks' factors together."""
        return sum(pair.rank for pair in self.pairs if pair is not None)

    @property
    def copies_bytes(self) -> int:
        """Of the base's tensor and the experts'."""
        return self.spec.elements * sum(self.traffic.read)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for tensors that go the same way: those of a model's layers are planned once."""
        return self.spec.shape, self.spec.dtype, self.traffic, self.method, len(self.pairs), self.rank


@dataclass(frozen=True)
class Drafter:
    """Decides what becomes of tensors.

    Attributes:
        method: the config's.
        overrides: methods by pattern, of which the first that matches counts.
    """

    config: MergeConfig
    experts: tuple[Checkpoint, ...]
    method: Method
    overrides: Sequence[tuple[str, Method]]

    def draft(self, name: str, stored: StoredTensor, shard: str, *, is_extra: bool = False) -> Draft:
        """Return the draft of a tensor of the base, or of one that an expert alone has.

        Raises:
            ConfigError: options, weights or scalings that do not fit it.
        """
        why_copied = self._why_copied(name, stored, is_extra)
        if why_copied is None:
            return self._merged(name, stored, shard)
        spec = TensorSpec(name, stored.shape, torch.float32)
        return self._drafted(spec, None, why_copied, stored, shard, has_delta=not is_extra)

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

    def _merged(self, name: str, stored: StoredTensor, shard: str) -> Draft:
        """Return the draft of a tensor that is merged: of what adapters have as factors, or experts as a whole."""
        experts: tuple[StoredTensor, ...] = ()
        pairs = tuple(adapter.pairs.get(name) for adapter in self._adapters)
        factors = _factors(pairs)
        if not factors:  # an adapter without it leaves it as it is in the base
            pairs, experts = (), tuple(expert.tensors.get(name, stored) for expert in self.experts)
        compute = compute_dtype(*(copy.dtype for copy in (stored, *experts, *factors)))
        spec, where = TensorSpec(name, stored.shape, compute), f"tensor {name!r} {list(stored.shape)}: "
        method, reason = choose_method(spec, self.config, self.method, self.overrides)
        try:
            method.check(spec, len(self.experts))
            if pairs:
                require_basis_free(method)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error
        weights = self.config.weights_of(name)
        check_finite(f"{where}scaling", self.config.scalings, compute)
        weights = checked_weights(weights, compute, where)
        return self._drafted(spec, method, reason, stored, shard, experts, pairs, weights)

    def _drafted(
        self,
        spec: TensorSpec,
        method: Method | None,
        reason: str,
        stored: StoredTensor,
        shard: str,
        experts: tuple[StoredTensor, ...] = (),
        pairs: tuple[LoraPair | None, ...] = (),
        weights: tuple[float, ...] | None = None,
        *,
        has_delta: bool = True,
    ) -> Draft:
        """Return the draft, with what is read and written of the tensor."""
        is_float = stored.dtype in FLOAT_DTYPES
        dtype = getattr(torch, self.config.dtype) if is_float and self.config.dtype else stored.dtype
        merged = (OutputTensor(spec.name, dtype, spec.shape),)
        scalings = self._scalings if is_float and has_delta else self._scalings_without_delta
        read = tuple([copy.dtype for copy in (stored, *experts)])
        traffic = _traffic(read, tuple([spec.dtype if scaling is None else dtype for scaling in scalings.values()]))
        is_rounded = method is not None and dtype == torch.bfloat16
        seed = tensor_seed(self.config.stochastic_rounding, spec.name) if is_rounded else None
        if self.config.adapter_rank is not None:
            trained = [*_factors(pairs), *experts] or [stored]
            merged, shard = self._in_adapter(spec, dtype, trained, self.config.adapter_rank), ADAPTER_FILE
        return Draft(spec, merged, scalings, method, reason, stored, experts, pairs, weights, shard, seed, traffic)

    def _in_adapter(
        self, spec: TensorSpec, dtype: torch.dtype, trained: Sequence[StoredTensor], rank: int
    ) -> tuple[OutputTensor, ...]:
        """Return a tensor as it is written into an adapter: under the names that the first which has it gives it.

        Args:
            trained: what the experts have of the tensor.
        """
        adapter = next(adapter for adapter in self._adapters if adapts(adapter, spec.name))
        if self.config.dtype is None:  # as wide as the experts' own
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


def _factors(pairs: Sequence[LoraPair | None]) -> list[StoredTensor]:
    """Return A and B of every task that has them."""
    return [factor for pair in pairs if pair is not None for factor in (pair.a, pair.b)]


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
    """Return a seed of a tensor's own, 63 bits: equal tensors under two names are not rounded alike."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]) >> 1
