"""How long work takes that is dealt out to so many workers with one storage between them, and what is the wall."""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from .cost import Rates, TensorCost, cost_of, divide
from .plan import Plan

# Walls.
COMPUTE = "compute"
TRANSFERS = "transfers"  # at a worker's own rate
STORAGE = "storage"  # which all workers share
LARGEST_UNIT = "largest unit"


@dataclass(frozen=True)
class Forecast:
    """What is predicted of some workers.

    Attributes:
        seconds: until the last worker is done.
        busy_share: mean over the workers of (time with a unit in hand) / ``seconds``.
        speedup: seconds of one worker at the same rates and the same storage / ``seconds``.
        wall: what decides: ``compute``, ``transfers``, ``storage`` or ``largest unit``.
        units: that were dealt out.
    """

    workers: int
    seconds: float
    busy_share: float
    speedup: float
    wall: str
    units: int


def forecast(
    units: Sequence[TensorCost],
    workers: int,
    rates: Rates,
    *,
    alone: Sequence[TensorCost] | None = None,
) -> Forecast:
    """Of N workers that take units from the front of the list as soon as they are free.

    A unit of b bytes, which takes one worker c seconds to compute and t seconds to move by itself, is computed and
    moved at the same time, and ends when both have ended. Bytes are moved as fast as they can be: by one worker at its
    own rate b / t at most, by all at S = ``storage_bytes_per_second`` at most, shared max-min fairly: each at
    min(b / t, λ), where λ is the same for all and the largest for which the sum stays within S.

    From this is simulated, from one end of a transfer or of a unit to the next, when the last one ends. That is never
    before

        max(Σ c / N,  Σ t / N,  Σ b / S,  max over units of max(c, t, b / S)),

    and the wall is the largest of these: compute, transfers, storage, largest unit. It is never after
    Σ b / S + Σ s / N + (1 - 1 / N) max s, with s = max(c, t).

    Args:
        units: the largest first, for the last workers to end at about the same time.
        alone: what one worker would be given, to be compared with; the same units when left out.

    Raises:
        ValueError: there are no workers.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}: one at least")
    storage = rates.storage_bytes_per_second
    one = math.fsum(_seconds_alone(load, rates) for load in (units if alone is None else alone))
    seconds, in_hand = _simulate(units, workers, rates)
    bounds = {
        COMPUTE: math.fsum(load.compute_seconds(rates) for load in units) / workers,
        TRANSFERS: math.fsum(load.transfer_seconds(rates) for load in units) / workers,
        STORAGE: sum(load.read_bytes + load.write_bytes for load in units) / storage,
        LARGEST_UNIT: max((_seconds_alone(load, rates) for load in units), default=0.0),
    }
    return Forecast(
        workers,
        seconds,
        busy_share=in_hand / (workers * seconds) if seconds else 0.0,
        speedup=one / seconds if seconds else 1.0,
        wall=max(bounds, key=bounds.__getitem__),
        units=len(units),
    )


def item_costs(plan: Plan, workers: int, rates: Rates) -> list[TensorCost]:
    """Of what ``divide`` deals out, in its order."""
    return [cost_of(unit) for unit in divide(plan, workers, rates)]


def _seconds_alone(load: TensorCost, rates: Rates) -> float:
    """Of one worker that has the storage to itself."""
    return max(load.seconds(rates), (load.read_bytes + load.write_bytes) / rates.storage_bytes_per_second)


@dataclass
class _Transfer:
    """Bytes of a unit in hand: how many are left, and how many a second its worker moves at most."""

    own_rate: float
    left: float
    computed: float  # the time at which the unit is


def _simulate(units: Sequence[TensorCost], workers: int, rates: Rates) -> tuple[float, float]:
    """(seconds until the last unit is done, sum over the workers of the time with a unit in hand)."""
    storage = rates.storage_bytes_per_second
    waiting = iter(units)
    moving: list[_Transfer] = []  # by their own rates
    computing: list[float] = []  # a heap: the ends of units whose bytes are moved
    now = in_hand = 0.0
    while True:
        for load in islice(waiting, workers - len(moving) - len(computing)):
            size, own_seconds = load.read_bytes + load.write_bytes, load.transfer_seconds(rates)
            own_rate = size / own_seconds if own_seconds else math.inf
            insort(moving, _Transfer(own_rate, size, now + load.compute_seconds(rates)), key=_own_rate)
        if not moving and not computing:
            return now, in_hand
        level = _fair_level([transfer.own_rate for transfer in moving], storage)
        speeds = [min(transfer.own_rate, level) for transfer in moving]
        lasting = [transfer.left / speed for transfer, speed in zip(moving, speeds, strict=True)]
        step = min([*lasting, *(end - now for end in computing[:1])])
        in_hand += step * (len(moving) + len(computing))
        now += step
        while computing and computing[0] <= now:
            heapq.heappop(computing)
        still = []
        for transfer, speed, seconds in zip(moving, speeds, lasting, strict=True):
            if seconds > step:
                transfer.left -= step * speed
                still.append(transfer)
            elif transfer.computed > now:
                heapq.heappush(computing, transfer.computed)
        moving = still


def _own_rate(transfer: _Transfer) -> float:
    return transfer.own_rate


def _fair_level(own_rates: Sequence[float], storage: float) -> float:
    """The λ of Σ min(own rate, λ) = ``storage``; infinite where all together take less. ``own_rates`` ascend."""
    left = storage
    for index, rate in enumerate(own_rates):
        sharing = len(own_rates) - index
        if rate * sharing >= left:
            return left / sharing
        left -= rate
    return math.inf
