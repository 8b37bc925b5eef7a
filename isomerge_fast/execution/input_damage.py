"""Find inputs that cannot be meant: other bytes than recorded, weights that are not finite, weights of absurd size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .. import ops
from ..checkpoint.io.reader import Reader
from ..checkpoint.layout import StoredTensor
from ..errors import InputError
from ..methods import OutOfRangeError
from ..planning.plan import TensorPlan
from .sources import bundle_of, first_pass

# No training moves a weight by so many times the tensor's largest one, or, where that is small, by so much. A flipped
# bit makes 1311 of 0.02 in float16, and 7e36 in the other dtypes.
ABSURD = 1e3


def require_checksums(plan: TensorPlan, found: Mapping[StoredTensor, str]) -> None:
    """Raise InputError where the bytes of an input are not those that its merge recorded."""
    for stored, known in zip((plan.base, *plan.experts), plan.checksums, strict=False):
        if found[stored] != known:
            raise InputError(
                f"{stored.file}: tensor {stored.name!r} is not what it was in the merge that kept the delta "
                "(checksum differs)"
            )


def require_finite(evidence: Mapping[str, Any]) -> None:
    """Raise OutOfRangeError where a number of the evidence is NaN or infinite: the result cannot be right."""
    for key, value in evidence.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise OutOfRangeError(f"{key} is {value}")


def out_of_range(plan: TensorPlan, reader: Reader, reason: str) -> InputError:
    """Return the error of a tensor that is not finite: which inputs hold NaN or Inf, and how many.

    Where none does, it gives ``reason`` and the largest weight of every input.
    """
    counts: dict[StoredTensor, int] = {}
    largest: dict[StoredTensor, float] = {}
    for bundle in first_pass(plan):
        for piece in bundle.pieces:
            value = reader.read(piece)
            counts[piece.stored] = counts.get(piece.stored, 0) + int(ops.count_nonfinite(value))
            most = _largest(value) if value.is_floating_point() else 0.0
            largest[piece.stored] = max(largest.get(piece.stored, 0.0), most)
    found = [
        f"{stored.file}: tensor {stored.name!r} holds {count} NaN or Inf" for stored, count in counts.items() if count
    ]
    if found:
        return InputError("a weight is not finite:", found)
    sizes = [f"{stored.file}: the largest weight of {stored.name!r} is {most:.3g}" for stored, most in largest.items()]
    return InputError(f"tensor {plan.name!r}: {reason}", sizes)


def absurd_deltas(plan: TensorPlan, evidence: Mapping[str, Any], reader: Reader) -> Iterator[str]:
    """Yield a remark on every expert whose max |Δ_t| is absurd (‖Δ_t‖_F, where deltas are factors).

    That is ``ABSURD`` times as large as 1, as the base's largest weight (its ‖θ₀‖_F) and as the median of the others
    that have any.
    """
    kind, what = ("delta_norms", "‖Δ‖") if plan.pairs else ("delta_largest", "largest |Δ|")
    sizes: Sequence[float] = evidence.get(kind, ())
    if max(sizes, default=0.0) <= ABSURD:
        return
    of_base: float | None = None
    for task, size in enumerate(sizes):
        others = [other for index, other in enumerate(sizes) if index != task and other > 0]
        beside = {"the others'": statistics.median_low(others)} if others else {}
        if size <= ABSURD * max([1.0, *beside.values()]):
            continue
        if plan.route.reads_base:
            of_base = _size_of_base(plan, reader) if of_base is None else of_base
            beside["the base's own weights'"] = of_base
        elif not others:
            beside["a matrix of ones'"] = math.sqrt(plan.spec.elements)
        if size > ABSURD * max(beside.values()):
            pair = plan.pairs[task] if plan.pairs else None
            file = plan.experts[task].file if pair is None else pair.a.file
            compared = " and ".join(f"{value:.3g}, {whose}" for whose, value in beside.items())
            yield f"{file}: its {what} is {size:.3g}, beside {compared}: is a weight damaged?"


def _size_of_base(plan: TensorPlan, reader: Reader) -> float:
    """Return max |θ₀|, or ‖θ₀‖_F where deltas are factors, read anew."""
    parts = (reader.read(piece) for rows in plan.route.parts() for piece in bundle_of(plan, rows, ()).pieces)
    if plan.pairs:
        return math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts))
    return max(map(_largest, parts))


def _largest(value: torch.Tensor) -> float:
    return max(map(abs, map(float, torch.aminmax(value)))) if value.numel() else 0.0
