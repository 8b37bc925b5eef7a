"""Define and check what the passes over a merge's bytes take and return, on every device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TaskSum(NamedTuple):
    """Hold Σ_t w_t Δ_t and what was seen of every Δ_t: [T], or [T, B, ...] where B, ... count as a batch."""

    total: Tensor  # in the shape of a Δ_t, in the dtype asked for
    # ‖Δ_t‖_F², float64, of whatever float32 holds (a GPU: of 1e-30 and more). Of float64 entries it is Inf where that
    # does not hold it; and it is never 0 where Δ_t is not, but the smallest normal number.
    squares: Tensor
    largest: Tensor | None  # max |Δ_t|, float64; NaN where not all entries are finite, None where it was not asked for
    nonfinite: Tensor  # how many entries of Δ_t are NaN or Inf, int64


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return fp64 when any input is fp64, else fp32: half precision is never computed in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_same(name: str, tensors: Sequence[Tensor], base: Tensor) -> None:
    """Raise ValueError where a tensor's shape or device is not that of ``base``, or its dtype not a float's."""
    shape, device = base.shape, base.device
    for index, tensor in enumerate(tensors):
        if tensor.shape != shape:
            raise ValueError(f"{name}[{index}] has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.device != device:
            raise ValueError(f"{name}[{index}] is on {tensor.device}, expected {device}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}[{index}] is {tensor.dtype}; expected one of {FLOAT_DTYPES}")


def check_sum(experts: Sequence[Tensor], base: Tensor | None, weights: tuple[float, ...], out: Tensor) -> None:
    """Raise ValueError for operands of ``task_sum`` that do not fit each other."""
    first = experts[0]
    check_same("experts", experts, first if base is None else base)
    if len(weights) != len(experts):
        raise ValueError(f"weights: expected {len(experts)}, one a task, got {len(weights)}")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights: expected finite numbers, got {weights}")
    if out.shape != first.shape or out.device != first.device:
        raise ValueError(f"out is {list(out.shape)} on {out.device}, expected {list(first.shape)} on {first.device}")
    if not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}; expected a contiguous tensor")


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
