"""What this machine does, without any checkpoint: its ceilings, and ours against the published algorithm in turn."""

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
from .ceilings import Ceilings, Disk, machine, measure_ceilings, measure_disk, require_folder, timed
from .problems import deltas_like_fine_tuning, relative_error

ROUNDS = 5
PRECISION = "default"
# Of the budget: what is left is for starting Python and torch, and for a last round that takes longer than expected.
USED_SHARE = 0.88
# Full SVDs of wide and tall matrices took up to 1.5 times as long as those of square ones, an operation (2 cores).
CAUTION = 1.5


@dataclass(frozen=True)
class Shape:
    """A matrix of a real model; those not for CPUs would take minutes there."""

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
    """One method: ours, the same with full SVDs in float64, and as published."""

    ours: Method
    judge: Method
    published: Callable[[Sequence[Tensor]], Tensor]

    def published_work(self, shape: Shape, tasks: int) -> float:
        """What full SVDs take, but for a factor: one of the sum for Iso-C, T + 3 for Iso-CTS."""
        svds = tasks + 3 if self.ours.deltas_taken else 1
        return float(svds * shape.rows * shape.columns * min(shape.rows, shape.columns))


ALGORITHMS = (
    Algorithm(IsoC(precision=PRECISION), IsoC(precision="reference"), published.iso_c),
    Algorithm(IsoCTS(precision=PRECISION), IsoCTS(precision="reference"), published.iso_cts),
)


@dataclass(frozen=True)
class Row:
    """One method on one shape.

    Attributes:
        seconds, published_seconds: medians over the rounds; ``ratio`` is the median of the rounds' own ratios, and
            ``ratio_range`` the least and the greatest of them.
        error, published_error: ‖Δ − Δ₆₄‖_F / ‖Δ₆₄‖_F; ``bound`` is what ours promises.
    """

    model: str
    rows: int
    columns: int
    method: str
    tasks: int
    rounds: int
    seconds: float
    published_seconds: float
    ratio: float
    ratio_range: tuple[float, float]
    error: float
    published_error: float
    bound: float


@dataclass(frozen=True)
class ShortBench:
    """All of ``isomerge bench`` without a checkpoint. ``skipped``: what there was no time for, and why."""

    machine: dict[str, Any]
    ceilings: Ceilings
    disk: Disk
    tasks: int
    precision: str
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Subject:
    """One method on one shape, judged; its rounds gather in ``times`` as (ours, published)."""

    shape: Shape
    algorithm: Algorithm
    deltas: list[Tensor]
    error: float
    published_error: float
    round_seconds: float  # expected of one round
    times: list[tuple[float, float]] = field(default_factory=list)

    def run_ours(self) -> Tensor:
        return self.algorithm.ours.merge(MemoryDeltas(self.deltas))[0]

    def run_published(self) -> Tensor:
        return self.algorithm.published(self.deltas)

    def time_round(self, device: torch.device) -> None:
        mine, other = timed(self.run_ours, device)[1], timed(self.run_published, device)[1]
        self.times.append((mine, other))
        self.round_seconds = mine + other

    def row(self) -> Row:
        ratios = [other / mine for mine, other in self.times]
        return Row(
            self.shape.model,
            self.shape.rows,
            self.shape.columns,
            self.algorithm.ours.name,
            len(self.deltas),
            len(self.times),
            statistics.median(mine for mine, _ in self.times),
            statistics.median(other for _, other in self.times),
            statistics.median(ratios),
            (min(ratios), max(ratios)),
            self.error,
            self.published_error,
            TOLERANCES[PRECISION],
        )


def _judge(shape: Shape, algorithm: Algorithm, deltas: list[Tensor]) -> _Subject:
    """Both algorithms against float64 full SVDs; which also is the call that warms them up.

    Raises:
        VerificationError: ours is further from float64 than it promises.
    """
    subject = _Subject(shape, algorithm, deltas, 0.0, 0.0, 0.0)
    start = time.perf_counter()
    mine, other = subject.run_ours(), subject.run_published()
    exact, _ = algorithm.judge.merge(MemoryDeltas(deltas))
    subject.error, subject.published_error = relative_error(mine, exact), relative_error(other, exact)
    # Float64 SVDs take longer than the float32 ones of a round, ours far less than either.
    subject.round_seconds = (time.perf_counter() - start) / 2
    bound = TOLERANCES[PRECISION]
    if not subject.error <= bound:  # NaN is an error too
        raise VerificationError(
            f"{algorithm.ours.name} of {len(deltas)} deltas {shape.rows} x {shape.columns} on {deltas[0].device}: "
            f"error {subject.error:.1e} against float64, promised is {bound:.0e} (precision {PRECISION!r})"
        )
    return subject


def measure_short(
    device: torch.device,
    *,
    tasks: int = 8,
    folder: Path = Path("."),
    shapes: Sequence[Shape] | None = None,
    budget_seconds: float = 60.0,
    say: Callable[[str], None] = lambda _: None,
) -> ShortBench:
    """Ceilings and disk; then every shape judged; then, when all are right, rounds of ours and published in turn.

    Args:
        folder: on the disk to be measured; files there are removed again.
        shapes: ``SHAPES`` when None.
        budget_seconds: shapes that would take longer are left out and named, and slow ones get fewer than ``ROUNDS``;
            the first is measured whatever it takes.
        say: told what is being done.

    Raises:
        ConfigError: no such folder.
        ResourceError: it cannot be written to, or is full.
        VerificationError: an error of ours above the tier's promise; before anything is timed.
    """
    started = time.perf_counter()

    def left() -> float:
        return USED_SHARE * budget_seconds - (time.perf_counter() - started)

    require_folder(folder)
    wanted = SHAPES if shapes is None else shapes
    shapes = [shape for shape in wanted if shape.on_cpu or device.type != "cpu"]
    say("what memory, products and the disk give at most")
    ceilings, disk = measure_ceilings(device), measure_disk(folder)

    # Libraries are loaded at their first call, which would make the first shape look slow, and all others with it.
    small = deltas_like_fine_tuning(64, 64, tasks, device=device)
    for algorithm in ALGORITHMS:
        algorithm.published(small)
        for method in (algorithm.ours, algorithm.judge):
            method.merge(MemoryDeltas(small))

    subjects: list[_Subject] = []
    skipped: list[str] = []
    judged: dict[str, float] = {}  # seconds for an operation, by method
    for shape in shapes:
        deltas: list[Tensor] | None = None
        for algorithm in ALGORITHMS:
            name, work = algorithm.ours.name, algorithm.published_work(shape, tasks)
            expected = CAUTION * work * judged.get(name, min(judged.values(), default=0.0))
            reserved = sum(subject.round_seconds for subject in subjects)
            if subjects and 1.5 * expected + reserved > left():  # with a round of its own
                skipped.append(f"{name} of {shape.rows} x {shape.columns} ({shape.model}): about {expected:.0f} s")
                continue
            say(f"{name} of {shape.rows} x {shape.columns}: error against float64")
            deltas = deltas or deltas_like_fine_tuning(shape.rows, shape.columns, tasks, device=device)
            start = time.perf_counter()
            subjects.append(_judge(shape, algorithm, deltas))
            judged[name] = (time.perf_counter() - start) / work

    for number in range(ROUNDS):
        for subject in subjects:
            if number and subject.round_seconds > left():
                continue
            say(f"{subject.algorithm.ours.name} of {subject.shape.rows} x {subject.shape.columns}: round {number + 1}")
            subject.time_round(device)
    return ShortBench(
        machine(device),
        ceilings,
        disk,
        tasks,
        PRECISION,
        tuple(subject.row() for subject in subjects),
        tuple(skipped),
        time.perf_counter() - started,
    )
