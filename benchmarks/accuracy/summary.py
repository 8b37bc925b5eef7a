"""Summarise the seeds of a setting: means, deviations, correlations, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.accuracy.alignment import DECIMALS, SMALLEST_GAIN, Correlation, correlate, without_group_means
from benchmarks.accuracy.scores import SeedScore
from benchmarks.accuracy.settings import METHODS, Setting, candidates
from benchmarks.harness import markdown
from isomerge_fast.demo.model import normalised


@dataclass(frozen=True)
class Spread:
    """Hold the mean and the standard deviation over seeds (of the sample; 0 of a single one)."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


@dataclass(frozen=True)
class Row:
    """Hold a line of the table: a method, or the base or the experts, of which only the accuracies are set.

    Figures are means, the last four over tasks and seeds.
    """

    name: str
    method: str
    test: Spread
    normalised: Spread
    scalings: tuple[float, ...] = ()  # the chosen α of every seed
    at_grid_end: int = 0  # the number of seeds whose α is at an end of its range
    alignment: float | None = None  # SAR
    chance: float | None = None  # SAR of updates in random directions
    rank_share: float | None = None  # k / min(M, N)
    improvement: float | None = None  # NAI, where there is one


@dataclass(frozen=True)
class SettingResult:
    """Hold all seeds of a setting, and what the table says of them."""

    setting: Setting
    seeds: tuple[SeedScore, ...]
    rows: tuple[Row, ...]
    n_pairs: int  # of (task, seed)
    left_out: int  # of those: pairs without NAI, whose experts gain less than ``SMALLEST_GAIN``
    # Of SAR_t with NAI_t: over all points; within methods (each method's mean taken off its points); over the methods'
    # means; over the points of Iso-C and Iso-CTS alone.
    correlations: dict[str, Correlation]
    flat_difference: Spread  # Iso-CTS's test accuracy less Iso-C's, seed by seed: the two share what a seed makes easy
    flat_higher: int  # the number of seeds in which Iso-CTS's is higher


def summarise(setting: Setting, seeds: Sequence[SeedScore], common_fractions: Sequence[float] = ()) -> SettingResult:
    """Return means, deviations and correlations over the seeds of one setting."""
    own = [score.experts_by_task for score in seeds]
    rows = [
        Row(name, name, Spread.of([*map(fmean, scores)]), Spread.of([*map(normalised, scores, own)]))
        for name, scores in (("base", [score.base_by_task for score in seeds]), ("experts", own))
    ]
    groups = []
    for key, candidate in candidates(common_fractions).items():
        merges = [score.merges[key] for score in seeds]
        points = [point for merge in merges for point in merge.points()]
        if key in METHODS:
            groups.append(points)
        rows.append(
            Row(
                candidate.name,
                key,
                Spread.of([merge.test for merge in merges]),
                Spread.of([merge.normalised for merge in merges]),
                tuple(merge.scaling for merge in merges),
                sum(merge.at_grid_end for merge in merges),
                fmean(ratio for merge in merges for ratio in merge.alignment.by_task),
                fmean(merge.alignment.chance for merge in merges),
                fmean(merge.alignment.rank_share for merge in merges),
                fmean(gain for _, gain in points) if points else None,
            )
        )
    # One decimal fewer than SAR has: mean and sum span the same range, and are to share their rank here.
    means = [
        (round(fmean(x), DECIMALS - 1), fmean(y)) for x, y in (zip(*points, strict=True) for points in groups if points)
    ]
    of_method = dict(zip(METHODS, groups, strict=True))
    differences = [score.merges["iso-cts"].test - score.merges["iso-c"].test for score in seeds]
    pairs = sum(len(score.tasks) for score in seeds)
    return SettingResult(
        setting,
        tuple(seeds),
        tuple(rows),
        pairs,
        pairs - len(groups[0]),
        {
            "all points": correlate([point for points in groups for point in points]),
            "within methods": correlate(without_group_means(groups)),
            "method means": correlate(means),
            "Iso-C, Iso-CTS": correlate(of_method["iso-c"] + of_method["iso-cts"]),
        },
        Spread.of(differences),
        sum(difference > 0 for difference in differences),
    )


def table(result: SettingResult) -> str:
    """Return one setting as text."""
    head = ("", "test accuracy", "normalised", "SAR", "chance", "k/r", "NAI", "α")
    lines = []
    for row in result.rows:
        means = [shown(mean) for mean in (row.alignment, row.chance, row.rank_share, row.improvement)]
        scalings = " ".join(f"{scaling:g}" for scaling in row.scalings)
        mark = f" ({row.at_grid_end} at an end of the grid)" if row.at_grid_end else ""
        lines.append(
            (row.name, f"{row.test}", f"{row.normalised}", *(means if row.scalings else [""] * 4), scalings + mark)
        )
    text = [
        f"{result.setting.title}, {len(result.seeds)} seed{'s' * (len(result.seeds) != 1)}",
        markdown.table(head, lines),
        f"Iso-CTS less Iso-C, seed by seed: {result.flat_difference}; "
        f"higher in {result.flat_higher} of {len(result.seeds)}",
    ]
    for name, found in result.correlations.items():
        coefficients = f"Pearson {shown(found.pearson)}, Spearman {shown(found.spearman)}"
        text.append(f"SAR with NAI, {name}: {coefficients} ({found.n} points)")
    if result.left_out:
        text.append(
            f"NAI leaves out {result.left_out} of {result.n_pairs} (task, seed) pairs: "
            f"the expert gains less than {SMALLEST_GAIN:g} over the base"
        )
    return "\n".join(text)


def shown(value: float | None) -> str:
    return f"{value:.3f}" if value is not None else "–"
