"""Measure this machine without a checkpoint: its ceilings, and ours in turn with the published algorithm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import VerificationError
from ..linalg.auto import TOLERANCES
from ..methods import IsoC, IsoCTS, MemoryDeltas, Method
from . import published
from .ceilings import machine, measure_ceilings, measure_disk, timed
from .problems import deltas_like_fine_tuning, relative_error

ROUNDS = 5
PRECISION = "default"
# Share of the budget; the rest is for starting Python and torch, and for a last round that is longer than expected.
USED_SHARE = 0.88
# An operation of a full SVD took up to 1.5 times as long in wide and tall matrices as in square ones (2 cores).
CAUTION = 1.5


@dataclass(frozen=True)
class Shape:
    """Name a matrix of a real model; those not for CPUs would take minutes there."""

    rows: int
    columns: int
    model: str
    on_cpu: bool = True


SHAPES = (
    Shape(768, 768, "ViT-B/32 attention"),
    Shape(1024, 1024, "ViT-L/14 attention"),
    Shape(3072, 768, "ViT-B/32 fc1"),
    Shape(768, 3072, "ViT-B/32 fc2"),
    Shape(4096, 4096, "Llama-3-8B q_proj", on_cpu=False),
)


@dataclass(frozen=True)
class Algorithm:
    """Bring together one method of ours and the same as published."""

    ours: Method
    published: Callable[[Sequence[Tensor]], Tensor]

    def published_work(self, shape: Shape, tasks: int) -> float:
        """Return the work of the full SVDs up to a factor: one of the sum for Iso-C, T + 3 for Iso-CTS."""
        svds = tasks + 3 if self.ours.deltas_taken else 1
        return float(svds * shape.rows * shape.columns * min(shape.rows, shape.columns))


ALGORITHMS = (
    Algorithm(IsoC(precision=PRECISION), published.iso_c),
    Algorithm(IsoCTS(precision=PRECISION), published.iso_cts),
)


@dataclass
class _Subject:
    """Time one method on one shape; its rounds gather in ``times`` as (ours, published)."""

    shape: Shape
    algorithm: Algorithm
    deltas: list[Tensor] = field(default_factory=list)
    error: float = 0.0
    published_error: float = 0.0
    round_seconds: float = 0.0  # expected of one round
    times: list[tuple[float, float]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.algorithm.ours.name} of {self.shape.rows} x {self.shape.columns}"

    def run_ours(self) -> Tensor:
        return self.algorithm.ours.merge(MemoryDeltas(self.deltas))[0]

    def run_published(self) -> Tensor:
        return self.algorithm.published(self.deltas)

    def judge(self) -> None:
        """Compare both algorithms with float64 full SVDs, which also warms them up; refuse an error above tolerance."""
        start = time.perf_counter()
        mine, other = self.run_ours(), self.run_published()
        exact, _ = self.algorithm.ours.exact().merge(MemoryDeltas(self.deltas))
        self.error, self.published_error = relative_error(mine, exact), relative_error(other, exact)
        # Float64 SVDs take longer than the float32 ones of a round, ours far less than either.
        self.round_seconds = (time.perf_counter() - start) / 2
        bound = TOLERANCES[PRECISION]
        if not self.error <= bound:  # NaN is an error too
            raise VerificationError(
                f"{self.algorithm.ours.name} of {len(self.deltas)} deltas {self.shape.rows} x {self.shape.columns} on "
                f"{self.deltas[0].device}: error {self.error:.1e} against float64, promised is {bound:.0e} "
                f"(precision {PRECISION!r})"
            )

    def time_round(self, device: torch.device) -> None:
        mine, other = timed(self.run_ours, device)[1], timed(self.run_published, device)[1]
        self.times.append((mine, other))
        self.round_seconds = mine + other

    def row(self) -> dict[str, Any]:
        """Return the row of the table: medians over the rounds, and errors ‖Δ − Δ₆₄‖_F / ‖Δ₆₄‖_F."""
        ratios = [other / mine for mine, other in self.times]
        return {
            "model": self.shape.model,
            "rows": self.shape.rows,
            "columns": self.shape.columns,
            "method": self.algorithm.ours.name,
            "tasks": len(self.deltas),
            "rounds": len(self.times),
            "seconds": statistics.median(mine for mine, _ in self.times),
            "published_seconds": statistics.median(other for _, other in self.times),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "error": self.error,
            "published_error": self.published_error,
            "bound": TOLERANCES[PRECISION],
        }


def measure_short(
    device: torch.device,
    *,
    tasks: int = 8,
    folder: Path = Path("."),
    budget_seconds: float = 60.0,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return what ``isomerge bench`` without a merge answers.

    Ceilings and disk are measured, then every shape is judged; only when all are right are they timed, ours and
    published in turn. Shapes that would take longer than the budget are left out and named in ``skipped``, and slow
    ones get fewer than ``ROUNDS``; the first is measured whatever it takes. An error above the tier's tolerance is a
    VerificationError, before anything is timed.
    """
    started = time.perf_counter()

    def left() -> float:
        return USED_SHARE * budget_seconds - (time.perf_counter() - started)

    say("what memory, products and the disk give at most")
    disk, ceilings = measure_disk(folder), measure_ceilings(device)
    _load_libraries(tasks, device)
    subjects, skipped = _judge_all(tasks, device, left, say)
    for number in range(ROUNDS):
        for subject in subjects:
            if number and subject.round_seconds > left():
                continue
            say(f"{subject}: round {number + 1}")
            subject.time_round(device)
    return {
        "machine": machine(device),
        "ceilings": asdict(ceilings),
        "disk": disk,
        "tasks": tasks,
        "precision": PRECISION,
        "rows": [subject.row() for subject in subjects],
        "skipped": skipped,
        "seconds": time.perf_counter() - started,
    }


def _load_libraries(tasks: int, device: torch.device) -> None:
    """Run everything once: libraries are loaded at their first call, which would make the first shape look slow."""
    small = deltas_like_fine_tuning(64, 64, tasks, device=device)
    for algorithm in ALGORITHMS:
        algorithm.published(small)
        for method in (algorithm.ours, algorithm.ours.exact()):
            method.merge(MemoryDeltas(small))


def _judge_all(
    tasks: int, device: torch.device, left: Callable[[], float], say: Callable[[str], None]
) -> tuple[list[_Subject], list[str]]:
    """Return the subjects that fit into the seconds ``left``, all judged, and what is left out."""
    subjects: list[_Subject] = []
    skipped: list[str] = []
    judged: dict[str, float] = {}  # seconds for an operation, by method
    for shape in SHAPES:
        if device.type == "cpu" and not shape.on_cpu:
            continue
        deltas: list[Tensor] = []
        for algorithm in ALGORITHMS:
            subject = _Subject(shape, algorithm)
            name, work = algorithm.ours.name, algorithm.published_work(shape, tasks)
            expected = CAUTION * work * judged.get(name, min(judged.values(), default=0.0))
            reserved = sum(subject.round_seconds for subject in subjects)
            if subjects and 1.5 * expected + reserved > left():  # with a round of its own
                skipped.append(f"{subject} ({shape.model}): about {expected:.0f} s")
                continue
            say(f"{subject}: error against float64")
            deltas = deltas or deltas_like_fine_tuning(shape.rows, shape.columns, tasks, device=device)
            subject.deltas, start = deltas, time.perf_counter()
            subject.judge()
            judged[name] = (time.perf_counter() - start) / work
            subjects.append(subject)
    return subjects, skipped
