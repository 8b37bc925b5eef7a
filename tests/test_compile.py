"""Every form of every kernel, compiled ahead of time for four GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """In a process of its own: here Triton's kernels may be interpreted."""
    outcome = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_table", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert outcome.stdout, outcome.stderr
    return json.loads(outcome.stdout)


@pytest.mark.slow
def test_every_form_compiles_as_it_must(rows: list[dict]) -> None:
    assert not [row for row in rows if row["wrong"]]
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row["kernel"] for row in rows} == {"task_sum", "add_up", "apply_delta", "symmetric_matmul"}
    assert len(rows) >= 200
    assert all(row["spilled_bytes"] == 0 for row in rows)


@pytest.mark.slow
def test_docs_hold_the_table(rows: list[dict]) -> None:
    """`make kernels` writes it; versions of Triton other than the tested one may give other figures."""
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    table = text.split("<!-- compile table -->")[1].split("<!-- end of compile table -->")[0]
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    documented = {(kernel.strip("| `"), label, config): cells for kernel, label, config, *cells in lines}
    assert documented.keys() == {(row["kernel"], row["label"], row["config"]) for row in rows}
    for row in rows:
        cell = documented[row["kernel"], row["label"], row["config"]][
            ["sm_80", "sm_90", "sm_100", "gfx942"].index(row["target"])
        ]
        assert cell.strip(" |") == f"{row['registers']} / {row['shared_bytes'] / 1024:.0f} / {row['spilled_bytes']}"
