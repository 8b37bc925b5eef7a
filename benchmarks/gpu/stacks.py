"""Time stacks: matrices of one shape that are merged at once, beside the same ones one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.profiles import profiled
from benchmarks.gpu.shapes import NAMES, SMALL, STACKED, TASKS, VIT_MATRICES, Shape
from benchmarks.harness.counting import peak_memory
from benchmarks.harness.readings import Rows
from benchmarks.shapes import dimensions
from isomerge_fast.bench.ceilings import result_and_seconds
from isomerge_fast.bench.problems import deltas_like_fine_tuning
from isomerge_fast.linalg.auto import Candidate
from isomerge_fast.linalg.filtered import STACK_LOWER
from isomerge_fast.linalg.gram_eigh import GramEigh
from isomerge_fast.linalg.polar_traced import TracedPolar
from isomerge_fast.linalg.protocol import PolarSolver
from isomerge_fast.methods import IsoCTS, MemoryDeltas, MergeStats, TensorSpec, make_method

# What one row of a method may take, beside its first calls.
BUDGET_SECONDS = 0.5
# Matrices that are made, each by 16 factorisations of its size.
DIFFERENT = 8
Alone = Mapping[tuple[str, Shape], float]


def places_of(name: str, shape: Shape, device: torch.device) -> int:
    """Return how many matrices of a shape a method merges at once on a device."""
    return make_method(name).stack_size(TensorSpec("", shape, torch.float32), TASKS, device)


def stack_label(name: str, shape: Shape, places: int) -> str:
    return f"{name} {places} x {dimensions(shape)}, stack"


def some_sources(shape: Shape, count: int, device: torch.device, different: int = DIFFERENT) -> list[MemoryDeltas]:
    """Return so many matrices of a shape: ``different`` ones, again and again."""
    seeds = range(min(count, different))
    made = [deltas_like_fine_tuning(*shape, TASKS, "decay", device=device, seed=seed) for seed in seeds]
    sources = [MemoryDeltas(deltas) for deltas in made]
    return [sources[place % different] for place in range(count)]


def stacks(rows: Rows, alone: Alone) -> None:
    """Time one stack of every shape, then all matrices of a vision transformer by stacks.

    ``alone`` has the seconds of one matrix by itself, by method and shape, as far as they were timed.
    """
    device = torch.device(rows.device)
    shapes: Sequence[Shape] = SMALL if rows.small else STACKED
    model = Counter(dict(zip(SMALL, (3, 2), strict=True))) if rows.small else VIT_MATRICES
    sources: dict[Shape, list[MemoryDeltas]] = {}
    for shape in shapes:
        sources[shape] = some_sources(shape, max(places_of(name, shape, device) for name in NAMES), device)
        for name in NAMES:
            places = places_of(name, shape, device)
            label = stack_label(name, shape, places)
            merge = partial(_merge_stacks, name, sources, {shape: places})
            seconds = _one_by_one(alone, name, {shape: places})
            rows.attempt(label, partial(_stacked, merge, device, places, seconds))
            rows.attempt(f"{label}, profile", partial(profiled, merge, device))
        if shape not in model:
            del sources[shape]
    first = {shapes[0]: places_of("iso-cts", shapes[0], device)}
    label = f"{stack_label('iso-cts', shapes[0], first[shapes[0]])} by eigensolvers"
    rows.attempt(label, partial(_by_eigensolvers, sources, device, first, _one_by_one(alone, "iso-cts", first)))
    for name in NAMES:
        merge, seconds = partial(_merge_stacks, name, sources, model), _one_by_one(alone, name, model)
        measured = partial(_stacked, merge, device, model.total(), seconds, budget_seconds=0.0)
        rows.attempt(f"{name}, matrices of ViT-B/32", measured)


class _Eigensolvers(GramEigh):
    """Split the sums of a stack by their eigenvectors, to see what the filter is worth."""

    def small_polar(self, device: torch.device) -> PolarSolver:
        return TracedPolar(GramEigh(), STACK_LOWER["small"])


def _by_eigensolvers(
    sources: Mapping[Shape, Sequence[MemoryDeltas]],
    device: torch.device,
    counts: Mapping[Shape, int],
    one_by_one: float | None,
) -> dict[str, Any]:
    chosen = Candidate(_Eigensolvers(), "to be compared")
    with mock.patch.object(IsoCTS, "stack_candidate", return_value=chosen):
        merge = partial(_merge_stacks, "iso-cts", sources, counts)
        return _stacked(merge, device, sum(counts.values()), one_by_one)


def _merge_stacks(
    name: str, sources: Mapping[Shape, Sequence[MemoryDeltas]], counts: Mapping[Shape, int]
) -> list[MergeStats]:
    """Merge so many matrices of every shape, a stack at a time; the same few come again and again."""
    method, evidence = make_method(name), []
    for shape, count in counts.items():
        places = places_of(name, shape, sources[shape][0].device)
        for start in range(0, count, places):
            results = method.merge_stack(sources[shape][: min(places, count - start)])
            evidence += [stats for _, stats in results]
    return evidence


def _one_by_one(alone: Alone, name: str, counts: Mapping[Shape, int]) -> float | None:
    """Return the seconds of so many matrices of every shape one after the other; None where one was not timed."""
    if any((name, shape) not in alone for shape in counts):
        return None
    return sum(count * alone[name, shape] for shape, count in counts.items())


def _stacked(
    merge: Callable[[], list[MergeStats]],
    device: torch.device,
    matrices: int,
    one_by_one: float | None,
    *,
    budget_seconds: float = BUDGET_SECONDS,
) -> dict[str, Any]:
    with peak_memory(device) as peak:
        evidence = merge()
    _, seconds = result_and_seconds(merge, device, budget_seconds)
    found: dict[str, Any] = {"seconds": seconds, "matrices": matrices, "one_by_one": one_by_one}
    return found | {
        "certified": not any(stats.missed() for stats in evidence),
        "algorithm": ", ".join(sorted({stats.algorithm for stats in evidence})),
        "escalations": sum(len(stats.escalations) for stats in evidence),
        "peak_bytes": peak.bytes,
    }
