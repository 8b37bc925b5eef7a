"""Write the readings of one device as Markdown, which docs/gpu.md shows:

python -m benchmarks.gpu.table benchmarks/results/NVIDIA-H200.json [--write docs/gpu.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.schedule import CALLS
from benchmarks.gpu.summary import BASELINES, Readings, configurations, outlook
from benchmarks.harness.readings import Row

BEGIN, END = "<!-- readings: made by benchmarks.gpu.table -->", "<!-- end of readings -->"
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
    return "\n\n".join(part for lines in parts if (part := "\n".join(lines)))


def _machine(device: str, readings: Readings) -> Iterator[str]:
    """The device, releases and clocks, and how many rows of every stage are right."""
    versions, clocks = readings.row("environment", "versions"), readings.row("environment", "nvidia-smi")
    said = [f"{name} {versions[name]}" for name in RELEASES if versions.get(name, "absent") != "absent"]
    said += [f"{name} {clocks[key]}" for key, name in CLOCKS.items() if key in clocks]
    counts: list[str] = []
    for stage in (stage.name for stages in CALLS.values() for stage in stages):
        found = readings.of(stage)
        wrong = [row["name"] for row in found if "failed" in row or "cut" in row]
        counts += [f"`{stage}` {len(found)} ({', '.join(wrong) or 0})"] if found else []
    yield f"**{device}**: {', '.join(said)}. Rows (failed): {', '.join(counts)}."


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table, or nothing where it has no lines."""
    if found := list(lines):
        yield from (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *found))


def _methods(readings: Readings) -> Iterator[str]:
    """Ours, and of every baseline its time, the ratio and the distance of the two."""
    rows = [row for row in readings.of("methods") if "seconds" in row]
    theirs = {row["name"]: readings.baselines(row["name"]) for row in rows}
    labels = [label for label in BASELINES if any(label in found for found in theirs.values())]

    def cells(row: Row) -> Iterator[str]:
        name = row["name"]
        yield name
        yield _ms(row["seconds"]) + ("" if row["certified"] else " not certified")
        busy = readings.get("methods", f"{name}, profile", "busy")
        yield "" if busy is None else f"{busy:.0%}"
        yield from (_compared(row, theirs[name][label]) if label in theirs[name] else "" for label in labels)

    head = ["8 tasks", "ours, ms", "GPU busy", *(f"{label}, ms (ratio; distance)" for label in labels)]
    yield from _table(head, [list(cells(row)) for row in rows])


def _compared(ours: Row, theirs: Row) -> str:
    how = f"estimated: {theirs['estimated']}" if "estimated" in theirs else f"{theirs['distance']:.0e}"
    return f"{_ms(theirs['seconds'])} ({theirs['seconds'] / ours['seconds']:.3g} ×; {how})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}" if seconds < 10 else f"{1e3 * seconds:.0f}"


def _svds(readings: Readings) -> Iterator[str]:
    rows = [row for row in readings.of("published") if "orthogonality" in row]
    head = ("float32", "ms", "error", "orthogonality")
    values = ((_ms(row["seconds"]), f"{row['error']:.0e}", f"{row['orthogonality']:.0e}") for row in rows)
    yield from _table(head, ((row["name"], *found) for row, found in zip(rows, values, strict=True)))


def _bandwidths(readings: Readings) -> Iterator[str]:
    yield from _kernels(readings, "bandwidths", "of_copy", "share of the copy")


def _products(readings: Readings) -> Iterator[str]:
    yield from _kernels(readings, "products", "ratio", "`symmetric_matmul`, times as fast as `torch.matmul`")


def _kernels(readings: Readings, stage: str, key: str, title: str) -> Iterator[str]:
    """One line a form, one column a shape: the configuration in use, and the best where that is another."""
    cells: dict[str, dict[str, str]] = {}
    for form, shape, rows in configurations(readings, stage, key):
        used, best = rows[0], max(rows, key=lambda row: row[key])
        other = "" if best is used else f" ({best[key]:.2f} by {best['name'].rsplit(', ')[-1]})"
        cells.setdefault(form, {})[shape] = f"{used[key]:.2f}{other}"
    shapes = list(dict.fromkeys(shape for found in cells.values() for shape in found))
    lines = ((form, *(found.get(shape, "") for shape in shapes)) for form, found in cells.items())
    yield from _table((title, *shapes), lines)


def _merges(readings: Readings) -> Iterator[str]:
    def cells(row: Row) -> Iterator[str]:
        yield from (row["name"], f"{row['seconds']:.2f}", f"{row['read_gb_per_s']:.2f}")
        yield f"{row['peak_vram_bytes'] / 2**30:.2f}" if "peak_vram_bytes" in row else ""
        yield str(row["uncertified"])

    head = ("2 layers of Llama-3-8B, 8 experts, streamed", "s", "GB/s read", "peak GiB of the GPU", "not certified")
    yield from _table(head, [list(cells(row)) for row in readings.of("merge") if "seconds" in row])


def _threads(readings: Readings) -> Iterator[str]:
    rows = [row for row in readings.of("threads") if "seconds" in row]
    head = ("on this machine's CPU", "ms", "times as fast as by one thread")
    yield from _table(head, ((row["name"], _ms(row["seconds"]), f"{row['speedup']:.2f}") for row in rows))


def _outlook(readings: Readings) -> Iterator[str]:
    if readings.of("methods"):
        yield "Llama-3-8B, 8 experts, all layers, by these readings:\n"
        yield from (f"    {line}" for line in outlook(readings))


SECTIONS = (_methods, _svds, _bandwidths, _products, _merges, _threads, _outlook)


def table_of(file: Path) -> str:
    """Return the table of a file of readings."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return readings_table(found["device"], found["rows"])


def write_between_marks(document: Path, table: str) -> None:
    """Put a table in the place of what stands between the two marks of a document."""
    head, rest = document.read_text(encoding="utf-8").split(BEGIN, 1)
    document.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="the JSON of a device")
    parser.add_argument("--write", type=Path, help="a Markdown file with the table's two marks")
    options = parser.parse_args()
    table = table_of(options.file)
    print(table)
    if options.write is not None:
        write_between_marks(options.write, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
