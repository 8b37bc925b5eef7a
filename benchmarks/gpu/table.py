"""Write the readings of one device as Markdown, which docs/gpu.md shows:

python -m benchmarks.gpu.table benchmarks/results/NVIDIA-H200.json [--write docs/gpu.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.schedule import STAGES
from benchmarks.gpu.summary import (
    Readings,
    bandwidths,
    merges,
    methods,
    milliseconds,
    outlook,
    products,
    stacks,
    threads,
)
from benchmarks.harness.markdown import table, write_between
from benchmarks.harness.readings import Row

MARKS = ("<!-- readings: made by benchmarks.gpu.table -->", "<!-- end of readings -->")
RELEASES = ("torch", "triton", "cuda", "cupy", "fusion-bench", "isomerge")
# What nvidia-smi calls them, and what is said.
CLOCKS = {
    "driver_version": "driver",
    "clocks.sm": "SM clock",
    "clocks.max.sm": "of at most",
    "clocks.mem": "memory clock",
    "power.limit": "power limit",
}


def readings_table(device: str, rows: Sequence[Row]) -> str:
    """Return everything that is said of a device."""
    readings = Readings(rows)
    parts = (_machine(device, readings), *(section(readings) for section in SECTIONS))
    return "\n\n".join(part for part in parts if part)


def _machine(device: str, readings: Readings) -> str:
    """Return the device, releases and clocks, and how many rows of every stage are right."""
    versions, clocks = readings.row("environment", "versions"), readings.row("environment", "nvidia-smi")
    said = [f"{name} {versions[name]}" for name in RELEASES if versions.get(name, "absent") != "absent"]
    said += [f"{name} {clocks[key]}" for key, name in CLOCKS.items() if key in clocks]
    counts: list[str] = []
    for stage in STAGES:
        found = readings.of(stage)
        wrong = [row["name"] for row in found if "failed" in row or "cut" in row]
        counts += [f"`{stage}` {len(found)} ({', '.join(wrong) or 0})"] if found else []
    return f"**{device}**: {', '.join(said)}. Rows (failed): {', '.join(counts)}."


def _svds(readings: Readings) -> str:
    rows = [row for row in readings.of("published") if "orthogonality" in row]
    lines = [
        (row["name"], milliseconds(row["seconds"]), f"{row['error']:.0e}", f"{row['orthogonality']:.0e}")
        for row in rows
    ]
    return table(("float32", "ms", "error", "orthogonality"), lines)


def _outlook(readings: Readings) -> str:
    if not readings.of("methods"):
        return ""
    lines = "\n".join(f"    {line}" for line in outlook(readings))
    return f"Llama-3-8B, 8 experts, all layers, by these readings:\n\n{lines}"


SECTIONS = (methods, stacks, _svds, bandwidths, products, merges, threads, _outlook)


def table_of(file: Path) -> str:
    """Return the table of a file of readings."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return readings_table(found["device"], found["rows"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="the JSON of a device")
    parser.add_argument("--write", type=Path, help="a Markdown file with the table's two marks")
    options = parser.parse_args()
    text = table_of(options.file)
    print(text)
    if options.write is not None:
        write_between(options.write, MARKS, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
