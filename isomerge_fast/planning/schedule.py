"""Decide how many tensors are merged at once on a CPU, and by how many cores each.

A matrix is computed by one core: eigensolvers gain little by more, wait at barriers for cores that others use, and end
in other last digits. More cores take one together where there is no memory for as many matrices as cores, and where one
takes longer than a core's share of the whole merge. Which solver a tensor gets, and which way it goes through memory,
is decided before, and does not depend on the number of cores.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..machine import usable_cpus
from .budget import THREAD_BYTES, Budget
from .plan import TensorPlan

# Of smaller matrices each takes a core a few seconds at most: they wait for memory, and are computed by one.
LEAST_OPERATIONS = 3e11
# Of smaller matrices, of a few tenths of a second each, none is merged before its turn.
MOVED_OPERATIONS = 1e10


def default_cores() -> int:
    """Return how many CPU cores a merge takes where nothing is said: as many as torch, and no more than are usable."""
    return min(torch.get_num_threads(), usable_cpus())


def schedule(
    tensors: Sequence[TensorPlan], budget: Budget, cores: int, most_bytes: int
) -> tuple[tuple[TensorPlan, ...], Budget, int]:
    """Return the plans with the cores that compute each tensor, the budget with what is merged at once, and the cores.

    Beside ``read_ahead`` and ``write_behind``, the copies and the work of all tensors that are merged at once, and what
    every thread holds, keep to ``most_bytes``, unless one tensor alone takes more. Under a ceiling there are fewer
    cores than given where the largest tensor leaves no room for their threads.
    """
    largest = max((tensor.route.work_bytes for tensor in tensors), default=0)
    thread = THREAD_BYTES + budget.solving + max(map(_shared_bytes, tensors), default=0)
    left = max(0, most_bytes - budget.read_ahead - budget.write_behind - largest - budget.solving)
    if budget.work is not None:
        cores = min(cores, 1 + left // thread)
    free = largest + max(0, left - (cores - 1) * thread)
    held = sum(heapq.nlargest(cores + 1, map(copies_of, tensors))) if cores > 1 else 0
    copies = max(0, min(held - budget.read_ahead, free // 3, free - largest))
    room = replace(budget, copies=copies, together=free - copies, thread=thread)
    share = math.fsum(tensor.flops for tensor in tensors if not tensor.route.shares_blocks) / cores
    planned = tuple(_with_cores(tensor, room, cores, share) for tensor in tensors)
    together = max(largest, Simulation.of(planned, room, cores).together)
    return planned, replace(room, together=together), cores


def _shared_bytes(tensor: TensorPlan) -> int:
    """Return what every thread beside the first takes of a tensor whose blocks they share."""
    method = tensor.route.method
    if method is None or not tensor.route.shares_blocks:
        return 0
    return method.thread_bytes(tensor.spec, tensor.tasks)


def _with_cores(tensor: TensorPlan, budget: Budget, cores: int, share: float) -> TensorPlan:
    wanted = 1
    if not tensor.route.shares_blocks and tensor.flops >= LEAST_OPERATIONS:
        by_work = budget.together // max(1, tensor.route.work_bytes)
        by_copies = budget.read_pool // max(1, copies_of(tensor))
        at_once = max(1, min(cores, by_work, by_copies))
        wanted = max(cores // at_once, cores_of(tensor.flops, share, cores))
    return tensor if wanted == tensor.cores else replace(tensor, cores=wanted)


def cores_of(flops: float, share: float, cores: int) -> int:
    """Return how many cores take a matrix together, of ``share`` operations for every core in all."""
    return 1 if flops < LEAST_OPERATIONS else min(cores, math.ceil(flops / share))


def copies_of(tensor: TensorPlan) -> int:
    """Return the bytes of the copies that are held while a tensor is merged."""
    return tensor.read_bytes if tensor.route.holds_copies else 0


def longest_first(tensors: Sequence[TensorPlan], cores: int) -> list[TensorPlan]:
    """Return the tensors in their order, but first those that would leave cores without work later on.

    Such a one takes longer than all that come after it would take on the other cores; or it takes several cores, of
    which the first that are free would wait for the last.
    """
    after = 0.0  # operations of what stays and comes later
    late: list[TensorPlan] = []
    rest: list[TensorPlan] = []
    for tensor in reversed(tensors):
        is_large = tensor.flops >= MOVED_OPERATIONS and not tensor.route.shares_blocks
        is_late = is_large and cores > 1 and (tensor.cores > 1 or tensor.flops > after / cores)
        (late if is_late else rest).append(tensor)
        after += 0.0 if is_late else tensor.flops
    return [*sorted(late, key=lambda tensor: -tensor.flops / tensor.cores), *reversed(rest)]


@dataclass
class Simulation:
    """Hold what a merge by so many cores comes to: by default if all that takes time is operations, one a second."""

    together: int = 0  # bytes, the most work of tensors that are merged at once
    seconds: float = 0.0
    at_once: int = 0  # matrices, the most

    @classmethod
    def of(
        cls,
        tensors: Sequence[TensorPlan],
        budget: Budget,
        cores: int,
        seconds_of: Callable[[TensorPlan], float] | None = None,
    ) -> Simulation:
        """Begin each tensor, in the order of ``longest_first``, as soon as there are cores and memory for it.

        ``seconds_of`` says how long a tensor's own cores take, or all of them where they share it.
        """
        found = cls()
        seconds_of = seconds_of or partial(_operations_a_core, cores=cores)
        running: list[tuple[float, int, int, int]] = []  # end, cores, work, copies
        free, work, copies, now = cores, 0, 0, 0.0
        for tensor in longest_first(tensors, cores):
            is_shared = tensor.route.shares_blocks and cores > 1
            needs, own_work, own_copies = (0 if is_shared else tensor.cores), tensor.route.work_bytes, copies_of(tensor)
            most_work, most_copies = budget.together - own_work, budget.read_pool - own_copies
            while running and (needs > free or work > most_work or copies > most_copies):
                now, *given = heapq.heappop(running)
                free, work, copies = free + given[0], work - given[1], copies - given[2]
            found.together = max(found.together, work + own_work)
            if is_shared:
                now += seconds_of(tensor)
                found.seconds = max(found.seconds, now)
                continue
            end = now + seconds_of(tensor)
            heapq.heappush(running, (end, needs, own_work, own_copies))
            free, work, copies = free - needs, work + own_work, copies + own_copies
            found.seconds = max(found.seconds, end)
            found.at_once = max(found.at_once, len(running))
        return found


def _operations_a_core(tensor: TensorPlan, cores: int) -> float:
    return tensor.flops / (cores if tensor.route.shares_blocks else tensor.cores)
