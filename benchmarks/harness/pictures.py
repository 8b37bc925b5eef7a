"""Draw results: speed-ups, growth, and error against time."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Write PNG files into ``folder``, those for which there is something to show; return their paths."""
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


def _speedups(results: Results) -> Any:
    """Draw bars of the methods on real shapes, one for each baseline, with their spread."""
    from matplotlib.figure import Figure

    rows = [row for row in results.suites().get("methods", []) if row.baselines and row.curve is None]
    if not rows:
        return None
    names = [name for name in ("torch", "fusion-bench", "numpy-fp32") if any(name in row.contenders for row in rows)]
    figure = Figure(figsize=(9, 0.8 + 0.42 * len(rows)))
    axes = figure.subplots()
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        found = {place: results.ratio(row, name) for place, row in enumerate(rows) if name in row.contenders}
        places = [place + (index - (len(names) - 1) / 2) * height for place in found]
        ratios = found.values()
        whiskers = [[ratio.value - ratio.low for ratio in ratios], [ratio.high - ratio.value for ratio in ratios]]
        options = {"color": COLOURS[name], "label": LABELS.get(name, name), "error_kw": {"linewidth": 0.8}}
        axes.barh(places, [ratio.value for ratio in ratios], height, xerr=whiskers, **options)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times as long as isomerge-fast, same deltas, same process; whiskers: spread between runs")
    axes.set_title(f"{results.machine['device']}, {results.machine['threads']} threads", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    return figure


def _growth(results: Results) -> Any:
    """Draw log-log curves, one panel for each, with the fitted exponents."""
    found = growth(results)
    names = list(dict.fromkeys(curve.curve for curve in found))
    figure, panels = _panels(names, 4.2, 3.8)
    for axes, name in zip(panels, names, strict=True):
        values: set[float] = set()
        for curve in found:
            if curve.curve == name:
                label = f"{LABELS.get(curve.contender, curve.contender)}: {curve.variable}^{curve.exponent:.2f}"
                colour = COLOURS.get(curve.contender, OTHER)
                axes.loglog(*zip(*curve.points, strict=True), "o-", color=colour, label=label)
                axes.set_xlabel(curve.variable)
                values.update(x for x, _ in curve.points)
        _finish(axes, name, values, "seconds", fontsize=8)
    return figure


def _errors(results: Results) -> Any:
    """Draw every contender of the methods, the polar factors and the subspaces: how long, how far from float64."""
    suites = [suite for suite in ("methods", "polar", "subspace") if suite in results.suites()]
    figure, panels = _panels(suites, 4.8, 4.2)
    for axes, suite in zip(panels, suites, strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in results.suites()[suite]:
            for name, measured in row.contenders.items():
                if row.ours and measured.error:
                    points.setdefault(name, []).append((measured.median / row.ours.median, measured.error))
        for index, (name, pairs) in enumerate(points.items()):
            marker, colour = ("o", COLOURS[name]) if name in COLOURS else ("x", f"C{index}")
            axes.loglog(*zip(*pairs, strict=True), marker, color=colour, label=LABELS.get(name, name), alpha=0.8)
        axes.set_xlabel("times as long as isomerge-fast")
        _finish(axes, suite, {0.5, 1.0, 2.0, 5.0, 10.0, 20.0}, "relative error against float64", fontsize=7)
    return figure


def _panels(names: Sequence[str], width: float, height: float) -> tuple[Any, Sequence[Any]]:
    """Return a figure with a panel for each name, and the panels; None and none where there are no names."""
    from matplotlib.figure import Figure

    if not names:
        return None, ()
    figure = Figure(figsize=(width * len(names), height), layout="constrained")
    return figure, figure.subplots(1, len(names), squeeze=False)[0]


def _finish(axes: Any, title: str, ticks: set[float], y_label: str, *, fontsize: int) -> None:
    """Give a panel its words, and plain numbers for those of ``ticks`` that lie on its logarithmic axis."""
    low, high = axes.get_xlim()
    axes.set_xticks(shown := sorted(x for x in ticks if low <= x <= high), [f"{x:g}" for x in shown])
    axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False, fontsize=fontsize)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
