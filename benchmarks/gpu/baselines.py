"""Compare our methods with others on the same device, in float32: FusionBench's functions, the published algorithm.

FusionBench's are the published algorithm with torch's default SVD. Both are run in full where there is time for it; the
other rows are one SVD's time multiplied, and say so (``estimated``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.primitives import BUDGET_SECONDS, svd
from benchmarks.gpu.shapes import LLAMA, NAMES, SMALL, TASKS, VIT, Shape
from benchmarks.harness import peers
from benchmarks.harness.readings import Rows
from benchmarks.shapes import dimensions
from isomerge_fast.bench import published
from isomerge_fast.bench.ceilings import result_and_seconds
from isomerge_fast.bench.problems import deltas_like_fine_tuning, relative_error
from isomerge_fast.methods import MemoryDeltas, make_method

SVDS = {"iso-c": 1, "iso-cts": TASKS + 3}
# A run may take so many times what its SVDs take by themselves, and so many seconds have to be left after it.
SLACK, MARGIN_SECONDS = 1.3, 3.0
# Of the SVD of any shape, in SVDs of 4096 x 4096 by the same driver: whether one is begun at all.
MOST_SVDS = 3.0


@dataclass(frozen=True)
class Baseline:
    """Name an implementation that runs on torch."""

    label: str  # of its rows, a format of the method and the shape
    merge: Callable[[str, list[Tensor]], Tensor]  # takes a method's name and T deltas; returns the merged Δ
    driver: str | None  # of torch.linalg.svd, by which it takes its SVDs


def by_driver(driver: str | None) -> Baseline:

    def merge(name: str, deltas: Sequence[Tensor]) -> Tensor:
        return getattr(published, name.replace("-", "_"))(deltas, driver=driver)

    return Baseline(f"{{}}, {driver or 'default'}", merge, driver)


def fusion_bench(rows: Rows) -> Baseline | None:
    """Return FusionBench's functions, with a row that says how they were loaded; None where they are not there."""
    try:
        _, how = peers.iso_utils()
    except ImportError as error:
        rows.note("fusion-bench", absent=str(error))
        return None
    rows.note("fusion-bench", loaded=how)

    def merge(name: str, deltas: Sequence[Tensor]) -> Tensor:
        return peers.fusion_bench(name, [{"w": delta} for delta in deltas], rows.device)["w"]

    return Baseline("fusion-bench {}", merge, None)


class Comparison:
    """Make rows of baselines, as far as the stage's time allows."""

    def __init__(self, rows: Rows, estimated: Sequence[Shape]) -> None:
        self._rows, self._estimated, self._device = rows, estimated, torch.device(rows.device)
        self._deltas: dict[Shape, list[Tensor]] = {}
        self._once: dict[tuple[Shape, str | None], float] = {}

    def svd(self, shape: Shape, driver: str | None) -> None:
        """Time one SVD of the sum of the deltas; of one Δ where that is all that the shape is needed for."""
        name = f"one SVD {dimensions(shape)}, {driver or 'default'}"
        known = [seconds for (_, other), seconds in self._once.items() if other == driver]
        if MOST_SVDS * max(known, default=0.0) > self._rows.seconds_left - MARGIN_SECONDS:
            self._rows.note(name, left_out="no time")
            return
        x = torch.stack(self._of(shape, 1 if shape in self._estimated else TASKS)).sum(0)
        found = self._rows.attempt(name, partial(svd, x, driver))
        if "seconds" in found:
            self._once[shape, driver] = found["seconds"]

    def compare(self, baseline: Baseline, method: str, shape: Shape) -> None:
        """Add a baseline's seconds, and how far our result is from its; or the time of its SVDs."""
        name, count = baseline.label.format(f"{method} {dimensions(shape)}"), SVDS[method]
        once = self._once.get((shape, baseline.driver))
        if once is None:
            self._rows.note(name, left_out="its SVD was not timed")
        elif shape in self._estimated or SLACK * count * once > self._rows.seconds_left - MARGIN_SECONDS:
            self._rows.note(name, seconds=count * once, estimated=f"{count} x one SVD")
        else:
            self._rows.attempt(name, partial(self._compared, baseline, method, shape))

    def _compared(self, baseline: Baseline, method: str, shape: Shape) -> dict[str, Any]:
        deltas = self._of(shape, TASKS)
        theirs, seconds = result_and_seconds(partial(baseline.merge, method, deltas), self._device, BUDGET_SECONDS)
        ours = make_method(method).merge(MemoryDeltas(deltas))[0]
        return {"seconds": seconds, "distance": relative_error(theirs.double(), ours.double())}

    def _of(self, shape: Shape, tasks: int) -> list[Tensor]:
        if shape not in self._deltas:
            self._deltas[shape] = deltas_like_fine_tuning(*shape, tasks, "decay", device=self._device)
        return self._deltas[shape]


def drivers(device: str) -> tuple[str | None, ...]:
    """Return the drivers of torch.linalg.svd on a device, the default first; a CPU has that alone.

    gesvda is nobody's default: an SVD by the Gram matrix, whose small singular vectors are not orthogonal.
    """
    return (None, "gesvd", "gesvda") if device.startswith("cuda") else (None,)


def baselines(rows: Rows) -> None:
    """Time Iso-C and Iso-CTS of FusionBench, and as published by drivers of torch.linalg.svd, beside our results.

    What matters most comes first: square matrices, then short ones, then long ones, estimated from one SVD.
    """
    square, *short = (SMALL[0], SMALL[1]) if rows.small else (LLAMA[0], LLAMA[1], *VIT[:2])
    long = [(shape[1], shape[0]) for shape in short] if rows.small else LLAMA[2:]
    known = drivers(rows.device)
    compared = [fusion_bench(rows) or by_driver(None), *(by_driver(driver) for driver in known if driver == "gesvd")]
    for driver in known:  # what is loaded for the first time comes slowly
        svd(torch.randn(256, 256, device=rows.device), driver)
    comparison = Comparison(rows, long)
    for driver in known:
        comparison.svd(square, driver)
    for baseline in compared:
        comparison.compare(baseline, "iso-c", square)
    for baseline in compared:
        for shape in (*short, *long):
            comparison.svd(shape, baseline.driver)
            for method in NAMES:
                comparison.compare(baseline, method, shape)
        comparison.compare(baseline, "iso-cts", square)
