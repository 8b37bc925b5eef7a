"""Recompute a sample of an output's tensors in float64 from the recorded inputs, and compare."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checkpoint.io.reader import Reader, files_of, whole
from ..checkpoint.layout import Checkpoint
from ..checkpoint.lora.adapter import LoraPair
from ..checkpoint.output.manifest import Manifest
from ..config import MergeConfig
from ..errors import ConfigError, InputError, ResourceError
from ..methods import MemoryDeltas, RowBlock
from ..planning.outputs import Output
from ..planning.plan import Plan, TensorPlan
from ..planning.planner import make_plan

# What the merged delta may differ by, relative to its norm: the tolerance of the default precision, ten times over.
DELTA_TOLERANCE = 1e-4
# Splits with a smaller gap at the cut are not determined by the data to that tolerance; they are reported, not judged.
SMALLEST_GAP = 1e-6
MAX_SAMPLE_ELEMENTS = 1 << 26
# A norm of the error, what it may be, the norm that both are relative to, and the gap at the cut.
Judgement = tuple[float, float, float, float]


@dataclass(frozen=True)
class Verification:
    """Hold what was checked and found sound.

    Attributes:
        tensors, bytes: of all outputs; ``files``: whose every byte was checked.
        recomputed: name, scaling, error relative to the merged delta, and what was allowed.
        inputs_changed: inputs that are there and are not what they were, by file; that is no fault of the output.
        remarks: what could not be judged, and why.
    """

    folder: str
    tensors: int
    bytes: int
    files: int
    recomputed: list[dict[str, Any]] = field(default_factory=list)
    inputs_changed: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def recompute(
    root: Path,
    manifest: Manifest,
    config: MergeConfig,
    outputs: Mapping[str, Checkpoint],
    samples: int,
    seed: int,
    result: Verification,
) -> Iterator[str]:
    """Yield how tensors of a sample differ from what the recorded inputs give; add all else to ``result``."""
    gone = [path for path in (config.base, *config.experts) if not os.path.exists(path)]
    if gone:
        result.remarks.append(f"not recomputed: {', '.join(gone)}: no longer there")
        return
    try:
        plan = make_plan(config, is_new=False)
    except InputError as error:
        result.inputs_changed.append(f"{error}; not recomputed")
        return
    except ConfigError as error:
        result.remarks.append(f"not recomputed: {error}")
        return
    changed, touched = _changes(manifest, plan)
    result.inputs_changed.extend(f"{path}: is not the file that was merged; not recomputed" for path in changed)
    result.inputs_changed.extend(f"{path}: was written again (another modification time)" for path in touched)
    if changed:
        return
    suspects: set[Path] = set()
    with Reader(files_of(plan.base, *plan.experts, *outputs.values())) as reader:
        for tensor in _sample(plan, samples, seed):
            problems = [*_recompute_tensor(root, outputs, tensor, reader, result)]
            if problems:
                suspects.update(stored.file for stored in tensor.inputs)
            yield from problems
    if suspects:
        rewritten = sorted(suspects & {*touched})
        yield (
            "either the output was made of other bytes, or an input has changed since: "
            + ", ".join(map(str, rewritten or sorted(suspects)))
            + ("" if rewritten else " (of the size, header and modification time that they had)")
        )


def _changes(manifest: Manifest, plan: Plan) -> tuple[list[Path], list[Path]]:
    """Return the input files that have changed: those of another size or header, and those of another time alone."""
    changed, touched = [], []
    for recorded, checkpoint in zip(manifest["description"]["inputs"], [plan.base, *plan.experts], strict=True):
        now = {path.name: (path, identity) for path, identity in checkpoint.files.items()}
        for name in sorted(recorded["files"].keys() | now.keys()):
            then, found = recorded["files"].get(name), now.get(name)
            if then is None or found is None:
                changed.append(checkpoint.path / name)
            elif (then["size"], then["header_sha256"]) != (found[1].size, found[1].header_sha256):
                changed.append(found[0])
            elif then["mtime_ns"] != found[1].mtime_ns:
                touched.append(found[0])
    return changed, touched


def _recompute_tensor(
    root: Path,
    outputs: Mapping[str, Checkpoint],
    tensor: TensorPlan,
    reader: Reader,
    result: Verification,
) -> Iterator[str]:
    """Yield how a tensor differs, in each output, from what its inputs give."""
    compare = _compare_factors if tensor.route.writes_factors else _compare
    planned = {output.folder: output for output in tensor.outputs}
    for folder, checkpoint in outputs.items():
        where, output, there = root / folder, planned[folder], checkpoint.tensors
        found = [there[name] for name in output.names if name in there]
        if [(each.dtype, each.shape) for each in found] != [(each.dtype, each.shape) for each in output.tensors]:
            yield f"{where}: tensor {tensor.name!r} is not of the shape and dtype that its inputs give"
            continue
        try:
            error, allowed, scale, gap = compare(tensor, output, reader, [reader.read(whole(each)) for each in found])
        except (InputError, ResourceError) as failure:
            yield f"{where}: tensor {tensor.name!r} cannot be recomputed ({failure})"
            continue
        if not gap >= SMALLEST_GAP:
            result.remarks.append(f"tensor {tensor.name!r}: not judged, the gap at its cut is {gap:.1e}")
            continue
        error, allowed = error / scale, allowed / scale
        about = {"name": tensor.name, "scaling": output.scaling}
        result.recomputed.append({**about, "error": error, "allowed": allowed, "gap": gap})
        if not error <= allowed:
            yield (
                f"{where}: tensor {tensor.name!r} differs from its float64 recomputation by "
                f"{error:.1e}, allowed {allowed:.1e}"
            )


def _sample(plan: Plan, samples: int, seed: int) -> list[TensorPlan]:
    """Return a seeded choice of tensors, half of them of spectral methods, none larger than ``MAX_SAMPLE_ELEMENTS``."""
    merged = [tensor for tensor in plan.tensors if tensor.method is not None]
    small = [tensor for tensor in merged if tensor.spec.elements <= MAX_SAMPLE_ELEMENTS]
    spectral = [tensor for tensor in small if tensor.method is not None and not tensor.method.any_shape]
    generator = random.Random(seed)
    chosen = generator.sample(spectral, min(len(spectral), (samples + 1) // 2))
    others = [tensor for tensor in small if tensor not in chosen]
    return chosen + generator.sample(others, min(len(others), samples - len(chosen)))


def _expected(plan: TensorPlan, reader: Reader) -> tuple[Tensor, Tensor, float]:
    """Return (θ₀, the merged Δ in float64 by the reference solver, the relative gap at its cut)."""
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
    if plan.spec.dtype == torch.float32:
        deltas = [delta.float() for delta in deltas]
    # A single number has no rows.
    value, stats = plan.method.exact().merge(MemoryDeltas([delta.reshape(base.shape or (1,)) for delta in deltas]))
    return base, value.double().view(base.shape), stats.to_dict().get("gap", 1.0)


def _product(plan: TensorPlan, pair: LoraPair | None, reader: Reader) -> Tensor:
    """Return Δ of one adapter, [M, N] in float64."""
    if pair is None:
        return torch.zeros(plan.spec.shape, dtype=torch.float64)
    a, b = (reader.read(whole(stored)).double() for stored in (pair.a, pair.b))
    return pair.scale * (b @ a if not pair.transposed else (b @ a).mT)


def _compare(plan: TensorPlan, output: Output, reader: Reader, found: list[Tensor]) -> Judgement:
    """Judge ‖stored − round(expected)‖_F / ‖expected − θ₀‖_F, expected = θ₀ + α·Δ in float64 by the reference solver.

    An error e_i before rounding moves entry i to the next number with probability |e_i| / ulp_i, which costs ulp_i. So
    rounding (to the nearest, or by the same random bits) makes of an error e one whose mean square is
    Σ |e_i| ulp_i ≤ ‖e‖ ‖ulp‖. Twice that is allowed, for the e of the default precision's tolerance and of float32
    arithmetic. A delta that is 1 % off is found in bf16 as well.
    """
    (stored,) = found
    base, value, gap = _expected(plan, reader)
    dtype, alpha, seed = stored.dtype, output.scaling, plan.rounding_seed
    if alpha is None:  # Δ itself
        alpha, seed = 1.0, None
        base.zero_()
    expected = base + alpha * value
    moved = torch.linalg.vector_norm(expected - base).item()
    norm = torch.linalg.vector_norm(expected).item()
    (rounded,) = ops.apply_delta(base, value, scalings=[alpha], dtype=dtype, seed=seed)
    error = torch.linalg.vector_norm(stored.double() - rounded.double()).item()
    before_rounding = DELTA_TOLERANCE * moved + torch.finfo(plan.spec.dtype).eps * norm
    ulp = torch.finfo(dtype).eps * norm
    allowed = (before_rounding**2 + 2.0 * before_rounding * ulp) ** 0.5
    return error, allowed, moved or norm or 1.0, gap


def _compare_factors(plan: TensorPlan, output: Output, reader: Reader, found: list[Tensor]) -> Judgement:
    """Return how far an adapter's B A, ``found`` as [A, B], is from α·Δ: (‖α·Δ − B A‖_F, allowed, ‖α·Δ‖_F, gap 1).

    Allowed is what the best approximation of its rank leaves (Eckart-Young), the default precision's tolerance and the
    rounding of both factors.
    """
    assert output.scaling is not None
    expected = output.scaling * _expected(plan, reader)[1]
    a, b = (stored.double() for stored in found)
    first = next(pair for pair in plan.pairs if pair is not None)
    product = (b @ a).mT if first.transposed else b @ a
    norm = torch.linalg.vector_norm(expected).item()
    left_out = torch.linalg.vector_norm(torch.linalg.svdvals(expected)[a.shape[0] :]).item()
    rounding = 2.0 * torch.finfo(found[0].dtype).eps * norm
    error = torch.linalg.vector_norm(expected - product).item()
    allowed = left_out * (1.0 + DELTA_TOLERANCE) + DELTA_TOLERANCE * norm + rounding
    return error, allowed, norm or 1.0, 1.0
