"""Write the readings of one device as Markdown, which docs/gpu.md shows:

python -m benchmarks.gpu.table benchmarks/results/NVIDIA-H200.json [--write docs/gpu.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.schedule import STAGES
from benchmarks.gpu.summary import BASELINES, Readings, best_and_used, outlook, vram
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


def _methods(readings: Readings) -> str:
    """Return ours, and of every baseline its time, the ratio and the distance of the two."""
    rows = readings.timed("methods")
    theirs = {row["name"]: readings.baselines(row["name"]) for row in rows}
    labels = [label for label in BASELINES if any(label in found for found in theirs.values())]

    def cells(row: Row) -> Iterator[str]:
        name = row["name"]
        yield name
        yield _ms(row["seconds"]) + ("" if row["certified"] else " not certified")
        busy = readings.row("methods", f"{name}, profile").get("busy")
        yield "" if busy is None else f"{busy:.0%}"
        yield from (_compared(row, theirs[name][label]) if label in theirs[name] else "" for label in labels)

    head = ["8 tasks", "ours, ms", "GPU busy", *(f"{label}, ms (ratio; distance)" for label in labels)]
    return table(head, [list(cells(row)) for row in rows])


def _compared(ours: Row, theirs: Row) -> str:
    how = f"estimated: {theirs['estimated']}" if "estimated" in theirs else f"{theirs['distance']:.0e}"
    return f"{_ms(theirs['seconds'])} ({theirs['seconds'] / ours['seconds']:.3g} ×; {how})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}" if seconds < 10 else f"{1e3 * seconds:.0f}"


def _svds(readings: Readings) -> str:
    rows = [row for row in readings.of("published") if "orthogonality" in row]
    lines = [(row["name"], _ms(row["seconds"]), f"{row['error']:.0e}", f"{row['orthogonality']:.0e}") for row in rows]
    return table(("float32", "ms", "error", "orthogonality"), lines)


def _kernels(readings: Readings, stage: str, key: str, title: str) -> str:
    """Return one line for each form, one column for each shape: the configuration in use, and a better one."""
    cells: dict[str, dict[str, str]] = {}
    for form, shape, used, best, config in best_and_used(readings, stage, key):
        other = "" if best is used else f" ({best[key]:.2f} by {config})"
        cells.setdefault(form, {})[shape] = f"{used[key]:.2f}{other}"
    shapes = list(dict.fromkeys(shape for found in cells.values() for shape in found))
    lines = [(form, *(found.get(shape, "") for shape in shapes)) for form, found in cells.items()]
    return table((title, *shapes), lines)


def _bandwidths(readings: Readings) -> str:
    return _kernels(readings, "bandwidths", "of_copy", "share of the copy")


def _products(readings: Readings) -> str:
    return _kernels(readings, "products", "ratio", "`symmetric_matmul`, times as fast as `torch.matmul`")


def _merges(readings: Readings) -> str:
    head = ("2 layers of Llama-3-8B, 8 experts, streamed", "s", "GB/s read", "peak GiB of the GPU", "not certified")
    lines = [
        (row["name"], f"{row['seconds']:.2f}", f"{row['read_gb_per_s']:.2f}", vram(row), str(row["uncertified"]))
        for row in readings.timed("merge")
    ]
    return table(head, lines)


def _threads(readings: Readings) -> str:
    lines = [(row["name"], _ms(row["seconds"]), f"{row['speedup']:.2f}") for row in readings.timed("threads")]
    return table(("on this machine's CPU", "ms", "times as fast as by one thread"), lines)


def _outlook(readings: Readings) -> str:
    if not readings.of("methods"):
        return ""
    lines = "\n".join(f"    {line}" for line in outlook(readings))
    return f"Llama-3-8B, 8 experts, all layers, by these readings:\n\n{lines}"


SECTIONS = (_methods, _svds, _bandwidths, _products, _merges, _threads, _outlook)


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
