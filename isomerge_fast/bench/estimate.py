"""Estimate the time of a merge on this machine (``isomerge bench``): time made-up tensors like those of its plan.

    total = max(seconds of all tensors, (bytes read + bytes read again) / reading rate + bytes written / writing rate)

as reads run ahead and writes behind while tensors are computed, on a CPU several at once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.layout import DTYPE_NAMES
from ..execution.threads import ComputeThreads, OneCore
from ..methods.source import Threads
from ..ops import dtype_name, torch_threads
from ..planning.plan import Plan, TensorPlan
from ..planning.routes import Resident, Stacked, Streamed
from ..planning.schedule import Simulation
from .ceilings import machine, measure_disk, timed
from .samples import MEASURED, Sample, Size, memory_for_samples, sample_bytes, sizes_of

CALLS = 5
# Routes of whole matrices: what takes their time is operations, not passes over bytes.
SCALED_BY_FLOPS = (Resident.name, Stacked.name, Streamed.name)
NOTES = (
    "made-up weights: full-rank deltas with noise; sums of low rank (LoRA) can take other solvers",
    "copies are timed as what they are, a pass over their bytes",
)


def group_plans(plan: Plan) -> list[list[TensorPlan]]:
    """Group the plan's tensors that take equally long."""
    groups: dict[tuple[Any, ...], list[TensorPlan]] = {}
    for tensor in plan.tensors:
        stored = tuple(copy.dtype for copy in (tensor.base, *tensor.experts))
        ranks = tuple(0 if pair is None else pair.rank for pair in tensor.pairs)
        rounded = tensor.rounding_seed is not None
        written = tensor.out_dtype, tensor.write_bytes
        key = (tensor.base.shape, tensor.spec.dtype, tensor.method, tensor.route.name, stored, written, ranks, rounded)
        groups.setdefault(key, []).append(tensor)
    return list(groups.values())


@dataclass(frozen=True)
class _Timing:
    """Hold the largest size timed of a group, its seconds and bytes a tensor, and the seconds that all sizes took."""

    size: Size
    seconds: float
    algorithm: str
    passed_bytes: int
    spent_seconds: float


def _time(
    members: Sequence[TensorPlan], plan: Plan, device: torch.device, workers: Threads, allowance_seconds: float
) -> _Timing:
    """Time the smallest size, then again and again the largest one that is expected to fit into the time left."""
    tensor = members[0]
    at_once = min(tensor.route.places, len(members)) if isinstance(tensor.route, Stacked) else 1
    room = memory_for_samples(device)
    sizes = sizes_of(tensor, device)
    sizes = [size for size in sizes if sample_bytes(tensor, size, device) <= room] or sizes[:1]
    spent, size, first = 0.0, sizes[0], True
    while True:
        sample, making = timed(lambda size=size: Sample(tensor, size, plan, device, workers, at_once), device)
        (algorithm, passed), seconds = timed(sample.merge, device)
        spent += making
        # The first call compiles on a GPU, and takes memory from the system: repeated where there is time.
        if first and (device.type == "cuda" or spent + 2 * seconds <= allowance_seconds):
            spent += seconds
            _, seconds = timed(sample.merge, device)
        first = False
        spent += seconds
        expected = {
            larger: (making * prod(larger.shape) / max(1, prod(size.shape)) + seconds * larger.share / size.share)
            for larger in sizes
            if larger.divisor < size.divisor
        }
        fitting = [larger for larger, cost in expected.items() if spent + cost <= allowance_seconds]
        if not fitting:
            break
        size = fitting[-1]
        del sample  # before the next one is made
    times = [seconds]
    while len(times) < CALLS and spent + seconds <= allowance_seconds:
        _, seconds = timed(sample.merge, device)
        times.append(seconds)
        spent += seconds
    return _Timing(size, statistics.median(times) / at_once, algorithm, passed // at_once, spent)


def _group(members: Sequence[TensorPlan], timing: _Timing) -> dict[str, Any]:
    """Return a group as the table has it.

    ``timed`` is ``measured``, or the size from which ``seconds_each`` is scaled; ``algorithm`` is that of the timed
    size, ``read_again_bytes`` what all its tensors read after their first pass.
    """
    tensor, size = members[0], timing.size
    passed = timing.passed_bytes * prod(tensor.base.shape) / max(1, prod(size.shape))
    each = timing.seconds / size.share
    return {
        "action": tensor.action,
        "route": tensor.route.name,
        "shape": list(tensor.base.shape),
        "dtype": DTYPE_NAMES[tensor.base.dtype],
        "compute_dtype": dtype_name(tensor.spec.dtype),
        "algorithm": timing.algorithm,
        "timed": size.timed,
        "count": len(members),
        "seconds_each": each,
        "seconds": each * len(members),
        "read_again_bytes": max(0, round(passed) - tensor.read_bytes) * len(members),
        "tensors": [member.name for member in members],
    }


@contextmanager
def _as_merged(tensor: TensorPlan, workers: ComputeThreads, device: torch.device) -> Iterator[Threads]:
    """Compute with the cores that compute such a tensor in a merge; yield the threads that share its blocks."""
    is_alone = device.type == "cpu" and not tensor.route.shares_blocks
    with torch_threads(tensor.cores if is_alone else torch.get_num_threads()):
        yield OneCore() if is_alone and tensor.cores == 1 else workers


def _compute_seconds(plan: Plan, groups: Sequence[dict[str, Any]], device: torch.device) -> float:
    """Return how long all tensors take: on a CPU several at once, on a GPU one after the other."""
    if device.type != "cpu":
        return sum(group["seconds"] for group in groups)
    each = {name: group["seconds_each"] for group in groups for name in group["tensors"]}
    return Simulation.of(plan.tensors, plan.budget, plan.cores, lambda tensor: each[tensor.name]).seconds


def estimate_merge(
    plan: Plan,
    device: torch.device,
    *,
    folder: Path = Path("."),
    budget_seconds: float = 60.0,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return what ``isomerge bench`` of a merge answers: times of all groups of tensors and of the disk, and their sum.

    The cheapest group goes first, and each may take an equal share of ``budget_seconds`` that is left: what small
    shapes do not need, the large ones get. Where a whole tensor would take more, a smaller one of its aspect ratio is
    timed, and scaled; the smallest size of each group is timed whatever it takes.
    """
    say("what the disk gives at most")
    disk = measure_disk(folder)
    spent, groups = 0.0, []
    pending = sorted(group_plans(plan), key=lambda members: (members[0].flops, members[0].base.bytes))
    with ComputeThreads(plan.cores) as workers, torch.no_grad():
        for index, members in enumerate(pending):
            say(f"{members[0].action} of {list(members[0].base.shape)}")
            allowance = max(0.0, budget_seconds - spent) / (len(pending) - index)
            with _as_merged(members[0], workers, device) as own_workers:
                timing = _time(members, plan, device, own_workers, allowance)
            spent += timing.spent_seconds
            groups.append(_group(members, timing))
    groups.sort(key=lambda group: -group["seconds"])
    compute = _compute_seconds(plan, groups, device)
    again = sum(group["read_again_bytes"] for group in groups)
    reading = (plan.read_bytes + again) / disk["read_bytes_per_second"]
    writing = plan.write_bytes / disk["write_bytes_per_second"]
    return {
        "machine": machine(device),
        "disk": disk,
        "method": plan.config.method,
        "experts": len(plan.experts),
        "scalings": len(plan.config.scalings),
        "groups": groups,
        "compute_seconds": compute,
        "read_bytes": plan.read_bytes,
        "read_again_bytes": again,
        "write_bytes": plan.write_bytes,
        "read_seconds": reading,
        "write_seconds": writing,
        "total_seconds": max(compute, reading + writing),
        "wall": "compute" if compute >= reading + writing else "disk",
        "peak_ram_bytes": plan.peak_ram_bytes if device.type == "cpu" else plan.host_buffer_bytes,
        "peak_vram_bytes": plan.peak_vram_bytes if device.type == "cuda" else 0,
        "budget_seconds": budget_seconds,
        "timing_seconds": spent,
        "notes": [*_notes(groups, device), *plan.notes],
    }


def _notes(groups: Sequence[dict[str, Any]], device: torch.device) -> Iterator[str]:
    """Yield how the figures were estimated, where the table does not show it."""
    yield from NOTES
    if any(group["read_again_bytes"] for group in groups):
        yield "by-rows and streamed matrices: all passes are timed from memory, and read again from the disk"
    if any(group["timed"] != MEASURED and group["route"] in SCALED_BY_FLOPS for group in groups):
        yield (
            "scaled by the count of operations: too long rather than too short, as small matrices are less efficient; "
            "on a busy CPU several times too long, so give a larger --budget there"
        )
    if device.type == "cuda":
        yield "transfers to and from the GPU overlap the rest and are left out"
