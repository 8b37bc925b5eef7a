"""What a merge would take on this machine: every kind of tensor of its plan timed on made-up weights of that shape.

    total = max(Σ count · seconds, (bytes read + bytes read again) / reading rate + bytes written / writing rate)

as reads run ahead and writes behind while tensors are computed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.layout import DTYPE_NAMES
from ..execution.threads import Workers
from ..planning.plan import Plan, TensorPlan
from ..planning.routes import Resident, Streamed
from .ceilings import Disk, machine, measure_disk, timed
from .samples import MEASURED, Sample, Size, memory_for_samples, sample_bytes, sizes_of

CALLS = 5
NOTES = (
    "made-up weights: full-rank deltas with noise; sums of low rank (LoRA) can take other solvers",
    "copies are timed as what they are, a pass over their bytes",
)


@dataclass(frozen=True)
class Group:
    """Tensors of one shape that go the same way, and what they take.

    Attributes:
        timed: ``measured``, or the size that was, from which ``seconds_each`` is scaled.
        algorithm: that of the timed size.
        read_again_bytes: in all, by passes after the first.
    """

    action: str
    route: str
    shape: tuple[int, ...]
    dtype: str
    compute_dtype: str
    algorithm: str
    timed: str
    count: int
    seconds_each: float
    seconds: float
    read_again_bytes: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """All of ``isomerge bench`` of a checkpoint. ``wall`` is which of ``compute`` and ``disk`` takes longer."""

    machine: dict[str, Any]
    disk: Disk
    method: str
    experts: int
    scalings: int
    groups: tuple[Group, ...]
    compute_seconds: float
    read_bytes: int
    read_again_bytes: int
    write_bytes: int
    read_seconds: float
    write_seconds: float
    total_seconds: float
    wall: str
    peak_ram_bytes: int
    peak_vram_bytes: int
    budget_seconds: float
    timing_seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def group_plans(plan: Plan) -> list[list[TensorPlan]]:
    """The plan's tensors, those together that take as long as each other."""
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
    """What came of one group: the largest size timed, seconds and bytes of it, and what it all took of the budget."""

    size: Size
    seconds: float
    algorithm: str
    passed_bytes: int
    spent_seconds: float


def _time(tensor: TensorPlan, plan: Plan, device: torch.device, workers: Workers, allowance_seconds: float) -> _Timing:
    """From the smallest size up, each time to the largest that is expected to fit into what is left."""
    room = memory_for_samples(device)
    sizes = sizes_of(tensor, device)
    sizes = [size for size in sizes if sample_bytes(tensor, size, device) <= room] or sizes[:1]
    spent, size, first = 0.0, sizes[0], True
    while True:
        sample, making = timed(lambda size=size: Sample(tensor, size, plan, device, workers), device)
        (algorithm, passed), seconds = timed(sample.merge, device)
        spent += making
        # The very first call compiles on a GPU, and takes memory from the system: made again where there is time.
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
    return _Timing(size, statistics.median(times), algorithm, passed, spent)


def _group(members: Sequence[TensorPlan], timing: _Timing) -> Group:
    tensor, size = members[0], timing.size
    passed = timing.passed_bytes * prod(tensor.base.shape) / max(1, prod(size.shape))
    again = max(0, round(passed) - tensor.read_bytes)
    each = timing.seconds / size.share
    return Group(
        tensor.action,
        tensor.route.name,
        tensor.base.shape,
        DTYPE_NAMES[tensor.base.dtype],
        str(tensor.spec.dtype).removeprefix("torch."),
        timing.algorithm,
        size.timed,
        len(members),
        each,
        each * len(members),
        again * len(members),
        tuple(member.name for member in members),
    )


def estimate_merge(
    plan: Plan,
    device: torch.device,
    *,
    folder: Path = Path("."),
    budget_seconds: float = 60.0,
    say: Callable[[str], None] = lambda _: None,
) -> Estimate:
    """Times every group of the plan's tensors, the disk, and puts them together.

    The cheapest group goes first, and each may take an equal share of the time that is left, so that what a few large
    shapes need is what all others leave. Where the whole tensor would take more, a smaller one of its aspect ratio is
    timed, and scaled.

    Args:
        folder: on the disk to be measured; files there are removed again.
        budget_seconds: for timing the groups, about: the smallest size of each is timed whatever it takes.
        say: told what is being done.

    Raises:
        ConfigError: no such folder.
        ResourceError: it cannot be written to, or is full.
    """
    say("what the disk gives at most")
    disk = measure_disk(folder)
    pending = group_plans(plan)
    pending.sort(key=lambda members: (members[0].flops, members[0].base.bytes))
    spent, groups = 0.0, []
    with Workers() as workers, torch.no_grad():
        for index, members in enumerate(pending):
            say(f"{members[0].action} of {list(members[0].base.shape)}")
            allowance = max(0.0, budget_seconds - spent) / (len(pending) - index)
            timing = _time(members[0], plan, device, workers, allowance)
            spent += timing.spent_seconds
            groups.append(_group(members, timing))
    groups.sort(key=lambda group: -group.seconds)
    compute = sum(group.seconds for group in groups)
    again = sum(group.read_again_bytes for group in groups)
    reading = (plan.read_bytes + again) / disk.read_bytes_per_second
    writing = plan.write_bytes / disk.write_bytes_per_second
    return Estimate(
        machine(device),
        disk,
        plan.config.method,
        len(plan.experts),
        len(plan.config.scalings),
        tuple(groups),
        compute,
        plan.read_bytes,
        again,
        plan.write_bytes,
        reading,
        writing,
        max(compute, reading + writing),
        "compute" if compute >= reading + writing else "disk",
        plan.peak_ram_bytes if device.type == "cpu" else plan.host_buffer_bytes,
        plan.peak_vram_bytes if device.type == "cuda" else 0,
        budget_seconds,
        spent,
        (*_notes(groups, device), *plan.notes),
    )


def _notes(groups: Sequence[Group], device: torch.device) -> Iterator[str]:
    """How what cannot be seen in the table was estimated."""
    yield from NOTES
    if any(group.read_again_bytes for group in groups):
        yield "by-rows and streamed matrices: all passes are timed from memory, and read again from the disk"
    if any(group.timed != MEASURED and group.route in (Resident.name, Streamed.name) for group in groups):
        yield (
            "scaled by the count of operations: too long rather than too short, as small matrices are less efficient; "
            "on a busy CPU several times too long, so give a larger --budget there"
        )
    if device.type == "cuda":
        yield "transfers to and from the GPU overlap the rest and are left out"
