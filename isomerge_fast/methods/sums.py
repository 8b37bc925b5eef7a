"""Add the deltas up; refuse NaN, Inf, and sizes that the dtype or the method cannot hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..linalg.protocol import rounding_tolerance
from ..ops import TaskSum, dtype_name
from .source import DeltaSource, TensorSpec
from .stats import NotFiniteError, OutOfRangeError, shown_norms

# Squares and their sums are normal numbers of float64, and those of a billionth as well.
COMPUTED_NORMS = (1e-140, 1e150)
# A matrix of 10^9 weights that moved by 3 each. A flipped bit of an exponent makes 7e36 of 0.02.
LARGEST_TRAINED_NORM = 1e5


def spectral_sum(deltas: DeltaSource, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Return (S, ‖Δ_t‖² [T, ...], the largest σ of S that counts as 0, ``delta_sizes``) of comparable deltas."""
    seen = deltas.sum(dtype, len(deltas.shape) - 2)
    of_deltas = delta_sizes(seen, by_member=deltas.is_stack)
    norms = of_deltas["delta_norms"]
    for own in norms.unbind(1) if deltas.is_stack else (norms,):
        require_comparable(own, deltas.full_spec)
    return seen.total, seen.squares, rounding_of(seen.squares.sum(0).sqrt(), deltas.full_spec), of_deltas


def delta_sizes(seen: TaskSum, *, by_member: bool = False) -> dict[str, Any]:
    """Return the entries of ``MergeStats.values`` about the Δ_t, which have to be finite. One read of the device.

    They are of every task [T], or ``by_member`` of every task of every matrix [T, B].
    """
    is_batch = seen.squares.ndim > 1 and not by_member
    nonfinite, squares = (x.flatten(1).sum(1) if is_batch else x for x in (seen.nonfinite, seen.squares))
    rows = [nonfinite, squares.sqrt()]
    if seen.largest is not None and seen.largest.numel():
        rows.append(seen.largest.flatten(1).amax(1) if is_batch else seen.largest)
    if not squares.is_cpu:
        rows = torch.stack([row.double() for row in rows]).cpu().unbind()
    counts, norms, *rest = rows
    of_tasks = counts.sum(1) if by_member else counts
    bad = [task for task, count in enumerate(of_tasks.tolist()) if count]
    if bad:
        raise NotFiniteError(bad)
    if not all(map(math.isfinite, norms.flatten().tolist())):
        raise OutOfRangeError(
            f"‖Δ‖ of the tasks is {shown_norms(norms.flatten())}: more than float64 holds the squares of"
        )
    return {"delta_norms": norms, **({"delta_largest": rest[0]} if rest else {})}


def require_comparable(norms: Tensor, spec: TensorSpec) -> None:
    """Raise OutOfRangeError where a spectral method can make nothing of deltas with these ‖Δ_t‖_F, [T].

    - Σ_t ‖Δ_t‖, which bounds every σ and σ̄, is beyond ``spec.dtype`` or ``COMPUTED_NORMS``.
    - One Δ_t is larger than any training makes it, and all singular values of another one are within the rounding of
      that: the result would be the large one's alone, and the others' absence a line in the report.
    """
    total, (least, most) = math.fsum(norms.tolist()), COMPUTED_NORMS
    dtype = dtype_name(spec.dtype)
    if not (total == 0 or least <= total <= min(most, torch.finfo(spec.dtype).max)):
        raise OutOfRangeError(f"‖Δ‖ of the tasks is {shown_norms(norms)}: out of the range of {dtype} arithmetic")
    if total <= LARGEST_TRAINED_NORM:
        return
    rounding = rounding_of(norms.square().sum().sqrt(), spec)
    if bool(((norms > 0) & (norms <= rounding)).any()):
        raise OutOfRangeError(
            f"‖Δ‖ of the tasks is {shown_norms(norms)}: the small ones are lost in what {dtype} rounds of the largest"
        )


def rounding_of(norm: Tensor, spec: TensorSpec) -> Tensor:
    """Return ``rounding_tolerance`` of deltas with ‖Δ‖_F = ``norm``, by the sides and the dtype of ``full_spec``."""
    return rounding_tolerance(norm, spec.shape[-2], spec.shape[-1], spec.dtype)
