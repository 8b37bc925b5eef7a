"""Estimate what work takes a GPU, from rates that were measured on one of its kind."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.summary import Readings

if TYPE_CHECKING:
    from counted_gpu import Work  # of tests/support

# Where the work of a stack's solver is by columns, beyond that by blocks: up to this side one block of threads solves a
# matrix (H200: 8 of side 111 in 1 ms, of side 152 in 8).
ONE_BLOCK = 128


class Rates:
    """Hold what ``ceilings``, ``products`` and ``primitives`` measured, as seconds of one piece of work.

    A product has the rate of 4096 x 4096 or that of a copy of its operands, whichever takes longer: of smaller ones
    that is the least it can take. Everything that is no product or factorisation goes through its operands once.
    """

    def __init__(self, readings: Readings) -> None:
        def of(stage: str, key: str, start: str) -> float:
            return next(row[key] for row in readings.of(stage) if row["name"].startswith(start) and key in row)

        self.copy = 1e9 * of("ceilings", "gb_per_s", "copy")
        self.flops = {
            ("product", torch.float64): 1e12 * of("ceilings", "tflop_per_s", "matmul 4096 fp64"),
            ("product", torch.float32): 1e12 * of("ceilings", "tflop_per_s", "matmul 4096 fp32"),
            ("symmetric", torch.float64): 1e12 * of("products", "tflop_per_s", "fp64, 4096,"),
            ("symmetric", torch.float32): 1e12 * of("products", "tflop_per_s", "tf32x3, 4096,"),
        }
        seconds = {row["name"]: row["seconds"] for row in readings.timed("primitives")}
        self._one = [(side, seconds[f"eigh {side}, fp64"]) for side in (768, 1024, 4096)]
        self._eight = [(side, seconds[f"eigh 8 x {side} fp64, rule"]) for side in (64, 152, 512, 816)]
        # By how many more matrices are in a stack: 48 of 768 over 8 of that side.
        many = seconds["eigh 48 x 768 fp64, rule"] / _between(self._eight, 768)
        self._growth = math.log(many) / math.log(48 / 8)
        small = seconds["cholesky, 8 x 816 x 816"] / 8
        self._cholesky = [(816, small), (4096, seconds["cholesky, 4096 x 4096"])]

    def seconds(self, work: Work) -> float:
        """Return the least seconds of the device that a launch takes."""
        if work.kind == "eigenproblem":
            return self._eigenproblem(work.name == "XsyevBatched", work.members, work.shape[-1])
        if work.kind == "factorisation":
            return work.members * _between(self._cholesky, min(work.shape[-2:]))
        rate = self.flops.get(("product" if work.kind == "solve" else work.kind, work.dtype), math.inf)
        return max(work.flops / rate, work.moved_bytes / self.copy)

    def _eigenproblem(self, batched: bool, members: int, side: int) -> float:
        if not batched:
            return members * _between(self._one, side)
        if side <= ONE_BLOCK:
            eight = self._eight[0][1] * (side / self._eight[0][0]) ** 2
        else:
            eight = _between(self._eight[1:], side)
        return eight * max(1.0, members / 8) ** self._growth


def _between(points: Sequence[tuple[int, float]], side: int) -> float:
    """Return the seconds at a side by a power law between the two measured ones around it, or the two nearest."""
    later = next((index for index, (known, _) in enumerate(points) if known >= side), len(points) - 1)
    (low, before), (high, after) = points[max(1, later) - 1], points[max(1, later)]
    return before * (side / low) ** (math.log(after / before) / math.log(high / low))


def seconds_a_launch(readings: Readings, launches: dict[str, int]) -> float:
    """Return what a counted launch costs the host: of matrices that were profiled, what is left of a call's time beside
    the device's own, over their counted launches; the median.
    """
    found = [
        (row["seconds"] - profile["device_ms"] / 1e3) / launches[row["name"]]
        for row in readings.timed("methods")
        if row["name"] in launches and "device_ms" in (profile := readings.row("methods", f"{row['name']}, profile"))
    ]
    return statistics.median(found)


def total_seconds(rates: Rates, work: Iterable[Work]) -> float:
    return sum(map(rates.seconds, work))
