"""Checks a finished output: every byte against its manifest, and a sample of tensors recomputed in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ops
from .checkpoint.adapter import LoraPair
from .checkpoint.checksum import Checksum
from .checkpoint.layout import DTYPES, Checkpoint, StoredTensor, open_checkpoint
from .checkpoint.manifest import describe_inputs, read_manifest
from .checkpoint.read_ahead import THREADS, Bundle, ReadAhead
from .checkpoint.reader import Piece, Reader, files_of, whole
from .checkpoint.writer import tensor_bytes
from .config import config_from_dict
from .errors import InputError, VerificationError
from .methods import RowBlock, TensorDeltas
from .plan import Plan, TensorPlan, make_plan
from .routes import ADAPTER

# What the merged delta may differ by, relative to its norm: the promise of the default precision, ten times over.
DELTA_TOLERANCE = 1e-4
# Splits with a smaller gap at the cut are not determined by the data to that tolerance; they are reported, not judged.
SMALLEST_GAP = 1e-6
MAX_SAMPLE_ELEMENTS = 1 << 26
# Checksums are of parts of so many elements, and this many bytes are read ahead.
PART_ELEMENTS, READ_AHEAD_BYTES = 1 << 22, 64 << 20


@dataclass(frozen=True)
class Verification:
    """What was checked. ``recomputed``: name, scaling, error relative to the merged delta, and what was allowed."""

    folder: str
    tensors: int
    bytes: int
    recomputed: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def verify(folder: str | Path, *, samples: int = 4, seed: int = 0) -> Verification:
    """Verifies the output in ``folder``.

    Args:
        samples: tensors to recompute in float64 by full SVD from the recorded inputs (0: checksums only).
        seed: of the choice of samples.

    Raises:
        InputError: no finished output there.
        VerificationError: a missing, extra or changed tensor, or one that is not what its inputs give; names it.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    problems: list[str] = []
    outputs: dict[str, Checkpoint] = {}
    tensors = total_bytes = 0
    for name, recorded in manifest["outputs"].items():
        try:
            checkpoint = outputs[name] = open_checkpoint(root / name)
        except InputError as error:
            raise VerificationError(str(error)) from error
        present = []
        for tensor, entry in recorded["tensors"].items():
            stored = checkpoint.tensors.get(tensor)
            if stored is None or stored.file.name != entry["file"]:
                problems.append(f"{root / name}: tensor {tensor!r} is missing from {entry['file']}")
            else:
                present.append(stored)
        for stored, checksum in zip(present, checksums(checkpoint, present), strict=True):
            if checksum != recorded["tensors"][stored.name]["checksum"]:
                problems.append(f"{stored.file}: tensor {stored.name!r} is not what was written (checksum differs)")
            else:
                tensors, total_bytes = tensors + 1, total_bytes + stored.bytes
        problems += [
            f"{root / name}: tensor {tensor!r} was added"
            for tensor in checkpoint.tensors
            if tensor not in recorded["tensors"]
        ]
    if problems:
        raise VerificationError(f"{root}: {len(problems)} problem(s)", problems)
    remarks: list[str] = []
    recomputed = _recompute(root, manifest, outputs, samples, seed, remarks) if samples else []
    return Verification(str(root), tensors, total_bytes, recomputed, remarks)


def checksums(checkpoint: Checkpoint, tensors: Sequence[StoredTensor]) -> Iterator[str]:
    """Of each tensor as it is in its file, read ahead in parts."""
    pieces = [
        Piece(stored, first, (min(PART_ELEMENTS, stored.elements - first),))
        for stored in tensors
        for first in range(0, stored.elements, PART_ELEMENTS)
    ]
    with (
        Reader(files_of(checkpoint)) as reader,
        ThreadPoolExecutor(THREADS) as threads,
        ReadAhead(reader, threads, (Bundle((piece,)) for piece in pieces), budget_bytes=READ_AHEAD_BYTES) as ahead,
    ):
        for stored in tensors:
            running = Checksum()
            for _ in range(0, stored.elements, PART_ELEMENTS):
                (part,) = ahead.take()
                running.update(tensor_bytes(part))
            yield running.text


def _recompute(
    root: Path, manifest: dict[str, Any], outputs: dict[str, Checkpoint], samples: int, seed: int, remarks: list[str]
) -> list[dict[str, Any]]:
    description = manifest["description"]
    paths = [recorded["path"] for recorded in description["inputs"]]
    config = config_from_dict({**description["config"], "base": paths[0], "experts": paths[1:]})
    try:
        plan = make_plan(config)
    except InputError as error:
        remarks.append(f"not recomputed: the recorded inputs are not as they were ({error})")
        return []
    if describe_inputs([plan.base, *plan.experts]) != description["inputs"]:
        remarks.append("not recomputed: the recorded inputs have changed since the merge")
        return []
    results, failures = [], []
    with Reader(files_of(plan.base, *plan.experts, *outputs.values())) as reader:
        for tensor in _sample(plan, samples, seed):
            for name, recorded in manifest["outputs"].items():
                found = [reader.read(whole(outputs[name].tensors[each])) for each in tensor.names_in(name)]
                compare = _compare_factors if tensor.route.name == ADAPTER else _compare
                result = compare(tensor, reader, found, recorded["scaling"])
                if result["error"] is None:
                    remarks.append(f"tensor {tensor.name!r}: not judged, the gap at its cut is {result['gap']:.1e}")
                    continue
                results.append(result)
                if not result["error"] <= result["allowed"]:
                    failures.append(
                        f"{root / name}: tensor {tensor.name!r} differs from its float64 recomputation by "
                        f"{result['error']:.1e}, allowed {result['allowed']:.1e}"
                    )
    if failures:
        raise VerificationError(failures[0], failures[1:])
    return results


def _sample(plan: Plan, samples: int, seed: int) -> list[TensorPlan]:
    """A seeded choice, half of it merged by a spectral method, none too large to recompute at leisure."""
    merged = [tensor for tensor in plan.tensors if tensor.method is not None]
    small = [tensor for tensor in merged if tensor.spec.elements <= MAX_SAMPLE_ELEMENTS]
    spectral = [tensor for tensor in small if tensor.action.startswith("iso")]
    generator = random.Random(seed)
    chosen = generator.sample(spectral, min(len(spectral), (samples + 1) // 2))
    others = [tensor for tensor in small if tensor not in chosen]
    return chosen + generator.sample(others, min(len(others), samples - len(chosen)))


def _expected(plan: TensorPlan, reader: Reader) -> tuple[Tensor, Tensor, float]:
    """(θ₀, the merged Δ in float64 by the reference solver, the relative gap at its cut)."""
    assert plan.method is not None
    base = reader.read(whole(plan.base)).double()
    if plan.pairs:
        experts = [_product(plan, pair, reader) for pair in plan.pairs]
    else:
        experts = [reader.read(whole(expert)) for expert in plan.experts]
    are_deltas = plan.experts_are_deltas or bool(plan.pairs)
    block = RowBlock(slice(0, 1), experts, base, are_deltas, plan.weights)
    deltas = [block.delta(task, torch.float64) for task in range(len(experts))]
    # Rank is judged as the merge judged it: by the rounding of the dtype it was computed in.
    method = replace(plan.method, precision="reference") if hasattr(plan.method, "precision") else plan.method  # type: ignore[type-var]  # methods are dataclasses
    if plan.spec.dtype == torch.float32:
        deltas = [delta.float() for delta in deltas]
    value, stats = method.merge(TensorDeltas(deltas))
    return base, value.double(), stats.to_dict().get("gap", 1.0)


def _product(plan: TensorPlan, pair: LoraPair | None, reader: Reader) -> Tensor:
    """Δ of one adapter, [M, N] in float64."""
    if pair is None:
        return torch.zeros(plan.spec.shape, dtype=torch.float64)
    a, b = (reader.read(whole(stored)).double() for stored in (pair.a, pair.b))
    return pair.scale * (b @ a if not pair.transposed else (b @ a).mT)


def _compare(plan: TensorPlan, reader: Reader, found: list[Tensor], scaling: float | None) -> dict[str, Any]:
    """‖stored − round(expected)‖_F / ‖expected − θ₀‖_F, expected = θ₀ + α·Δ in float64 by the reference solver.

    An error e_i before rounding moves entry i to the next number with probability |e_i| / ulp_i, which costs ulp_i; so
    the mean square of what rounding (to the nearest, or by the same random bits) makes of an error e is
    Σ |e_i| ulp_i ≤ ‖e‖ ‖ulp‖. Allowed is that, twice, for the e
    that the default precision promises and float32 arithmetic adds. A delta that is 1 % off is found in bf16 as well.
    """
    (stored,) = found
    base, value, gap = _expected(plan, reader)
    dtype, seed = DTYPES[plan.out_dtype], plan.rounding_seed
    if scaling is None:  # Δ itself, which is kept beside the outputs
        dtype, seed = stored.dtype, None
        base.zero_()
    alpha = 1.0 if scaling is None else scaling
    expected = base + alpha * value
    moved = torch.linalg.vector_norm(expected - base).item()
    norm = torch.linalg.vector_norm(expected).item()
    (rounded,) = ops.apply_delta(base, value, scalings=[alpha], dtype=dtype, seed=seed)
    error = torch.linalg.vector_norm(stored.double() - rounded.double()).item()
    before_rounding = DELTA_TOLERANCE * moved + torch.finfo(plan.spec.dtype).eps * norm
    ulp = torch.finfo(dtype).eps * norm
    allowed = (before_rounding**2 + 2.0 * before_rounding * ulp) ** 0.5
    return _result(plan, scaling, error, allowed, moved or norm or 1.0, gap)


def _compare_factors(plan: TensorPlan, reader: Reader, found: list[Tensor], scaling: float | None) -> dict[str, Any]:
    """‖α·Δ − B A‖_F / ‖α·Δ‖_F of an adapter. Allowed is what the best approximation of its rank leaves (Eckart-Young),
    the default precision's promise and the rounding of both factors.
    """
    assert scaling is not None
    expected = scaling * _expected(plan, reader)[1]
    a, b = (stored.double() for stored in found)
    first = next(pair for pair in plan.pairs if pair is not None)
    product = (b @ a).mT if first.transposed else b @ a
    norm = torch.linalg.vector_norm(expected).item()
    left_out = torch.linalg.vector_norm(torch.linalg.svdvals(expected)[a.shape[0] :]).item()
    rounding = 2.0 * torch.finfo(DTYPES[plan.out_dtype]).eps * norm
    error = torch.linalg.vector_norm(expected - product).item()
    allowed = left_out * (1.0 + DELTA_TOLERANCE) + DELTA_TOLERANCE * norm + rounding
    return _result(plan, scaling, error, allowed, norm or 1.0, 1.0)


def _result(
    plan: TensorPlan, scaling: float | None, error: float, allowed: float, scale: float, gap: float
) -> dict[str, Any]:
    return {
        "name": plan.name,
        "scaling": scaling,
        "error": error / scale if gap >= SMALLEST_GAP else None,
        "allowed": allowed / scale,
        "gap": gap,
    }
