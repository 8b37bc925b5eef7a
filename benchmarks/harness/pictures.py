"""Results as pictures: speed-ups, growth, and error against time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.results import Results, growth
from benchmarks.harness.rows import OURS

# Readable in print and to the colour-blind (Okabe and Ito); ours is always the first.
COLOURS = {
    OURS: "#0072B2",
    "torch": "#D55E00",
    "fusion-bench": "#009E73",
    "numpy": "#CC79A7",
    "numpy-fp32": "#CC79A7",
    "numpy-fp64": "#999999",
}
OTHER = "#E69F00"
LABELS = {OURS: "isomerge-fast", "torch": "plain torch", "fusion-bench": "FusionBench"}


def draw(results: Results, folder: Path, label: str) -> list[Path]:
    """PNG files in ``folder``; those for which there is something to show."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, picture in (("speedups", _speedups), ("growth", _growth), ("error-against-time", _errors)):
        figure = picture(results)
        if figure is not None:
            path = folder / f"{label}-{name}.png"
            figure.savefig(path, dpi=110, bbox_inches="tight")
            made.append(path)
    return made


def _colour(contender: str) -> str:
    return COLOURS.get(contender, OTHER)


def _label(contender: str) -> str:
    return LABELS.get(contender, contender)


def _speedups(results: Results) -> Any:
    """Bars of the methods on real shapes, one a baseline, with their spread."""
    from matplotlib.figure import Figure

    rows = [row for row in results.suites().get("methods", []) if row.baselines and row.curve is None]
    if not rows:
        return None
    names = [name for name in ("torch", "fusion-bench", "numpy-fp32") if any(name in row.contenders for row in rows)]
    figure = Figure(figsize=(9, 0.8 + 0.42 * len(rows)))
    axes = figure.subplots()
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        places, values, spreads = [], [], []
        for place, row in enumerate(rows):
            if name in row.contenders:
                ratio = results.ratio(row, name)
                places.append(place + (index - (len(names) - 1) / 2) * height)
                values.append(ratio.value)
                spreads.append((ratio.value - ratio.low, ratio.high - ratio.value))
        errors = [list(side) for side in zip(*spreads, strict=True)]
        axes.barh(
            places, values, height, xerr=errors, color=_colour(name), label=_label(name), error_kw={"linewidth": 0.8}
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times as long as isomerge-fast, same deltas, same process; whiskers: spread between runs")
    axes.set_title(f"{results.machine['device']}, {results.machine['threads']} threads", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    axes.grid(axis="x", alpha=0.25)
    return figure


def _growth(results: Results) -> Any:
    """Log-log curves, one panel a curve, with the fitted exponents."""
    from matplotlib.figure import Figure

    found = growth(results)
    names = list(dict.fromkeys(curve.curve for curve in found))
    if not names:
        return None
    figure = Figure(figsize=(4.2 * len(names), 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values: set[float] = set()
        for curve in found:
            if curve.curve == name:
                label = f"{_label(curve.contender)}: {curve.variable}^{curve.exponent:.2f}"
                axes.loglog(*zip(*curve.points, strict=True), "o-", color=_colour(curve.contender), label=label)
                axes.set_xlabel(curve.variable)
                values.update(x for x, _ in curve.points)
        _ticks(axes, values)
        axes.set_title(name, fontsize=10)
        axes.set_ylabel("seconds")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
        _plain(axes)
    return figure


def _errors(results: Results) -> Any:
    """Every contender of the methods and of the polar factors: how long, and how far from float64."""
    from matplotlib.figure import Figure

    suites = [suite for suite in ("methods", "polar", "subspace") if suite in results.suites()]
    if not suites:
        return None
    figure = Figure(figsize=(4.8 * len(suites), 4.2), layout="constrained")
    for axes, suite in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites, strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in results.suites()[suite]:
            if row.ours is None:
                continue
            for name, measured in row.contenders.items():
                if measured.error:
                    points.setdefault(name, []).append((measured.median / row.ours.median, measured.error))
        for index, (name, pairs) in enumerate(points.items()):
            known = name in COLOURS
            colour = _colour(name) if known else f"C{index}"
            axes.loglog(*zip(*pairs, strict=True), "o" if known else "x", color=colour, label=_label(name), alpha=0.8)
        _ticks(axes, {0.5, 1.0, 2.0, 5.0, 10.0, 20.0})
        axes.set_title(suite, fontsize=10)
        axes.set_xlabel("times as long as isomerge-fast")
        axes.set_ylabel("relative error against float64")
        axes.legend(frameon=False, fontsize=7)
        axes.grid(alpha=0.25)
        _plain(axes)
    return figure


def _ticks(axes: Any, values: set[float]) -> None:
    """Plain numbers on a logarithmic axis, those of ``values`` that lie on it."""
    low, high = axes.get_xlim()
    axes.set_xticks(shown := sorted(x for x in values if low <= x <= high), [f"{x:g}" for x in shown])
    axes.minorticks_off()


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
