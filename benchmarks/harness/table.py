"""Show results to people: a table for the terminal, and a shorter one in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter

from benchmarks.harness import markdown as page
from benchmarks.harness.results import Measured, ResultRow, Results, growth
from benchmarks.harness.rows import OURS
from isomerge_fast.cli.render import brief, size
from isomerge_fast.cli.screen import Screen

# In a README's table, with their names there.
SUMMARISED = {"torch": "torch SVD", "fusion-bench": "FusionBench", "numpy-fp32": "numpy fp32", "mergekit": "mergekit"}


def error(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def rates(row: ResultRow, measured: Measured | None, units: tuple[str, str] = ("", "")) -> list[str]:
    """Return the peak memory, the bytes and the operations in billions a second, and the share of the roofline."""
    if measured is None:
        return [""] * 4
    amounts = zip((row.moved_bytes, sum(measured.flops.values())), units, strict=True)
    return [
        "" if measured.peak_bytes is None else size(measured.peak_bytes),
        *(f"{amount / measured.median / 1e9:.3g} {unit}".rstrip() if amount else "" for amount, unit in amounts),
        "" if measured.roofline is None else f"{100 * measured.roofline:.0f} %",
    ]


def heading(results: Results) -> str:
    """Return the machine, the releases and the passes, in three lines."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    passes = f"{results.passes} passes" if results.passes > 1 else "one pass: the spread of its ratios is assumed"
    return (
        f"{machine['device']}, {machine['threads']} threads, {machine['system']}, Python {machine['python']}\n"
        f"{versions}; numpy's BLAS: {machine['numpy_blas']}\n"
        f"level {results.level}, {passes}, {results.seconds:.0f} s"
    )


def print_results(results: Results) -> None:
    """Print all there is: one line for each contender, under the row's name, and the growth curves."""
    out = Screen()
    for line in heading(results).splitlines():
        out.print(line)
    head = (">seconds", ">times ours", ">error", ">peak", ">bytes", ">operations", ">of roofline")
    for suite, rows in results.suites().items():
        lines = []
        for row in rows:
            lines.append([row.name, *[""] * len(head)])
            for name, measured in row.contenders.items():
                ratio = str(results.ratio(row, name)) if name in row.baselines else ""
                cells = (brief(measured.median), ratio, error(measured.error))
                lines.append([f"  {name}", *cells, *rates(row, measured, ("GB/s", "GFLOP/s"))])
        print_lines(out, (suite, *head), lines)
    curves = []
    for curve in growth(results):
        ends = [f"{brief(t)} at {x:g}" for x, t in (curve.points[0], curve.points[-1])]
        curves.append([curve.curve, curve.contender, f"{curve.variable}^{curve.exponent:.2f}", *ends])
    print_lines(out, ("growth", "contender", "seconds grow like", "from", "to"), curves)
    for line in results.skipped:
        out.print(f"skipped: {line}")


def print_lines(out: Screen, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table of these cells, and an empty line before it; nothing where there are no lines."""
    if lines:
        out.print()
        out.print_table(lines, *((title, itemgetter(index)) for index, title in enumerate(head)))


def markdown(results: Results) -> str:
    """Return a table for each suite: ours in seconds, all others as multiples of ours, with their errors."""
    parts = [f"Machine: {heading(results)}".replace("\n", "  \n")]
    for suite, rows in results.suites().items():
        names = list(dict.fromkeys(name for row in rows for name in row.contenders if name != OURS))
        head = ["row", "ours", "error", *names, "peak", "GB/s", "GFLOP/s", "of roofline"]
        lines = (
            [row.name, *_ours(row), *(_other(results, row, name) for name in names), *rates(row, row.ours)]
            for row in rows
        )
        parts += ["", f"### {suite}", "", page.table(head, lines)]
    parts += ["", "### growth", "", _growth(results)]
    if results.skipped:
        parts += ["", "Skipped: " + "; ".join(results.skipped)]
    return "\n".join(parts)


def summary(results: Results) -> str:
    """Return one table of the methods on real shapes and of whole merges, for a README."""
    rows = [row for suite in ("methods", "merge") for row in results.suites().get(suite, []) if row.curve is None]
    names = [name for name in SUMMARISED if any(name in row.contenders for row in rows)]

    def cells(row: ResultRow) -> Iterator[str]:
        yield from (row.name, _ours(row)[0])
        yield from (f"{results.ratio(row, name)}" if name in row.contenders else "–" for name in names)
        other = next((row.contenders[name] for name in ("torch", *names) if name in row.contenders), None)
        yield f"{_ours(row)[1]} / {error(other.error) if other else ''}"

    head = ["", "ours", *(SUMMARISED[name] for name in names), "errors, ours / theirs"]
    return page.table(head, [list(cells(row)) for row in rows if row.ours])


def _growth(results: Results) -> str:
    """Return curves by line, the exponents of contenders by column."""
    cells: dict[str, dict[str, str]] = {}
    for curve in growth(results):
        exponent = f"{curve.variable}^{curve.exponent:.2f} ({curve.points[0][0]:g} … {curve.points[-1][0]:g})"
        cells.setdefault(curve.curve, {})[curve.contender] = exponent
    names = list(dict.fromkeys(name for found in cells.values() for name in found))
    lines = ([curve, *(found.get(name, "–") for name in names)] for curve, found in cells.items())
    return page.table(["seconds ∝", *names], lines)


def _ours(row: ResultRow) -> list[str]:
    return ["–", "–"] if row.ours is None else [brief(row.ours.median), error(row.ours.error)]


def _other(results: Results, row: ResultRow, name: str) -> str:
    if name not in row.contenders:
        return "–"
    found = row.contenders[name]
    ratio = brief(found.median) if row.ours is None else f"{results.ratio(row, name)}"
    return ratio + (f" ({error(found.error)})" if found.error is not None else "")
