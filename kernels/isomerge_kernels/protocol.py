"""Define and check what the passes over a merge's bytes take and return, on every device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TaskSum(NamedTuple):
    """Hold Σ_t w_t Δ_t and what was seen of every Δ_t: [T], or [T, B, ...] where B, ... count as a batch.

    Attributes:
        total: in the shape of a Δ_t, in the dtype asked for.
        squares: ‖Δ_t‖_F², float64, of whatever float32 holds (a GPU: of 1e-30 and more). Of float64 entries it is Inf
            where float64 does not hold it; and it is never 0 where Δ_t is not, but the smallest normal number.
        largest: max |Δ_t|, float64; NaN where not all entries are finite, None where it was not asked for.
        nonfinite: how many entries of Δ_t are NaN or Inf, int64.
    """

    total: Tensor
    squares: Tensor
    largest: Tensor | None
    nonfinite: Tensor


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return fp64 when any input is fp64, else fp32: half precision is never computed in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_same(name: str, tensors: Sequence[Tensor], base: Tensor) -> None:
    """Raise ValueError where a tensor's shape or device is not that of ``base``, or its dtype not a float's."""
    for index, tensor in enumerate(tensors):
        if tensor.shape != base.shape:
            raise ValueError(f"{name}[{index}] has shape {list(tensor.shape)}, expected {list(base.shape)}")
        if tensor.device != base.device:
            raise ValueError(f"{name}[{index}] is on {tensor.device}, expected {base.device}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}[{index}] is {tensor.dtype}; expected one of {FLOAT_DTYPES}")


def weights_of(weights: Sequence[float] | None, tasks: int) -> tuple[float, ...]:
    """Return w_t as given, or ones.

    Raises:
        ValueError: another number of weights than tasks, or one that is not finite.
    """
    values = (1.0,) * tasks if weights is None else tuple(float(weight) for weight in weights)
    if len(values) != tasks:
        raise ValueError(f"weights: expected {tasks}, one a task, got {len(values)}")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"weights: expected finite numbers, got {values}")
    return values


def prepared_sum(
    experts: Sequence[Tensor],
    base: Tensor | None,
    weights: Sequence[float] | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> tuple[tuple[float, ...], Tensor]:
    """Return w_t and the tensor that takes S, for a ``task_sum``.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit each other.
    """
    first = experts[0]
    check_same("experts", experts, first if base is None else base)
    values = weights_of(weights, len(experts))
    out = torch.empty(first.shape, dtype=dtype, device=first.device) if out is None else out
    if out.shape != first.shape or out.device != first.device:
        raise ValueError(f"out is {list(out.shape)} on {out.device}, expected {list(first.shape)} on {first.device}")
    if not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}; expected a contiguous tensor")
    return values, out


def empty_sum(out: Tensor, tasks: int, batch: torch.Size) -> TaskSum:
    """Return the ``TaskSum`` of experts that have no entries."""
    zero = torch.zeros(tasks, *batch, dtype=torch.float64, device=out.device)
    return TaskSum(out, zero, zero.clone(), zero.long())


def check_apply(base: Tensor, delta: Tensor, dtype: torch.dtype, seed: int | None, first: int) -> None:
    """Raise ValueError for operands of ``apply_delta`` that do not fit each other."""
    check_same("delta", [delta], base)
    if base.dtype not in FLOAT_DTYPES or dtype not in FLOAT_DTYPES:
        raise ValueError(f"base is {base.dtype}, dtype {dtype}; expected two of {FLOAT_DTYPES}")
    if delta.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"delta is {delta.dtype}; expected float32 or float64")
    if seed is None:
        return
    if dtype != torch.bfloat16:
        raise ValueError(f"seed: stochastic rounding is to bfloat16, not to {dtype}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; expected 0 or more, and less than 2^63")
    if first < 0 or first % 8:
        raise ValueError(f"first is {first}; expected a multiple of 8, 0 or more")
