"""Compare two result files: what became slower, faster, less or more exact, and what is missing.

    python -m benchmarks.compare OLD NEW [--all]

A change of a ratio, or of the share of the roofline where there is no baseline, counts where it is beyond the spreads
of both, taken together, and more than 5 %. Exit code 1 where something of ours became slower, less exact, or is
missing; 2 for files that cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from benchmarks.harness.results import SPREAD, Ratio, ResultRow, Results
from benchmarks.harness.rows import OURS
from benchmarks.harness.table import print_lines
from isomerge_fast.cli.screen import Screen

LEAST_CHANGE = 1.05
# Errors of the same computation differ by a few roundings from one BLAS to another; a lost digit is ten.
LEAST_LOSS = 3.0
# Below this an error is float64's own rounding.
NO_ERROR = 1e-13

SAME, SLOWER, FASTER = "same", "slower", "faster"
LESS_EXACT, MORE_EXACT, MISSING, NEW = "less exact", "more exact", "missing", "new"
BAD = {SLOWER, LESS_EXACT, MISSING}


@dataclass(frozen=True)
class Difference:
    """Set one figure of both files side by side; ``verdict`` is about ours."""

    row: str
    figure: str
    old: str
    new: str
    verdict: str


def compare(old: Results, new: Results) -> list[Difference]:
    """Return every figure of ours in ``old`` beside that in ``new``; rows that only ``new`` has at the end."""
    found: list[Difference] = []
    for row in old.rows:
        if row.ours is None:
            continue
        other = new.row(row.name)
        if other is None or other.ours is None:
            found.append(Difference(row.name, "row", "measured", "", MISSING))
            continue
        found += times(old, row, new, other)
        found += errors(row, other)
    known = {row.name for row in old.rows}
    found += [Difference(row.name, "row", "", "measured", NEW) for row in new.rows if row.name not in known]
    return found


def times(old: Results, row: ResultRow, new: Results, other: ResultRow) -> Iterator[Difference]:
    """Compare times over every baseline that both have; where there is none, over the roofline."""
    shared = [name for name in row.baselines if name in other.baselines]
    for name in shared:
        before, after = old.ratio(row, name), new.ratio(other, name)
        yield Difference(row.name, f"{name} / ours", str(before), str(after), changed(before, after))
    if shared or not (row.ours and other.ours and row.ours.roofline and other.ours.roofline):
        return
    before, after = (
        Ratio(share, share * math.exp(-SPREAD * deviation), share * math.exp(SPREAD * deviation))
        for share, deviation in ((row.ours.roofline, old.common_deviation), (other.ours.roofline, new.common_deviation))
    )
    yield Difference(row.name, "of roofline", str(before), str(after), changed(before, after))


def changed(before: Ratio, after: Ratio) -> str:
    """Return the verdict on two ratios of others' times over ours: larger is faster."""
    change = math.log(after.value / before.value)
    spread = math.hypot(math.log(before.high / before.value), math.log(after.high / after.value))
    if abs(change) <= max(spread, math.log(LEAST_CHANGE)):
        return SAME
    return FASTER if change > 0 else SLOWER


def errors(row: ResultRow, other: ResultRow) -> Iterator[Difference]:
    before, after = row.contenders[OURS].error, other.contenders[OURS].error
    if before is None or after is None:
        return
    loss = max(after, NO_ERROR) / max(before, NO_ERROR)
    verdict = LESS_EXACT if loss > LEAST_LOSS else MORE_EXACT if loss < 1 / LEAST_LOSS else SAME
    yield Difference(row.name, "error", f"{before:.1e}", f"{after:.1e}", verdict)


def outside(old: Results, new: Results) -> list[str]:
    """Return the ratios of ``new`` that lie outside the spread that ``old`` gives them."""
    found = []
    for row, baseline, before in old.ratios():
        other = new.row(row.name)
        if other is not None and baseline in other.baselines:
            after = new.ratio(other, baseline).value
            if not before.low <= after <= before.high:
                found.append(f"{row.name}, {baseline}: {before}, then {after:.3g}")
    return found


def print_comparison(old: Results, new: Results, differences: list[Difference], *, everything: bool) -> None:
    """Print the machines, the differences, and how many there are."""
    out = Screen()
    for label, results in (("old", old), ("new", new)):
        versions = results.machine["versions"]
        out.print(
            f"{label}: {results.machine['device']}, {results.machine['threads']} threads, level {results.level}, "
            f"{results.passes} passes, torch {versions.get('torch')}, isomerge-fast {versions.get('isomerge-fast')}"
        )
    if (old.machine["device"], old.machine["threads"]) != (new.machine["device"], new.machine["threads"]):
        out.print("note: two machines: their ratios differ for other reasons than ours too")
    shown = [astuple(entry) for entry in differences if everything or entry.verdict != SAME]
    print_lines(out, ("row", "figure", "old", "new", "verdict"), shown)
    counts = {verdict: sum(entry.verdict == verdict for entry in differences) for verdict in (SAME, *sorted(BAD))}
    out.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    strays = outside(old, new)
    out.print(f"{len(strays)} of {len(old.ratios())} ratios outside the spread that the old file gives them")
    if everything:
        for line in strays:
            out.print(f"  {line}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="what is the same too")
    options = parser.parse_args()
    try:
        old, new = Results.load(options.old), Results.load(options.new)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    differences = compare(old, new)
    print_comparison(old, new, differences, everything=options.all)
    return 1 if any(entry.verdict in BAD for entry in differences) else 0


if __name__ == "__main__":
    sys.exit(main())
