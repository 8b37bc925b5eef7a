"""Put together what several passes of the benchmarks found: times, ratios with their spread, errors, growth."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from benchmarks.harness.rows import OURS

FORMAT = 1
# How many observations the spread that all rows have in common counts for, beside a row's own.
COMMON_WEIGHT = 4
# Of the standard deviation of one pass. Medians of three passes of two runs differ by 0.95 of it (one standard
# deviation): beyond this lies one ratio in a thousand.
SPREAD = 3.0


@dataclass(frozen=True)
class Measured:
    """Hold what was measured of one contender of a row; the last two of ours only."""

    seconds: tuple[float, ...]  # the median of every pass
    error: float | None = None  # relative to float64
    bar: float | None = None  # the most that it may be
    peak_bytes: int | None = None  # of memory beyond the inputs
    flops: Mapping[str, float] = field(default_factory=dict)  # by dtype
    floor_seconds: tuple[float, ...] = ()  # the least time that the ceilings of each pass leave

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def roofline(self) -> float | None:
        """Return the share of what the measured ceilings allow."""
        if not self.floor_seconds:
            return None
        return statistics.median(f / s for f, s in zip(self.floor_seconds, self.seconds, strict=True))


@dataclass(frozen=True)
class Ratio:
    """Say how many times as long as ours; another run on the same machine lies between ``low`` and ``high``."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g}× ± {100 * (self.high / self.value - 1):.0f} %"


@dataclass(frozen=True)
class ResultRow:
    suite: str
    name: str
    moved_bytes: float
    curve: tuple[str, str, float] | None
    contenders: Mapping[str, Measured]

    @property
    def ours(self) -> Measured | None:
        return self.contenders.get(OURS)

    @property
    def baselines(self) -> list[str]:
        return [name for name in self.contenders if name != OURS] if self.ours else []

    def log_ratios(self, baseline: str) -> list[float]:
        """Return the log of (seconds of the baseline / seconds of ours) of every pass."""
        ours, theirs = self.contenders[OURS].seconds, self.contenders[baseline].seconds
        return [math.log(their / our) for our, their in zip(ours, theirs, strict=False)]


@dataclass(frozen=True)
class Results:
    """Hold a whole run; ``skipped`` says why contenders took no part."""

    machine: dict[str, Any]
    level: str
    passes: int
    seconds: float
    rows: tuple[ResultRow, ...]
    skipped: tuple[str, ...] = ()

    @property
    def common_deviation(self) -> float:
        """Return the typical standard deviation of a log ratio between passes; 0.05 where there is one pass.

        It comes from the median of their variances, which a few disturbed ones do not move: s² of n passes is
        distributed as σ² χ²/(n − 1), whose median is near σ² (1 − 2/(9 (n − 1)))³.
        """
        found = [row.log_ratios(baseline) for row in self.rows for baseline in row.baselines]
        variances = [
            statistics.variance(ratios) / (1 - 2 / (9 * (len(ratios) - 1))) ** 3 for ratios in found if len(ratios) > 1
        ]
        return math.sqrt(statistics.median(variances)) if variances else 0.05

    def ratio(self, row: ResultRow, baseline: str) -> Ratio:
        """Return a baseline's ratio to ours: the median over the passes, and ``SPREAD`` standard deviations around it.

        Three passes alone say little about a deviation: a row's own is drawn towards that of all.
        """
        found = row.log_ratios(baseline)
        own = statistics.variance(found) * (len(found) - 1) if len(found) > 1 else 0.0
        variance = (COMMON_WEIGHT * self.common_deviation**2 + own) / (COMMON_WEIGHT + len(found) - 1)
        middle, spread = statistics.median(found), SPREAD * math.sqrt(variance)
        return Ratio(math.exp(middle), math.exp(middle - spread), math.exp(middle + spread))

    def ratios(self) -> list[tuple[ResultRow, str, Ratio]]:
        return [(row, baseline, self.ratio(row, baseline)) for row in self.rows for baseline in row.baselines]

    def row(self, name: str) -> ResultRow | None:
        return next((row for row in self.rows if row.name == name), None)

    def suites(self) -> dict[str, list[ResultRow]]:
        found: dict[str, list[ResultRow]] = {}
        for row in self.rows:
            found.setdefault(row.suite, []).append(row)
        return found

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a result file; raise ValueError for a file of another kind."""
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"{path}: not a result file of these benchmarks (format {FORMAT})")
        return TypeAdapter(cls).validate_python(data, extra="forbid")


def gather(files: Sequence[Path], *, level: str, seconds: float) -> Results:
    """Return the readings of each pass, put together."""
    passes = [json.loads(file.read_text()) for file in files]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for entry in (entry for each in passes for entry in each["benchmarks"]):
        values = entry["extra_info"]
        found.setdefault(entry["group"], {}).setdefault(values["contender"], []).append(values)
    rows = tuple(_row(name, contenders) for name, contenders in found.items())
    first = passes[0]
    return Results(first["machine_info"], level, len(passes), round(seconds, 1), rows, tuple(first["skipped"]))


def _row(name: str, contenders: Mapping[str, list[dict[str, Any]]]) -> ResultRow:
    def largest(entries: Sequence[dict[str, Any]], key: str) -> Any:
        return max((entry[key] for entry in entries if entry[key] is not None), default=None)

    measured = {
        contender: Measured(
            tuple(entry["seconds"] for entry in entries),
            largest(entries, "error"),
            entries[0]["bar"],
            largest(entries, "peak_bytes"),
            entries[0].get("flops", {}),
            tuple(entry["floor_seconds"] for entry in entries if "floor_seconds" in entry),
        )
        for contender, entries in contenders.items()
    }
    first = next(iter(contenders.values()))[0]
    return ResultRow(first["suite"], name, first["moved_bytes"], first["curve"] and tuple(first["curve"]), measured)


@dataclass(frozen=True)
class Growth:
    """Fit seconds ∝ x^exponent, by least squares in the logarithms over ``points``."""

    curve: str
    variable: str
    contender: str
    points: tuple[tuple[float, float], ...]
    exponent: float


def growth(results: Results) -> list[Growth]:
    """Return the fitted growth of each contender on each curve that has three points or more."""
    points: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in results.rows:
        if row.curve is not None:
            curve, variable, x = row.curve
            for contender, measured in row.contenders.items():
                points.setdefault((curve, variable, contender), []).append((x, measured.median))
    found = []
    for key, pairs in points.items():
        if len(pairs) >= 3:
            logs = [(math.log(x), math.log(seconds)) for x, seconds in sorted(pairs)]
            slope = statistics.linear_regression(*zip(*logs, strict=True)).slope
            found.append(Growth(*key, tuple(sorted(pairs)), slope))
    return found


def machine_label(machine: Mapping[str, Any]) -> str:
    """Return a machine as file names have it: ``intel-xeon-processor-2-threads``."""
    name = re.sub(r"\((r|tm)\)", "", str(machine["device"]), flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {machine['threads']} threads".lower()).strip("-")
