"""Checks a finished output: every byte of every file against its manifest, and a sample of tensors recomputed in
float64.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checkpoint.io.checksum import Checksum
from ..checkpoint.io.direct_io import open_on_disk
from ..checkpoint.io.read_ahead import THREADS, Bundle, ReadAhead
from ..checkpoint.io.reader import Piece, Reader, files_of, whole
from ..checkpoint.io.writer import tensor_bytes
from ..checkpoint.layout import DTYPE_NAMES, Checkpoint, StoredTensor, read_header
from ..checkpoint.lora.adapter import LoraPair
from ..checkpoint.output.manifest import (
    MANIFEST_FILE,
    REPORT_FILE,
    FileEntry,
    Manifest,
    ShardEntry,
    TensorEntry,
    examine_manifest,
    file_entry,
    file_name,
    list_output,
)
from ..config import MergeConfig, recorded_config
from ..errors import (
    ConfigError,
    InputChangedError,
    InputError,
    ResourceError,
    UnreadableError,
    VerificationError,
    first_of,
    shown,
)
from ..methods import MemoryDeltas, NotFiniteError, RowBlock, make_method, origins_of
from ..parsing.values import path_text, whole_number
from ..planning.outputs import Output, scaling_folders
from ..planning.plan import Plan, TensorPlan
from ..planning.planner import make_plan
from .finalize import read_report

# What the merged delta may differ by, relative to its norm: the promise of the default precision, ten times over.
DELTA_TOLERANCE = 1e-4
# Splits with a smaller gap at the cut are not determined by the data to that tolerance; they are reported, not judged.
SMALLEST_GAP = 1e-6
MAX_SAMPLE_ELEMENTS = 1 << 26
# Checksums are of parts of so many elements, and this many bytes are read ahead.
PART_ELEMENTS, READ_AHEAD_BYTES = 1 << 22, 64 << 20


@dataclass(frozen=True)
class Verification:
    """What was checked and found sound.

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


def verify(folder: str | os.PathLike[str], *, samples: int = 4, seed: int = 0) -> Verification:
    """Verifies the output in ``folder``: every file of it, and nothing else in it.

    Files are read from the disk and not from the page cache, in which a page whose writing failed looks as if it were
    written.

    Args:
        samples: tensors to recompute in float64 by full SVD from the recorded inputs (0: checksums only).
        seed: of the choice of samples.

    Raises:
        ConfigError: a number of samples below zero, or no number.
        InputError: no finished output there.
        VerificationError: a file or tensor that is missing, was added or changed, or that is not what its inputs give;
            ``problems`` names them.
    """
    root = Path(path_text(folder, "folder", "the output of a merge"))
    samples, seed = whole_number(samples, "samples", 0), whole_number(seed, "seed")
    manifest, flaw = examine_manifest(root)
    problems = [] if flaw is None else [flaw]
    listing, unknown = list_output(root, manifest)
    problems += [f"{root / name}: was added" for name in unknown]
    config = None
    try:
        config = _config(manifest)
    except ConfigError as error:
        problems.append(f"{root / MANIFEST_FILE}: not the manifest of a merge ({error})")
    problems += _report_problems(root, None if flaw else manifest.get("digest"))
    problems += [
        problem
        for name, entry in manifest["files"].items()
        for problem in _file_problems(root / name, listing.get(name), entry)
    ]
    outputs = {name: Checkpoint(root / name, {}, {}) for name in manifest["outputs"]}
    for shard in _shards(manifest):
        problems += _shard_problems(root / shard.name, listing.get(shard.name), shard, outputs[shard.folder])
    result = Verification(
        str(root),
        sum(len(output.tensors) for output in outputs.values()),
        sum(output.bytes for output in outputs.values()),
        len(listing),
    )
    if config is not None:
        recorded, here = manifest["description"].get("methods", {}), origins_of(config.methods)
        if recorded != here:
            result.remarks.append(f"methods from outside were {shown(recorded)}, and are {shown(here)} here")
    if not problems and samples:
        assert config is not None
        problems += _recompute(root, manifest, config, outputs, samples, seed, result)
    if problems:
        raise VerificationError(f"{root}: {len(problems)} problem(s)", first_of(problems))
    return result


def _config(manifest: Manifest) -> MergeConfig:
    """Return the config of the merge.

    Raises:
        ConfigError: one that no merge has, or of other outputs than those that are listed.
    """
    config = recorded_config(manifest["description"])
    for chosen in (config, *config.overrides):
        make_method(chosen.method, chosen.options)
    expected = scaling_folders(config)
    found = {name: output["scaling"] for name, output in manifest["outputs"].items()}
    if found != expected:
        raise ConfigError(f"its outputs are of scalings {found}, its config of {expected}")
    return config


def _report_problems(root: Path, digest: str | None) -> Iterator[str]:
    """Yield what is wrong with the report. ``digest``: of the manifest, or None where that was changed."""
    try:
        _, own = read_report(root)
    except InputError:
        yield f"{root / REPORT_FILE}: is missing"
    except VerificationError as error:
        yield str(error)
    else:
        if digest is not None and own != digest:
            yield f"{root / REPORT_FILE}: is the report of another merge"


def _file_problems(path: Path, found: Path | None, entry: FileEntry) -> Iterator[str]:
    """Yield what is wrong with a file that is not one of weights."""
    if found is None:
        yield f"{path}: is missing"
        return
    try:
        now = file_entry(found)
    except OSError as error:
        yield f"{path}: cannot be read ({error.strerror})"
        return
    if now["bytes"] != entry["bytes"]:
        yield f"{path}: has {now['bytes']} bytes, and was written with {entry['bytes']}"
    elif now["checksum"] != entry["checksum"]:
        yield f"{path}: is not what was written (checksum differs)"


@dataclass(frozen=True)
class _Shard:
    """A file of weights as the manifest has it: in which sub-folder, and which tensors."""

    name: str
    folder: str
    entry: ShardEntry
    tensors: dict[str, TensorEntry]


def _shards(manifest: Manifest) -> list[_Shard]:
    shards: dict[str, _Shard] = {}
    for folder, output in manifest["outputs"].items():
        for tensor, entry in output["tensors"].items():
            name = file_name(folder, entry["file"])
            shard = shards.setdefault(name, _Shard(name, folder, manifest["shards"][name], {}))
            shard.tensors[tensor] = entry
    return list(shards.values())


def _shard_problems(path: Path, found: Path | None, shard: _Shard, output: Checkpoint) -> Iterator[str]:
    """Yield what is wrong with a file of weights; what is in it is added to ``output``."""
    if found is None:
        yield f"{path}: is missing, and with it {len(shard.tensors)} tensor(s)"
        return
    try:
        os.close(open_on_disk(found))
        tensors, identity = read_header(found)
    except OSError as error:
        yield f"{path}: cannot be read ({error.strerror})"
        return
    except InputError as error:
        yield str(error)
        return
    problems = [*_layout_problems(path, tensors, shard.tensors)]
    if identity.header_sha256 != shard.entry["header_sha256"] and not problems:
        problems.append(f"{path}: its header is not what was written (its metadata, or the order of its tensors)")
    yield from problems
    present = [tensors[name] for name in shard.tensors if name in tensors]
    part = Checkpoint(output.path, tensors, {found: identity})
    try:
        for stored, checksum in zip(present, checksums(part, present), strict=True):
            if checksum != shard.tensors[stored.name]["checksum"]:
                yield f"{path}: tensor {stored.name!r} is not what was written (checksum differs)"
    except (InputChangedError, UnreadableError) as error:
        yield f"{path}: cannot be read ({getattr(error.__cause__, 'strerror', None) or error})"
    output.tensors.update(tensors)
    output.files[found] = identity


def _layout_problems(
    path: Path, found: Mapping[str, StoredTensor], recorded: Mapping[str, TensorEntry]
) -> Iterator[str]:
    """Yield what is wrong with the tensors of a file, by its header."""
    for name, entry in recorded.items():
        stored = found.get(name)
        if stored is None:
            yield f"{path}: tensor {name!r} is missing"
        elif (dtype := DTYPE_NAMES[stored.dtype], list(stored.shape)) != (entry["dtype"], entry["shape"]):
            yield (
                f"{path}: tensor {name!r} is {dtype}{list(stored.shape)}, "
                f"and was written as {entry['dtype']}{entry['shape']}"
            )
    for name in sorted(found.keys() - recorded.keys()):
        yield f"{path}: tensor {name!r} was added"


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
    root: Path,
    manifest: Manifest,
    config: MergeConfig,
    outputs: Mapping[str, Checkpoint],
    samples: int,
    seed: int,
    result: Verification,
) -> Iterator[str]:
    """Yield how tensors of a sample differ from what the recorded inputs give; all else goes into ``result``."""
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
    """Return the files of inputs that are not what they were: by size or header; and by modification time alone."""
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
            entry = compare(tensor, output, reader, [reader.read(whole(each)) for each in found])
        except (InputError, ResourceError, NotFiniteError) as error:
            yield f"{where}: tensor {tensor.name!r} cannot be recomputed ({error})"
            continue
        if entry["error"] is None:
            result.remarks.append(f"tensor {tensor.name!r}: not judged, the gap at its cut is {entry['gap']:.1e}")
            continue
        result.recomputed.append(entry)
        if not entry["error"] <= entry["allowed"]:
            yield (
                f"{where}: tensor {tensor.name!r} differs from its float64 recomputation by "
                f"{entry['error']:.1e}, allowed {entry['allowed']:.1e}"
            )


def _sample(plan: Plan, samples: int, seed: int) -> list[TensorPlan]:
    """A seeded choice, half of it merged by a spectral method, none too large to recompute at leisure."""
    merged = [tensor for tensor in plan.tensors if tensor.method is not None]
    small = [tensor for tensor in merged if tensor.spec.elements <= MAX_SAMPLE_ELEMENTS]
    spectral = [tensor for tensor in small if tensor.method is not None and not tensor.method.any_shape]
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
    if plan.spec.dtype == torch.float32:
        deltas = [delta.float() for delta in deltas]
    # A single number has no rows.
    value, stats = plan.method.exact().merge(MemoryDeltas([delta.reshape(base.shape or (1,)) for delta in deltas]))
    return base, value.double().view(base.shape), stats.to_dict().get("gap", 1.0)


def _product(plan: TensorPlan, pair: LoraPair | None, reader: Reader) -> Tensor:
    """Δ of one adapter, [M, N] in float64."""
    if pair is None:
        return torch.zeros(plan.spec.shape, dtype=torch.float64)
    a, b = (reader.read(whole(stored)).double() for stored in (pair.a, pair.b))
    return pair.scale * (b @ a if not pair.transposed else (b @ a).mT)


def _compare(plan: TensorPlan, output: Output, reader: Reader, found: list[Tensor]) -> dict[str, Any]:
    """‖stored − round(expected)‖_F / ‖expected − θ₀‖_F, expected = θ₀ + α·Δ in float64 by the reference solver.

    An error e_i before rounding moves entry i to the next number with probability |e_i| / ulp_i, which costs ulp_i; so
    the mean square of what rounding (to the nearest, or by the same random bits) makes of an error e is
    Σ |e_i| ulp_i ≤ ‖e‖ ‖ulp‖. Allowed is that, twice, for the e
    that the default precision promises and float32 arithmetic adds. A delta that is 1 % off is found in bf16 as well.
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
    return _result(plan, output, error, allowed, moved or norm or 1.0, gap)


def _compare_factors(plan: TensorPlan, output: Output, reader: Reader, found: list[Tensor]) -> dict[str, Any]:
    """‖α·Δ − B A‖_F / ‖α·Δ‖_F of an adapter. Allowed is what the best approximation of its rank leaves (Eckart-Young),
    the default precision's promise and the rounding of both factors.
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
    return _result(plan, output, error, allowed, norm or 1.0, 1.0)


def _result(plan: TensorPlan, output: Output, error: float, allowed: float, scale: float, gap: float) -> dict[str, Any]:
    return {
        "name": plan.name,
        "scaling": output.scaling,
        "error": error / scale if gap >= SMALLEST_GAP else None,
        "allowed": allowed / scale,
        "gap": gap,
    }
