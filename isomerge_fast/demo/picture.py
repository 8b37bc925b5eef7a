"""Draw the singular values of the summed update, before and after its spectrum is made flat."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .model import load_state

COLOURS = ("#767676", "#0072b2", "#d55e00")
LINE_STYLES = ("-", "-", (0, (5, 2)))  # the two flat lines may lie upon each other


def singular_values(base: Tensor, merged: Tensor, scaling: float) -> Tensor:
    """Return σ((θ − θ₀) / α) of fp32 `[M, N]`, largest first, as float64: the spectrum of a merged Δ in the files."""
    return torch.linalg.svdvals((merged.double() - base.double()) / scaling)


def draw_singular_values(
    path: Path, base: Path, merged: Sequence[tuple[str, Path, float]], layers: Sequence[str], n_tasks: int
) -> None:
    """Write a PNG with one panel a layer, which is a 2-D tensor, and one curve a merged checkpoint.

    `merged` has up to three of (label, checkpoint folder, its scaling), the summed update first.
    """
    from matplotlib.figure import Figure  # a Figure of its own draws with Agg and leaves pyplot's state alone

    origin = load_state(base)
    states = [(label, load_state(folder), scaling) for label, folder, scaling in merged]
    figure = Figure(figsize=(5.4 * len(layers), 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for panel, layer in zip(panels, layers, strict=True):
        for (label, state, scaling), colour, style in zip(states, COLOURS, LINE_STYLES, strict=False):
            values = singular_values(origin[layer], state[layer], scaling)
            panel.plot(range(1, len(values) + 1), values, color=colour, linestyle=style, linewidth=2, label=label)
        rows, columns = origin[layer].shape
        panel.set_title(f"{layer}  [{rows} × {columns}]", fontsize=11)
        panel.set_xlabel("index of the singular value")
        panel.set_xlim(1, min(rows, columns))
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("singular value of the merged update")
    panels[0].legend(frameon=False)
    figure.suptitle(f"A few directions dominate the sum of {n_tasks} experts' updates; Iso-C and Iso-CTS level them")
    figure.savefig(path)
