"""What a merge will do with every tensor, and every error that headers alone can show. Nothing is read but headers."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoint.companions import companion_files
from .checkpoint.layout import (
    COPIED_DTYPES,
    DTYPE_NAMES,
    DTYPES,
    FLOAT_DTYPES,
    SINGLE_FILE,
    Checkpoint,
    StoredTensor,
    open_checkpoint,
)
from .checkpoint.writer import OutputTensor
from .config import MergeConfig
from .errors import ConfigError, InputError, ResourceError
from .methods import Mean, Method, TensorSpec, make_method
from .ops import BLOCK_ELEMENTS, compute_dtype

# Resident memory of Python, torch and BLAS: 234 MB before the first tensor, about 350 MB after a merge with the heap
# trimmed (BLAS keeps buffers), of which the estimates of single tensors cover some. With 325 MB the promise lies above
# the peaks seen: 791 MB promised, 746 to 760 MB seen over six merges of the 162 M parameter test model by Iso-CTS.
BASELINE_BYTES = 325_000_000
# Experts' tensors up to this many bytes together are kept between the passes of a method instead of read again.
KEEP_BYTES = 64 << 20
# Of larger ones rows are read that hold about this many elements.
PART_ELEMENTS = 1 << 22
ASSUMED_READ_BYTES_PER_SECOND = 1e9
MAX_PROBLEMS = 20
_TOKEN_TABLES = re.compile(r"(embed|lm_head|wte|output\.weight$|shared\.weight$)")


@dataclass(frozen=True)
class TensorPlan:
    """One tensor's fate: merged by ``method``, or copied from the base when that is None."""

    name: str
    method: Method | None
    reason: str
    spec: TensorSpec
    base: StoredTensor
    experts: tuple[StoredTensor, ...]
    out: OutputTensor
    peak_bytes: int  # working memory of this tensor, beyond the process itself
    flops: float
    rounding_seed: int | None = None  # of stochastic rounding

    @property
    def action(self) -> str:
        return self.method.name if self.method is not None else "copy"

    @property
    def keeps_experts(self) -> bool:
        return sum(expert.bytes for expert in self.experts) <= KEEP_BYTES

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.base.shape),
            "dtype": self.base.dtype,
            "out_dtype": self.out.dtype,
            "action": self.action,
            "reason": self.reason,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class Plan:
    """The whole merge. ``tensors`` are in the order in which their bytes lie in the base's files.

    ``shards`` have the names and contents of the base's files; that of a bare file is ``model.safetensors``.
    """

    config: MergeConfig
    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    tensors: tuple[TensorPlan, ...]
    shards: dict[str, tuple[OutputTensor, ...]]
    companions: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def read_bytes(self) -> int:
        """Bytes to be read at least once: copied tensors from the base only."""
        return sum(plan.base.bytes + sum(expert.bytes for expert in plan.experts) for plan in self.tensors)

    @property
    def write_bytes(self) -> int:
        """Bytes of weights to be written, over all scalings."""
        return sum(plan.out.bytes for plan in self.tensors) * len(self.config.scalings)

    @property
    def peak_ram_bytes(self) -> int:
        """Estimate of the process's peak resident memory on a CPU."""
        return BASELINE_BYTES + self.peak_working_bytes

    @property
    def peak_working_bytes(self) -> int:
        """The largest working set of one tensor: on a GPU, its memory."""
        return max((plan.peak_bytes for plan in self.tensors), default=0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.config.method,
            "scaling": list(self.config.scalings),
            "base": str(self.base.path),
            "experts": [str(expert.path) for expert in self.experts],
            "out": self.config.out,
            "tensors": [plan.to_dict() for plan in self.tensors],
            "shards": list(self.shards),
            "companions": list(self.companions),
            "notes": list(self.notes),
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
        }


def make_plan(
    config: MergeConfig,
    device: torch.device | None = None,
    *,
    max_ram: int | None = None,
    max_vram: int | None = None,
) -> Plan:
    """Reads headers, decides every tensor's fate, and finds every error that can be found that way.

    Args:
        device: where it is to run, which decides the solvers; the CPU when None.
        max_ram, max_vram: ceilings in bytes, which leave out solvers that need more; ``check_resources`` refuses what
            cannot be met.

    Raises:
        ConfigError: method, options or patterns that do not fit; output folder that is an input.
        InputError: checkpoints that cannot be opened or do not fit each other; ``problems`` lists them all.
    """
    device = device or torch.device("cpu")
    ceiling = max_vram if device.type == "cuda" else None if max_ram is None else max_ram - BASELINE_BYTES
    method = make_method(config.method, config.options)
    overrides = [(override.match, make_method(override.method, override.options)) for override in config.overrides]
    base = open_checkpoint(config.base)
    experts = tuple(open_checkpoint(path) for path in config.experts)
    if config.out is not None:
        check_out(Path(config.out), [base, *experts])
    problems = [problem for expert in experts for problem in _mismatches(base, expert, config.on_extra)]
    problems += [problem for checkpoint in (base, *experts) for problem in _unmergeable(checkpoint)]
    if problems:
        shown = problems[:MAX_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"… and {len(problems) - len(shown)} more")
        raise InputError(f"{len(problems)} problem(s) found before any output was written:", shown)

    tensors, shards = [], {}
    for stored in sorted(base.tensors.values(), key=lambda stored: (str(stored.file), stored.start)):
        plan = _plan_tensor(stored, experts, config, method, overrides, device, ceiling)
        tensors.append(plan)
        shards.setdefault(stored.file.name if base.is_folder else SINGLE_FILE, []).append(plan.out)
    if config.stochastic_rounding is not None and not any(plan.rounding_seed is not None for plan in tensors):
        raise ConfigError("stochastic_rounding: no merged tensor is written as bfloat16 (dtype: bfloat16 does that)")
    companions = tuple(companion_files(base.path)) if base.is_folder else ()
    shard_table = {name: tuple(outputs) for name, outputs in shards.items()}
    notes = tuple(_notes(config, base, experts, tensors))
    return Plan(config, base, experts, tuple(tensors), shard_table, companions, notes)


def check_out(out: Path, inputs: Iterable[Checkpoint]) -> None:
    """Raises ConfigError when writing ``out`` would replace an input or a folder that holds one."""
    target = Path(os.path.realpath(out))
    for checkpoint in inputs:
        source = Path(os.path.realpath(checkpoint.path))
        if target == source or target in source.parents:
            raise ConfigError(f"out ({out}) is or contains the input {checkpoint.path}; choose another folder")


def check_resources(plan: Plan, *, max_ram: int | None, max_vram: int | None, device: torch.device) -> None:
    """Raises ResourceError when the output does not fit on its disk or the working set not under a ceiling."""
    if max_ram is not None and plan.peak_ram_bytes > max_ram:
        raise ResourceError(f"max_ram is {max_ram} bytes; this merge needs {plan.peak_ram_bytes}")
    if max_vram is not None and device.type == "cuda" and plan.peak_working_bytes > max_vram:
        raise ResourceError(f"max_vram is {max_vram} bytes; this merge needs {plan.peak_working_bytes}")
    if plan.config.out is not None:
        folder = Path(os.path.realpath(plan.config.out)).parent
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if plan.write_bytes > free:
            raise ResourceError(f"{folder}: {free} bytes are free, the output takes {plan.write_bytes}")


def estimate_seconds(plan: Plan) -> dict[str, float]:
    """Compute time from a float64 GEMM timed now on this CPU, reading and writing at an assumed 1 GB/s."""
    sample = torch.ones(512, 512, dtype=torch.float64, device="cpu")
    torch.mm(sample, sample)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(sample, sample)
        seconds.append(time.perf_counter() - start)
    rate = 2 * 512**3 / min(seconds)
    return {
        "compute": sum(tensor.flops for tensor in plan.tensors) / rate,
        "read": plan.read_bytes / ASSUMED_READ_BYTES_PER_SECOND,
        "write": plan.write_bytes / ASSUMED_READ_BYTES_PER_SECOND,
    }


def _mismatches(base: Checkpoint, expert: Checkpoint, on_extra: str) -> Iterable[str]:
    """Problems of one expert against the base."""
    for name, stored in base.tensors.items():
        other = expert.tensors.get(name)
        if other is None and stored.dtype in COPIED_DTYPES:
            continue  # position_ids and the like, which older releases saved and newer do not: the base has them
        if other is None:
            tied = bool((expert.config or {}).get("tie_word_embeddings")) and "lm_head" in name
            hint = " (the expert ties its word embeddings; save base and experts with the same tying)" if tied else ""
            yield f"{expert.path}: tensor {name!r} {list(stored.shape)} of the base is missing{hint}"
        elif other.shape != stored.shape:
            vocabulary = _TOKEN_TABLES.search(name) and stored.shape[1:] == other.shape[1:]
            hint = " (another vocabulary size?)" if vocabulary else ""
            yield (
                f"{expert.path}: tensor {name!r} has shape {list(other.shape)}, "
                f"in the base {base.path} {list(stored.shape)}{hint}"
            )
        elif (other.dtype in FLOAT_DTYPES) != (stored.dtype in FLOAT_DTYPES):
            yield f"{expert.path}: tensor {name!r} is {other.dtype}, in the base {stored.dtype}"
    if on_extra == "error":
        for name in expert.tensors.keys() - base.tensors.keys():
            shape = list(expert.tensors[name].shape)
            yield f"{expert.path}: tensor {name!r} {shape} is not in the base (on_extra: ignore leaves it out)"


def _unmergeable(checkpoint: Checkpoint) -> Iterable[str]:
    """Weights that arithmetic on the stored numbers would silently ruin."""
    quantized = (checkpoint.config or {}).get("quantization_config")
    if quantized:
        kind = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        yield f"{checkpoint.path}: quantized weights ({kind}) cannot be merged; dequantize them first"
        return
    for stored in checkpoint.tensors.values():
        if stored.dtype not in FLOAT_DTYPES | COPIED_DTYPES:
            yield f"{checkpoint.path}: tensor {stored.name!r} is {stored.dtype}, which cannot be merged"


def _plan_tensor(
    stored: StoredTensor,
    experts: tuple[Checkpoint, ...],
    config: MergeConfig,
    method: Method,
    overrides: list[tuple[str, Method]],
    device: torch.device,
    ceiling: int | None,
) -> TensorPlan:
    if stored.dtype not in FLOAT_DTYPES or 0 in stored.shape:
        reason = "empty" if 0 in stored.shape else f"{stored.dtype} is not a float: copied from the base"
        spec = TensorSpec(stored.name, stored.shape, torch.float32)
        out = OutputTensor(stored.name, stored.dtype, stored.shape)
        if stored.dtype in FLOAT_DTYPES and config.dtype is not None:
            out = OutputTensor(stored.name, DTYPE_NAMES[getattr(torch, config.dtype)], stored.shape)
        return TensorPlan(stored.name, None, reason, spec, stored, (), out, 2 * stored.bytes, 0.0)
    sources = tuple(expert.tensors[stored.name] for expert in experts)
    dtype = compute_dtype(*(DTYPES[source.dtype] for source in (stored, *sources)))
    spec = TensorSpec(stored.name, stored.shape, dtype)
    chosen, reason = _choose_method(spec, config, method, overrides)
    try:
        chosen.check(spec, len(experts))
    except ConfigError as error:
        raise ConfigError(f"tensor {stored.name!r} {list(stored.shape)}: {error}") from error
    out_dtype = DTYPE_NAMES[getattr(torch, config.dtype)] if config.dtype else stored.dtype
    out = OutputTensor(stored.name, out_dtype, stored.shape)
    raw = stored.bytes + max(min(source.bytes, PART_ELEMENTS * DTYPES[source.dtype].itemsize) for source in sources)
    if sum(source.bytes for source in sources) <= KEEP_BYTES:
        raw = stored.bytes + sum(source.bytes for source in sources)
    blocks = 4 * 8 * min(spec.elements, BLOCK_ELEMENTS)
    if ceiling is not None:
        chosen = chosen.within(max(0, ceiling - raw - blocks))
    reason = reason or chosen.explain(spec, len(experts), device)
    merging = raw + chosen.workspace_bytes(spec, len(experts)) + blocks
    writing = stored.bytes + spec.bytes + out.bytes * len(config.scalings) + blocks
    peak = max(merging, writing)
    flops = chosen.flops(spec, len(experts))
    rounding = tensor_seed(config.stochastic_rounding, stored.name) if out_dtype == "BF16" else None
    return TensorPlan(stored.name, chosen, reason, spec, stored, sources, out, peak, flops, rounding)


def tensor_seed(seed: int | None, name: str) -> int | None:
    """A seed of a tensor's own, 63 bits: equal tensors under two names are not rounded alike."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]) >> 1


def _choose_method(
    spec: TensorSpec,
    config: MergeConfig,
    method: Method,
    overrides: list[tuple[str, Method]],
) -> tuple[Method, str]:
    """Overrides first, then ``exclude``, then what the method accepts and excludes itself; others are averaged.

    With the reason, which is empty for what the config's own method merges.
    """
    for pattern, override in overrides:
        if fnmatch.fnmatchcase(spec.name, pattern):
            if override.accepts(spec):
                return override, f"overrides: {pattern!r}"
            return Mean(), f"overrides: {pattern!r}, but {override.name} takes matrices only: averaged"
    for pattern in config.exclude:
        if fnmatch.fnmatchcase(spec.name, pattern):
            return Mean(), f"exclude: {pattern!r}: averaged"
    if not method.accepts(spec):
        return Mean(), f"{len(spec.shape)}-D: averaged, as published"
    for pattern in method.default_exclude:
        if fnmatch.fnmatchcase(spec.name, pattern):
            return Mean(), f"{pattern!r}: averaged, as published"
    return method, ""


def _notes(
    config: MergeConfig, base: Checkpoint, experts: tuple[Checkpoint, ...], tensors: list[TensorPlan]
) -> Iterable[str]:
    """What might surprise, each with what changes it."""
    tables = [
        plan.name
        for plan in tensors
        if plan.method and plan.action.startswith("iso") and _TOKEN_TABLES.search(plan.name)
    ]
    if tables:
        lines = ", ".join(f'{{match: "{name}", method: mean}}' for name in tables)
        yield (
            f"token tables are matrices and are merged by {config.method}, as published; "
            f"to average them: overrides: [{lines}]"
        )
    stacks = [plan.name for plan in tensors if plan.method and len(plan.base.shape) == 3]
    if stacks and make_method(config.method, config.options).default_exclude:
        yield f"{len(stacks)} 3-D tensor(s), such as {stacks[0]!r}, are averaged: the methods are defined on matrices"
    if any(plan.method is None and plan.base.dtype not in FLOAT_DTYPES for plan in tensors):
        yield "integer and boolean tensors come from the base"
    paths = [os.path.realpath(expert.path) for expert in experts]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            yield f"expert {config.experts[index]} is given more than once"
        if path == os.path.realpath(base.path):
            yield f"expert {config.experts[index]} is the base itself: its delta is zero"
    for expert in experts:
        mine, other = (base.config or {}).get("model_type"), (expert.config or {}).get("model_type")
        if mine and other and mine != other:
            yield f"{expert.path} is a {other!r} model, the base a {mine!r}; their tensors fit all the same"
    if config.dtype in ("float16", "bfloat16") and any(plan.base.dtype in ("F32", "F64") for plan in tensors):
        yield f"float tensors are rounded to {config.dtype}; the base is wider"
