"""What the tensors of a merge cost, and how they are dealt out to processes that work side by side."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .plan import Plan, TensorPlan

# What is assumed of a worker where nothing was measured: a file system of 1 GB/s; of a GPU, products in float32.
ASSUMED_BYTES_PER_SECOND = 1e9
ASSUMED_GPU_FLOPS_PER_SECOND = 3e13
# Of the products that are timed.
SAMPLE_SIDE = 1024
# A unit is at most this share of what one worker has to do, so that workers which are not equally fast, or start late,
# still end together.
UNITS_A_WORKER = 4
# Shards are cut up until the last worker is predicted to be done within this share of the least time possible, ...
GOOD_BALANCE = 0.97
# ... or into units of this many seconds. (Starting and ending one takes 0.05: the mean of that model in 20 units.)
LEAST_SECONDS = 1.0
# By how much smaller units are tried each time. (Iso-CTS of Llama-3-70B, where computing takes as long as moving: the
# speed-up of 1 to 16 workers is predicted to be 0.915 N at least; with units of half the size each time 0.897 N.)
FINER = 1.25


@dataclass(frozen=True)
class Rates:
    """What one worker does in a second, and what the storage gives all workers together, reads and writes."""

    flops_per_second: float
    read_bytes_per_second: float = ASSUMED_BYTES_PER_SECOND
    write_bytes_per_second: float = ASSUMED_BYTES_PER_SECOND
    storage_bytes_per_second: float = math.inf


@dataclass(frozen=True)
class TensorCost:
    """What has to be moved and computed: bytes read in all passes, bytes written, operations."""

    read_bytes: int
    write_bytes: int
    flops: float

    def __add__(self, other: TensorCost) -> TensorCost:
        return TensorCost(
            self.read_bytes + other.read_bytes, self.write_bytes + other.write_bytes, self.flops + other.flops
        )

    def compute_seconds(self, rates: Rates) -> float:
        return self.flops / rates.flops_per_second

    def transfer_seconds(self, rates: Rates) -> float:
        """Of one worker that has the storage to itself."""
        reading = self.read_bytes / rates.read_bytes_per_second
        return reading + self.write_bytes / rates.write_bytes_per_second

    def seconds(self, rates: Rates) -> float:
        """Reads run ahead and writes behind while a tensor is computed: the longer of the two."""
        return max(self.compute_seconds(rates), self.transfer_seconds(rates))


def cost_of(tensors: Iterable[TensorPlan]) -> TensorCost:
    """Return the load of all of them, in all their outputs."""
    read_bytes = write_bytes = 0
    flops = 0.0
    for tensor in tensors:
        read_bytes += tensor.passed_bytes
        write_bytes += tensor.write_bytes
        flops += tensor.flops
    return TensorCost(read_bytes, write_bytes, flops)


def assumed_rates(device: torch.device) -> Rates:
    """Of products timed now on this CPU; all else is assumed."""
    return Rates(_measured_flops() if device.type == "cpu" else ASSUMED_GPU_FLOPS_PER_SECOND)


def _measured_flops() -> float:
    """Operations a second of a float32 product on this CPU.

    (A merge of the 162 M parameter test model, 4 experts, on one core of an AMD EPYC: predicted by these 17.9 s by
    Iso-C and 53 s by Iso-CTS, took 15.4 and 55; by float64 products, in which the methods do some of it, 36 and 106.)
    """
    sample = torch.ones(SAMPLE_SIDE, SAMPLE_SIDE, device="cpu")
    torch.mm(sample, sample)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(sample, sample)
        seconds.append(time.perf_counter() - start)
    return 2 * SAMPLE_SIDE**3 / min(seconds)


def estimate_seconds(plan: Plan) -> dict[str, float]:
    """Of one process on this CPU by ``assumed_rates``; these overlap."""
    rates = assumed_rates(torch.device("cpu"))
    load = cost_of(plan.tensors)
    return {
        "compute": load.compute_seconds(rates),
        "read": load.read_bytes / rates.read_bytes_per_second,
        "write": load.write_bytes / rates.write_bytes_per_second,
    }


def divide(plan: Plan, workers: int, rates: Rates) -> list[tuple[TensorPlan, ...]]:
    """Units of work for so many workers, the largest first: the output's files, or runs of tensors of one file where
    a whole file is much of what a worker has to do, or would leave others idle. A tensor is never divided.
    """
    shards: dict[str, list[TensorPlan]] = {}
    for tensor in plan.tensors:
        shards.setdefault(tensor.shard, []).append(tensor)
    each = [cost_of([tensor]) for tensor in plan.tensors]
    names = [tensor.name for tensor in plan.tensors]
    cost = dict(zip(names, (load.seconds(rates) for load in each), strict=True))
    computing = dict(zip(names, (load.compute_seconds(rates) for load in each), strict=True))
    moving = dict(zip(names, (load.transfer_seconds(rates) for load in each), strict=True))

    def seconds(unit: Sequence[TensorPlan]) -> float:
        """As ``cost_of(unit)`` takes them: one tensor is moved while another is computed."""
        return max(sum(computing[tensor.name] for tensor in unit), sum(moving[tensor.name] for tensor in unit))

    total = sum(seconds(shard) for shard in shards.values())
    possible = max(total / workers, max(cost.values(), default=0.0))
    goal = total / (workers * UNITS_A_WORKER) if workers > 1 else math.inf
    best: tuple[float, list[tuple[TensorPlan, ...]]] | None = None
    while True:
        units = [unit for shard in shards.values() for unit in _cut(shard, cost, max(goal, LEAST_SECONDS))]
        units.sort(key=seconds, reverse=True)
        longest = _longest([seconds(unit) for unit in units], workers)
        if best is None or longest < best[0]:
            best = longest, units
        if GOOD_BALANCE * longest <= possible or goal <= LEAST_SECONDS or workers == 1:
            return best[1]
        goal /= FINER


def _cut(shard: Sequence[TensorPlan], cost: dict[str, float], goal: float) -> list[tuple[TensorPlan, ...]]:
    """Runs of about equal cost: of several tensors, ``goal`` and half of the last one at most."""
    pieces = max(1, math.ceil(sum(cost[tensor.name] for tensor in shard) / goal))
    each = sum(cost[tensor.name] for tensor in shard) / pieces
    runs: list[list[TensorPlan]] = [[]]
    spent = 0.0  # on the last run
    for tensor in shard:
        if runs[-1] and spent + cost[tensor.name] / 2 > each:
            runs.append([])
            spent = 0.0
        runs[-1].append(tensor)
        spent += cost[tensor.name]
    return [tuple(run) for run in runs]


def _longest(seconds: Sequence[float], workers: int) -> float:
    """When the last worker is done, each taking the next unit as soon as it can."""
    ends = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)
