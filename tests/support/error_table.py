"""Prints the error tables of docs/numerics.md, or with --write puts them there: ``make numerics``."""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import oracle
from cases import CASES, SHAPES, Case
from isomerge_fast.bench.problems import Kind, deltas_like_fine_tuning
from isomerge_fast.linalg import spectral_filter
from isomerge_fast.linalg.auto import TOLERANCES
from isomerge_fast.linalg.gram_eigh import GramEigh
from isomerge_fast.linalg.polar_express import PolarExpress, quintics
from isomerge_fast.linalg.polar_gram import GramNewtonSchulz
from isomerge_fast.linalg.spectrum import largest_eigenvalue
from isomerge_fast.linalg.svd import FullSvd
from isomerge_fast.methods import as_deltas, make_method

BEGIN, END = "<!-- tables: made by `make numerics` -->", "<!-- end of tables -->"
ORACLES = {"iso-c": oracle.iso_c, "iso-cts": oracle.iso_cts}
SOLVERS = (
    FullSvd(),
    GramEigh(),
    GramEigh(rounding=0.0),
    PolarExpress(),
    PolarExpress(torch.float32),
    GramNewtonSchulz(),
    GramNewtonSchulz(torch.float32),
)
CONDITIONS = (1e0, 1e2, 1e4, 1e6)
FILTERED = 104
FILTER_LOWERS = (1e-2, 1e-3, 2e-4)
FILTER_PRODUCTS: dict[str, tuple[torch.dtype, str | None]] = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bf16x3": (torch.float32, "bf16x3"),
}


def tiers() -> list[str]:
    """Largest error of each tier over the cases of one κ, and how many of them took another solver than the first."""
    lines = [
        "| method | deltas | κ | cases | "
        + " | ".join(f"{tier} (≤ {TOLERANCES[tier]:.0e})" for tier in TOLERANCES)
        + " |",
        "|---|---|---|---|" + "---|" * len(TOLERANCES),
    ]
    groups: dict[tuple[str, float], list[Case]] = {}
    for case in CASES:
        groups.setdefault((str(case.dtype).removeprefix("torch."), case.condition), []).append(case)
    for method, judge in ORACLES.items():
        for (dtype, condition), cases in groups.items():
            cells = []
            judged = {}
            for precision in TOLERANCES:
                worst, escalated = 0.0, 0
                for case in cases:
                    deltas = case.deltas()
                    value, stats = make_method(method, {"precision": precision}).merge(as_deltas(deltas))
                    exact = [delta.double().numpy() for delta in deltas]
                    evidence = stats.to_dict()
                    if case not in judged:
                        judged[case] = judge(exact)
                    expected = judged[case]
                    if method == "iso-c" and evidence["rank"] < min(case.rows, case.columns):
                        expected = oracle.iso_c(exact, rank=evidence["rank"])
                    worst = max(worst, oracle.relative_error(value.numpy(), expected))
                    escalated += bool(stats.escalations)
                cells.append(f"{worst:.1e}" + (f" ({escalated} escalated)" if escalated else ""))
            lines.append(f"| {method} | {dtype} | {condition:.0e} | {len(cases)} | " + " | ".join(cells) + " |")
    return lines


def polar_factors() -> list[str]:
    """Largest ‖Q − UVᵀ‖_F/√r of each solver over the shapes, for float64 X with log-spaced singular values."""
    lines = ["| solver | " + " | ".join(f"κ = {condition:.0e}" for condition in CONDITIONS) + " |"]
    lines.append("|---|" + "---|" * len(CONDITIONS))
    generator = torch.Generator().manual_seed(0)
    for solver in SOLVERS:
        cells = []
        for condition in CONDITIONS:
            worst = 0.0
            for rows, columns in SHAPES:
                short = min(rows, columns)
                u, v = (
                    torch.linalg.qr(torch.randn(size, short, generator=generator, dtype=torch.float64))[0]
                    for size in (rows, columns)
                )
                x = (u * torch.logspace(0.0, -np.log10(condition), short, dtype=torch.float64)) @ v.mT
                q, _ = solver.polar(x, dtype=torch.float64)
                worst = max(worst, oracle.relative_error(q.numpy(), (u @ v.mT).numpy()))
            cells.append(f"{worst:.0e}")
        suffix = ", every product in float64" if solver == GramEigh(rounding=0.0) else ""
        lines.append(f"| {solver.name}{suffix} | " + " | ".join(cells) + " |")
    return lines


def filters() -> list[str]:
    """‖sin θ‖_F/√c of the filter's bottom of H = S polar(S)ᵀ, its bound, and what the certificate says."""
    kinds: tuple[Kind, ...] = ("decay", "noise")
    lines = ["| products, ℓ | steps | " + " | ".join(f"{kind}: error | bound" for kind in kinds) + " |"]
    lines.append("|---|---|" + "---|---|" * len(kinds))
    sums = []
    for kind in kinds:
        total = torch.stack(deltas_like_fine_tuning(512, 512, 8, kind)).double().sum(0)
        h = total @ PolarExpress().polar(total)[0].mT
        h = 0.5 * (h + h.mT)
        sums.append((h, torch.linalg.eigh(h)[1][:, :FILTERED]))
    for label, (dtype, products) in FILTER_PRODUCTS.items():
        for lower in FILTER_LOWERS:
            cells = [f"{label}, {lower:.0e}", str(len(quintics(lower, spectral_filter.SIGN_TARGET)))]
            for h, exact in sums:
                with mock.patch.object(spectral_filter, "SIGN_LOWER", lower):
                    found = spectral_filter.bottom_block(
                        h, largest_eigenvalue(h), FILTERED, dtype=dtype, products=products
                    )
                bottom = found.vectors[:, :FILTERED]
                error = torch.linalg.matrix_norm(bottom - exact @ (exact.mT @ bottom)) / FILTERED**0.5
                bound = "missed" if bool(found.missed) else f"{float(found.angle):.0e}"
                cells += [f"{float(error):.0e}", bound]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def tables() -> str:
    return "\n".join(
        [
            f"Relative Frobenius error of the merged Δ, the worst of all cases (`tests/support/cases.py`), torch "
            f"{torch.__version__.split('+')[0]} on a CPU:",
            "",
            *tiers(),
            "",
            "Relative error of a polar factor, the worst of five shapes from 64 x 512 to 512 x 64, float64 in and out:",
            "",
            *polar_factors(),
            "",
            "‖sin θ‖_F/√c of the spectral filter, the bottom 104 of 512 directions, and the bound that its certificate "
            "has (`missed`: it says that directions may be missing); deltas of two kinds (`bench/problems.py`), T = 8:",
            "",
            *filters(),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Error tables of this code.")
    parser.add_argument("--write", type=Path, help="a Markdown file with the two marks to write between")
    options = parser.parse_args()
    text = tables()
    if options.write is None:
        print(text)
        return
    page = options.write.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
