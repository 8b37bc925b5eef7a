"""Draw the study: accuracy by method and setting, and SAR against NAI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.settings import METHODS
from benchmarks.accuracy.summary import SettingResult, shown

COLOURS = {"base": "#bbbbbb", "mean": "#767676", "task-arithmetic": "#009e73", "iso-c": "#0072b2", "iso-cts": "#d55e00"}
MARKERS = {"base": "D", "mean": "s", "task-arithmetic": "^", "iso-c": "o", "iso-cts": "v"}


def draw(path: Path, results: Sequence[SettingResult]) -> None:
    """Write a PNG: above, normalised accuracy by method and setting; below, SAR against NAI, one panel a setting."""
    from matplotlib.figure import Figure  # a Figure of its own draws with Agg and leaves pyplot's state alone

    per_row = 3
    n_rows = -(-len(results) // per_row)
    figure = Figure(figsize=(13, 4.4 + 3.1 * n_rows), dpi=110, layout="constrained")
    grid = figure.add_gridspec(n_rows + 1, per_row, height_ratios=[1.3] + [1.0] * n_rows)
    _draw_accuracy(figure.add_subplot(grid[0, :]), results)
    for index, result in enumerate(results):
        panel = figure.add_subplot(grid[1 + index // per_row, index % per_row])
        _draw_scatter(panel, result)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=10)
    figure.savefig(path)


def _draw_accuracy(panel: Any, results: Sequence[SettingResult]) -> None:
    drawn = ("base", *METHODS)
    for place, method in enumerate(drawn):
        rows = [next(row for row in result.rows if row.method == method) for result in results]
        panel.errorbar(
            [index + (place - (len(drawn) - 1) / 2) * 0.14 for index in range(len(results))],
            [row.normalised.mean for row in rows],
            [row.normalised.deviation for row in rows],
            fmt=MARKERS[method],
            color=COLOURS[method],
            markersize=7,
            capsize=3,
            label=rows[0].name,
        )
    panel.axhline(1.0, color="black", linewidth=1)
    titles = [result.setting.title.split(", ") for result in results]
    panel.set_xticks(range(len(results)), ["\n".join(lines) for lines in titles], fontsize=9)
    panel.set_ylabel("accuracy / expert's accuracy")
    panel.set_title("Test accuracy as a share of the experts' (mean over tasks; bars: standard deviation over seeds)")
    panel.grid(axis="y", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_scatter(panel: Any, result: SettingResult) -> None:
    for method in METHODS:
        points = [point for score in result.seeds for point in score.merges[method].points()]
        if points:
            panel.scatter(
                *zip(*points, strict=True),
                s=16,
                marker=MARKERS[method],
                color=COLOURS[method],
                alpha=0.55,
                linewidths=0,
            )
    found = result.correlations["all points"]
    coefficients = f"Pearson {shown(found.pearson)}, Spearman {shown(found.spearman)}"
    panel.set_title(f"{result.setting.title}\n{coefficients}", fontsize=9)
    panel.axhline(0.0, color="black", linewidth=0.8)
    panel.axhline(1.0, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
    panel.set_xlabel("SAR", fontsize=9)
    panel.set_ylabel("NAI", fontsize=9)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
