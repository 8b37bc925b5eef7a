"""Results as people read them: a table for the terminal, and a shorter one in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table

from benchmarks.harness.results import Measured, ResultRow, Results, growth
from benchmarks.harness.rows import OURS
from isomerge_fast.cli.render import brief, size

# In a README's table, with their names there.
SUMMARISED = {"torch": "torch SVD", "fusion-bench": "FusionBench", "numpy-fp32": "numpy fp32", "mergekit": "mergekit"}


def error(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def rate(amount: float, measured: Measured, unit: str = "") -> str:
    """In billions a second, of so many ``unit``; nothing of nothing."""
    return f"{amount / measured.median / 1e9:.3g} {unit}".rstrip() if amount else ""


def heading(results: Results) -> str:
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    passes = f"{results.passes} passes" if results.passes > 1 else "one pass: the spread of its ratios is assumed"
    return (
        f"{machine['device']}, {machine['threads']} threads, {machine['system']}, Python {machine['python']}\n"
        f"{versions}; numpy's BLAS: {machine['numpy_blas']}\n"
        f"level {results.level}, {passes}, {results.seconds:.0f} s"
    )


def lines_of(results: Results, row: ResultRow) -> Iterator[list[str]]:
    """One a contender, under the row's name."""
    for name, measured in row.contenders.items():
        is_ours = name == OURS
        ratio = "" if is_ours or row.ours is None else str(results.ratio(row, name))
        yield [
            f"  {name}",
            brief(measured.median),
            ratio,
            error(measured.error),
            "" if measured.peak_bytes is None else size(measured.peak_bytes),
            rate(row.moved_bytes, measured, "GB/s"),
            rate(sum(measured.flops.values()), measured, "GFLOP/s"),
            share(measured.roofline),
        ]


def print_results(results: Results) -> None:
    out = Console(width=140, soft_wrap=True, highlight=False)
    out.print(heading(results))
    for suite, rows in results.suites().items():
        table = Table(box=None, pad_edge=False, header_style="bold", title=suite, title_justify="left")
        for column in ("", "seconds", "times ours", "error", "peak", "bytes", "operations", "of roofline"):
            table.add_column(column, justify="left" if not column else "right", no_wrap=True)
        for row in rows:
            table.add_row(f"[bold]{row.name}[/bold]")
            for line in lines_of(results, row):
                table.add_row(*line)
        out.print()
        out.print(table)
    curves = growth(results)
    if curves:
        out.print()
        table = Table(box=None, pad_edge=False, header_style="bold", title="growth", title_justify="left")
        for column in ("curve", "contender", "seconds grow like", "from", "to"):
            table.add_column(column, no_wrap=True)
        for curve in curves:
            ends = [f"{brief(t)} at {x:g}" for x, t in (curve.points[0], curve.points[-1])]
            table.add_row(curve.curve, curve.contender, f"{curve.variable}^{curve.exponent:.2f}", *ends)
        out.print(table)
    for line in results.skipped:
        out.print(f"skipped: {line}")


def cells(columns: Iterable[str]) -> str:
    return "| " + " | ".join(columns) + " |"


def markdown(results: Results) -> str:
    """A table a suite: ours in seconds, every other contender as a multiple of ours, both with their errors."""
    parts = [f"Machine: {heading(results)}".replace("\n", "  \n")]
    for suite, rows in results.suites().items():
        names = list(dict.fromkeys(name for row in rows for name in row.contenders if name != OURS))
        head = ["row", "ours", "error", *names, "peak", "GB/s", "GFLOP/s", "of roofline"]
        parts += ["", f"### {suite}", "", cells(head), "|---" * len(head) + "|"]
        for row in rows:
            parts.append(cells([row.name, *_ours(row), *(_other(results, row, name) for name in names), *_rates(row)]))
    parts += ["", "### growth", "", *_growth(results)]
    if results.skipped:
        parts += ["", "Skipped: " + "; ".join(results.skipped)]
    return "\n".join(parts)


def summary(results: Results) -> str:
    """One table of the methods on real shapes and of whole merges, for a README."""
    rows = [row for suite in ("methods", "merge") for row in results.suites().get(suite, []) if row.curve is None]
    names = [name for name in SUMMARISED if any(name in row.contenders for row in rows)]
    lines = [
        cells(["", "ours", *(SUMMARISED[name] for name in names), "errors, ours / theirs"]),
        "|---" * (3 + len(names)) + "|",
    ]
    for row in rows:
        if row.ours is None:
            continue
        ratios = [f"{results.ratio(row, name)}" if name in row.contenders else "–" for name in names]
        other = next((row.contenders[name] for name in ("torch", *names) if name in row.contenders), None)
        errors = f"{error(row.ours.error)} / {error(other.error) if other else ''}"
        lines.append(cells([row.name, brief(row.ours.median), *ratios, errors]))
    return "\n".join(lines)


def _growth(results: Results) -> Iterator[str]:
    """Curves by line, the exponents of contenders by column."""
    found = growth(results)
    names = list(dict.fromkeys(curve.contender for curve in found))
    yield cells(["seconds ∝", *names])
    yield "|---" * (1 + len(names)) + "|"
    for key in dict.fromkeys((curve.curve, curve.variable) for curve in found):
        exponents = {
            curve.contender: f"{curve.variable}^{curve.exponent:.2f} ({curve.points[0][0]:g} … {curve.points[-1][0]:g})"
            for curve in found
            if (curve.curve, curve.variable) == key
        }
        yield cells([key[0], *(exponents.get(name, "–") for name in names)])


def _ours(row: ResultRow) -> list[str]:
    return ["–", "–"] if row.ours is None else [brief(row.ours.median), error(row.ours.error)]


def _other(results: Results, row: ResultRow, name: str) -> str:
    if name not in row.contenders:
        return "–"
    found = row.contenders[name]
    ratio = brief(found.median) if row.ours is None else f"{results.ratio(row, name)}"
    return ratio + (f" ({error(found.error)})" if found.error is not None else "")


def _rates(row: ResultRow) -> list[str]:
    if row.ours is None:
        return [""] * 4
    ours = row.ours
    return [
        "" if ours.peak_bytes is None else size(ours.peak_bytes),
        rate(row.moved_bytes, ours),
        rate(sum(ours.flops.values()), ours),
        share(ours.roofline),
    ]
