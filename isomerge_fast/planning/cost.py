"""Count bytes and operations of planned tensors, divide tensors among workers, and bound the time by rates."""

from __future__ import annotations

import heapq
import math
import timeit
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..ops import torch_threads
from .plan import Plan, TensorPlan
from .schedule import Simulation

# What is assumed of a worker where nothing was measured: a file system of 1 GB/s; of a GPU, products in float32.
ASSUMED_BYTES_PER_SECOND = 1e9
ASSUMED_GPU_FLOPS_PER_SECOND = 3e13
# Side of the square matrices whose product is timed.
SAMPLE_SIDE = 1024
# An item is at most this share of one worker's part of the work, so that workers which are not equally fast, or start
# late, still end together.
ITEMS_PER_WORKER = 4
# Shards are cut up until the last worker is predicted to be done within this share of the least time possible, ...
GOOD_BALANCE = 0.97
# ... or into items of this many seconds. (Starting and ending one takes 0.05: the mean of that model in 20 items.)
LEAST_SECONDS = 1.0
# By how much smaller items are tried each time. (Iso-CTS of Llama-3-70B, where computing takes as long as moving: the
# speed-up of 1 to 16 workers is predicted to be 0.915 N at least; with items of half the size each time 0.897 N.)
FINER = 1.25


@dataclass(frozen=True)
class Rates:
    """Hold what one worker does in a second, and what the storage gives all workers together, reads and writes."""

    flops_per_second: float
    read_bytes_per_second: float = ASSUMED_BYTES_PER_SECOND
    write_bytes_per_second: float = ASSUMED_BYTES_PER_SECOND
    storage_bytes_per_second: float = math.inf


@dataclass(frozen=True)
class TensorCost:
    """Hold the bytes that are read in all passes, the bytes that are written, and the operations."""

    read_bytes: int
    write_bytes: int
    flops: float

    def compute_seconds(self, rates: Rates) -> float:
        return self.flops / rates.flops_per_second

    def transfer_seconds(self, rates: Rates) -> float:
        """Return the time in which one worker that has the storage to itself reads and writes the bytes."""
        reading = self.read_bytes / rates.read_bytes_per_second
        return reading + self.write_bytes / rates.write_bytes_per_second

    def storage_seconds(self, rates: Rates) -> float:
        """Return the time in which the storage moves the bytes, if no worker is too slow for it."""
        return (self.read_bytes + self.write_bytes) / rates.storage_bytes_per_second

    def seconds(self, rates: Rates) -> float:
        """Return the longer of computing and moving: a worker reads ahead and writes behind while it computes."""
        return max(self.compute_seconds(rates), self.transfer_seconds(rates))


def cost_of(tensors: Iterable[TensorPlan]) -> TensorCost:
    """Return the cost of all the tensors together, in all their outputs."""
    all_of_them = list(tensors)
    read, written = sum(each.passed_bytes for each in all_of_them), sum(each.write_bytes for each in all_of_them)
    return TensorCost(read, written, sum((each.flops for each in all_of_them), 0.0))


def least_seconds(items: Sequence[TensorCost], workers: int, rates: Rates) -> tuple[float, str]:
    """Return the least time in which N workers can do all items, and the wall: what keeps them from being faster.

    One worker computes an item of b bytes in c seconds and moves its bytes in t seconds, both at once. All workers
    together move S bytes a second at most, and nobody shares an item. So they are never done before

        max(Σ c / N,  Σ t / N,  Σ b / S,  max over items of max(c, t, b / S)),

    and the wall is the largest of the four: compute, transfers, storage, largest unit.
    """
    walls = {
        "compute": math.fsum(item.compute_seconds(rates) for item in items) / workers,
        "transfers": math.fsum(item.transfer_seconds(rates) for item in items) / workers,
        "storage": math.fsum(item.storage_seconds(rates) for item in items),
        "largest unit": max((max(item.seconds(rates), item.storage_seconds(rates)) for item in items), default=0.0),
    }
    wall = max(walls, key=walls.__getitem__)
    return walls[wall], wall


def assumed_rates(device: torch.device, cores: int = 1) -> Rates:
    """Return the rates of products timed now on ``cores`` of this CPU, or assumed of a GPU; bytes are assumed."""
    return Rates(cores * _measured_flops() if device.type == "cpu" else ASSUMED_GPU_FLOPS_PER_SECOND)


def _measured_flops() -> float:
    """Measure the operations a second of a float32 product on one core of this CPU.

    (A merge of the 162 M parameter test model, 4 experts, on one core of an AMD EPYC: predicted by these 17.9 s by
    Iso-C and 53 s by Iso-CTS, took 15.4 and 55; by float64 products, in which the methods do some of it, 36 and 106.)
    """
    sample = torch.ones(SAMPLE_SIDE, SAMPLE_SIDE, device="cpu")
    with torch_threads(1):
        return 2 * SAMPLE_SIDE**3 / min(timeit.repeat(lambda: torch.mm(sample, sample), number=1, repeat=4))


def estimate_seconds(plan: Plan) -> dict[str, float]:
    """Return how long one process on this CPU computes, reads and writes by ``assumed_rates``; the three overlap."""
    rates = assumed_rates(torch.device("cpu"))
    total = cost_of(plan.tensors)
    return {
        "compute": Simulation.of(plan.tensors, plan.budget, plan.cores).seconds / rates.flops_per_second,
        "read": total.read_bytes / rates.read_bytes_per_second,
        "write": total.write_bytes / rates.write_bytes_per_second,
    }


def matrices_at_once(plan: Plan) -> int:
    """Return how many matrices are computed at once on a CPU, the most."""
    return Simulation.of(plan.tensors, plan.budget, plan.cores).at_once


def divide(plan: Plan, workers: int, rates: Rates) -> list[tuple[TensorPlan, ...]]:
    """Divide a merge into work items for so many workers, and return them, the largest first.

    An item is a file of the output, or a run of tensors of one file where a whole file is much of one worker's part, or
    would leave others idle. A tensor is never divided.
    """
    shards: dict[str, list[TensorPlan]] = {}
    computing: dict[str, float] = {}
    moving: dict[str, float] = {}
    for tensor in plan.tensors:
        shards.setdefault(tensor.shard, []).append(tensor)
        cost = cost_of([tensor])
        computing[tensor.name], moving[tensor.name] = cost.compute_seconds(rates), cost.transfer_seconds(rates)
    alone = {name: max(computing[name], moving[name]) for name in computing}

    def together(item: Sequence[TensorPlan]) -> float:
        """Return the seconds of ``cost_of(item)``: one tensor is moved while another is computed."""
        return max(sum(computing[tensor.name] for tensor in item), sum(moving[tensor.name] for tensor in item))

    total = sum(together(shard) for shard in shards.values())
    possible = max(total / workers, max(alone.values(), default=0.0))
    goal = total / (workers * ITEMS_PER_WORKER) if workers > 1 else math.inf
    best: tuple[float, list[tuple[TensorPlan, ...]]] | None = None
    while True:
        items = [item for shard in shards.values() for item in _cut(shard, alone, max(goal, LEAST_SECONDS))]
        items.sort(key=together, reverse=True)
        longest = _longest([together(item) for item in items], workers)
        if best is None or longest < best[0]:
            best = longest, items
        if GOOD_BALANCE * longest <= possible or goal <= LEAST_SECONDS or workers == 1:
            return best[1]
        goal /= FINER


def _cut(shard: Sequence[TensorPlan], seconds: dict[str, float], goal: float) -> list[tuple[TensorPlan, ...]]:
    """Cut a shard into runs of about equal cost, each ``goal`` and half of its last tensor at most."""
    total = sum(seconds[tensor.name] for tensor in shard)
    each = total / max(1, math.ceil(total / goal))
    runs: list[list[TensorPlan]] = [[]]
    spent = 0.0  # on the last run
    for tensor in shard:
        if runs[-1] and spent + seconds[tensor.name] / 2 > each:
            runs.append([])
            spent = 0.0
        runs[-1].append(tensor)
        spent += seconds[tensor.name]
    return [tuple(run) for run in runs]


def _longest(seconds: Sequence[float], workers: int) -> float:
    """Return when the last worker is done, if each takes the next item as soon as it can."""
    ends = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)
