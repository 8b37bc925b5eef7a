"""Define Iso-C and Iso-CTS for mergekit's registry, with mergekit's words for their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
from mergekit.merge_methods import (
    BasePolicy,
    BatchOptions,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    TensorBatch,
    TensorGroup,
)
from mergekit.merge_methods.base import ParameterSpec
from mergekit.merge_methods.batching import prepare_batches
from pydantic import Field, FiniteFloat, ValidationError
from torch import Tensor

from ... import ops
from ...errors import ConfigError, InputError
from ...execution.in_memory import merge_matrices, merge_source
from ...methods import (
    Mean,
    MemoryDeltas,
    Method,
    NotFiniteError,
    OutOfRangeError,
    RowBlock,
    TensorSpec,
    make_method,
    method_for,
)
from ...methods.source import check_finite, checked_weights

LAMBDA, WEIGHT = "lambda", "weight"


class Parameter(ParameterSpec):
    """Define a parameter of a recipe; refuse bad values by its name."""

    def validate(self, value: Any) -> Any:
        try:
            return super().validate(value)
        except ValidationError as error:
            raise ConfigError(f"parameter {self.name} is {value!r}: {error.errors()[0]['msg']}") from error


# A weight is a number of every tensor of a batch, like mergekit's own; other values go with the batch as a whole.
_SHARED_BY_BOTH = (
    Parameter(WEIGHT, FiniteFloat, ParameterScope.NON_BASE, default=1.0, batch_tensor=True),
    Parameter(LAMBDA, FiniteFloat, ParameterScope.SHARED, default=1.0),
    Parameter("rank_policy", Literal["range", "min-dim"], ParameterScope.SHARED, default="range"),
    Parameter("precision", Literal["fast", "default", "reference"], ParameterScope.SHARED, default="default"),
)
_COMMON_FRACTION = Parameter(
    "common_fraction", Annotated[float, Field(ge=0.0, le=1.0)], ParameterScope.SHARED, default=0.8
)


class IsotropicMergeMethod(MergeMethod):
    """Merge θ = θ₀ + λ · Δ, with Δ of ``method`` on w_t Δ_t for matrices, and their mean for every other tensor.

    mergekit's batch kernels do not see names, and its group kernels see one tensor at a time; here names decide
    (``text_projection`` is averaged), and matrices of one shape are merged as one batch. So this stands beside both, on
    the class under them, and packs what belongs together with mergekit's own packing. Parameters of the recipe that are
    neither weight nor lambda are options of the method.
    """

    supports_batching = True

    def __init__(self, method: str, pretty_name: str, parameters: Sequence[ParameterSpec]) -> None:
        self.method = method
        self.spec = MergeMethodSpec(
            name=method.replace("-", "_"),
            parameters=tuple(parameters),
            contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
            pretty_name=pretty_name,
            reference_url="https://arxiv.org/abs/2502.04959",
        )

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        """Merge what mergekit has checked and bound to parameters.

        Return one tensor a group, in the order of ``groups``, rounded once to ``out_dtype``, or to the dtype in which
        mergekit gives the base. No gradients are recorded. Errors name the tensor, and the models of NaN or Inf.
        """
        results: dict[int, Tensor] = {}
        for by_method in (True, False):
            share = [index for index, group in enumerate(groups) if self._takes(group) == by_method]
            prepared = prepare_batches(
                [groups[index] for index in share],
                [parameters[index] for index in share],
                self.spec,
                options,
                input_dtypes=[input_dtypes[index] for index in share],
            )
            for chunk in prepared:
                members = [share[index] for index in chunk.indices]
                batch, values = chunk.pack(self.spec)
                merged = self._merge(batch, values, [groups[index] for index in members], by_method, out_dtype)
                results.update(zip(members, merged.unbind(0), strict=True))
        return tuple(results[index] for index in range(len(groups)))

    def _takes(self, group: TensorGroup) -> bool:
        """Return whether the method merges this tensor; others are averaged."""
        method = make_method(self.method)
        name, tensor = group.metadata.name or "", group.tensors[0]
        return method_for(method, TensorSpec(name, tuple(tensor.shape), torch.float32)) is method

    def _merge(
        self,
        batch: TensorBatch,
        values: dict[str, Any],
        groups: Sequence[TensorGroup],
        by_method: bool,
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        """Return the merged tensors [B, ...] of one batch, base first."""
        options = {key: value for key, value in values.items() if key not in (LAMBDA, WEIGHT)}
        method: Method = make_method(self.method, options) if by_method else Mean()
        base, *experts = batch.tensors
        out_dtype = out_dtype or base.dtype
        if base.numel() == 0:
            return base.to(out_dtype, copy=True)
        compute = ops.compute_dtype(base.dtype)
        for group in groups:
            spec = TensorSpec(group.metadata.name or "", tuple(base.shape[1:]), compute)
            try:
                method.check(spec, len(experts))
                check_finite(LAMBDA, [values[LAMBDA]], compute)
            except ConfigError as error:
                raise ConfigError(f"{_name(group)}: {error}") from error
        given = zip(groups, values[WEIGHT].tolist(), strict=True)
        weights = [checked_weights(each, compute, f"{_name(group)}: ") for group, each in given]
        specs = [TensorSpec(group.metadata.name or "", tuple(base.shape[1:]), compute) for group in groups]
        full_spec = TensorSpec(", ".join(spec.name for spec in specs), tuple(base.shape), compute)
        with torch.no_grad(), torch.autocast(base.device.type, enabled=False):
            try:
                if by_method and (base.device.type == "cpu" or len(base) == 1):
                    # As the matrices themselves: products of one are not made by routines for batches.
                    sources = [
                        MemoryDeltas(
                            [expert[member] for expert in experts],
                            base[member],
                            weights=own,
                            dtype=compute,
                            full_spec=spec,
                        )
                        for member, (own, spec) in enumerate(zip(weights, specs, strict=True))
                    ]
                    merged = torch.empty(base.shape, dtype=out_dtype, device=base.device)
                    for member, made in enumerate(merge_matrices(method, sources, values[LAMBDA], out_dtype)):
                        merged[member] = made
                else:
                    source = _Batch(experts, base, weights, dtype=compute, full_spec=full_spec)
                    merged = merge_source(method, source, base, scaling=values[LAMBDA], dtype=out_dtype)
            except NotFiniteError as error:
                raise InputError(_not_finite(batch, groups)) from error
            except OutOfRangeError as error:
                raise InputError(f"{', '.join(map(_name, groups))}: {error}") from error
            merged = merged.view(batch.tensors[0].shape)
            for group, tensor in zip(groups, merged, strict=True) if ops.count_nonfinite(merged) else ():
                if count := int(ops.count_nonfinite(tensor)):
                    overflow = f"{count} merged weights overflow {out_dtype} at lambda {values[LAMBDA]:g}"
                    raise InputError(f"{_name(group)}: {overflow}")
            return merged


class _Batch(MemoryDeltas):
    """Give the deltas of a batch [B, ...] whose members have weights w_t of their own, None where all are 1."""

    def __init__(
        self, experts: Sequence[Tensor], base: Tensor, member_weights: list[tuple[float, ...] | None], **more: Any
    ) -> None:
        super().__init__(experts, base, **more)
        self._member_weights = member_weights

    def blocks(self, tasks: Sequence[int] | None = None) -> Iterator[RowBlock]:
        """Yield neighbouring members whose weights are equal as one block."""
        (whole,) = super().blocks(tasks)
        for weights, run in groupby(range(self.shape[0]), key=self._member_weights.__getitem__):
            first, *rest = run
            chosen = weights if weights is None or tasks is None else [weights[task] for task in tasks]
            yield replace(whole.part(slice(first, 1 + (rest or [first])[-1])), weights=chosen)

    def members(self, chosen: Tensor) -> _Batch:
        assert self.base is not None
        weights = [weights for weights, keep in zip(self._member_weights, chosen.tolist(), strict=True) if keep]
        return _Batch([expert[chosen] for expert in self.experts], self.base[chosen], weights, dtype=self.dtype)


def _name(group: TensorGroup) -> str:
    return f"tensor {group.metadata.name!r} {list(group.tensors[0].shape)}"


def _not_finite(batch: TensorBatch, groups: Sequence[TensorGroup]) -> str:
    """Return which tensors of which models hold NaN or Inf."""
    found = []
    for member, group in enumerate(groups):
        entries = [group.base, *group.non_base]
        pairs = zip(entries, batch.tensors, strict=True)
        models = [str(entry.id) for entry, tensor in pairs if entry and not tensor[member].isfinite().all()]
        if models:
            found.append(f"{_name(group)}: NaN or Inf in {', '.join(models)}")
    named = ", ".join(_name(group) for group in groups)
    return "; ".join(found) or f"{named}: the deltas are too large for {batch.tensors[0].dtype}"


METHODS = (
    IsotropicMergeMethod("iso-c", "Iso-C", _SHARED_BY_BOTH),
    IsotropicMergeMethod("iso-cts", "Iso-CTS", (*_SHARED_BY_BOTH, _COMMON_FRACTION)),
)
